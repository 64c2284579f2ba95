"""Programs in processes of their own that find SGLang imported and patched, as a server's processes do when they have
been forked: they are children of the process of `preloaded.py`."""

from __future__ import annotations

from pathlib import Path

from preloaded import Preloaded

DEADLINE_S = 900.0
# What libraries print of themselves goes elsewhere. On a machine with an accelerator SGLang is not imported before the
# fork, so it is here.
_PROGRAM = """
import os, sys
from kunserve_sgl.integration.attach import preload

_, output, program, *arguments = sys.argv
variables = preload.import_all()
if preload.accelerator_may_be_there():
    preload.accelerator_may_be_there = lambda: False
    preload._import_once.cache_clear()
    variables |= preload.import_all()
os.dup2(os.open(output, os.O_WRONLY | os.O_CREAT), 1)
sys.argv = ["-c", *arguments]
exec(compile(program, "<program>", "exec"), {"__name__": "__main__", "VARIABLES_READ": variables})
"""


class Imported:
    """Runs programs in children of a process that has imported all that the processes of a server import."""

    def __init__(self, preloaded: Preloaded, directory: Path) -> None:
        self._preloaded = preloaded
        self._directory = directory
        self._runs = 0

    def run(self, program: str, *arguments: str) -> str:
        """Runs `program` with these arguments, and returns what it has printed. It finds the variables of the
        environment that the imports have read in VARIABLES_READ."""
        self._runs += 1
        output = self._directory / str(self._runs)
        self._preloaded.output_of("-c", _PROGRAM, str(output), program, *arguments, deadline_s=DEADLINE_S)
        return output.read_text()
