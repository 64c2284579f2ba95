"""A process that has imported all that the processes of a server import, SGLang patched, and runs programs in children.

Importing takes far longer than such a program; a child is as if it had imported by itself. Make one with `with`, in a
process of a test run that needs it. It has no variables of SGLang's in its environment.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from types import TracebackType

DEADLINE_S = 300.0

_PROGRAM = """
import json, os, sys, traceback

answers = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)  # what modules print is no answer

from kunserve_sgl.integration.attach import preload

preload.accelerator_may_be_there = lambda: False
variables = preload.import_all()

def run(program, arguments, output):
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    for at, name in ((1, "output"), (2, "errors")):
        os.dup2(os.open(os.path.join(output, name), os.O_WRONLY | os.O_CREAT), at)
    sys.argv = ["-c", *arguments]
    exec(compile(program, "<program>", "exec"), {"__name__": "__main__", "VARIABLES_READ": variables})

for line in sys.stdin:
    if (pid := os.fork()) == 0:
        status = 1
        try:
            run(*json.loads(line))
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), file=answers, flush=True)
"""


class Imported:
    """The process."""

    def __enter__(self) -> Imported:
        environment = {name: value for name, value in os.environ.items() if not name.startswith(("CUTE_", "SGLANG_"))}
        self._process = subprocess.Popen(
            [sys.executable, "-W", "ignore", "-c", _PROGRAM],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment,
            text=True,
            start_new_session=True,
        )
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end()

    def _end(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)  # also the child that it has, if one runs
        self._process.communicate(timeout=DEADLINE_S)

    def run(self, program: str, *arguments: str) -> str:
        """Runs `program` with these arguments in a child, and returns what it has printed. It finds the variables of
        the environment that the imports have read in VARIABLES_READ."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with tempfile.TemporaryDirectory() as output:
            self._process.stdin.write(json.dumps([program, arguments, output]) + "\n")
            self._process.stdin.flush()
            said = select.poll()  # select() takes no file with a number above 1,023
            said.register(self._process.stdout, select.POLLIN)
            if not said.poll(1000 * DEADLINE_S):
                self._end()
                raise TimeoutError(f"the program did not end within {DEADLINE_S:g} s")
            exit_code = self._process.stdout.readline().strip()
            errors = Path(output, "errors")
            assert exit_code == "0", (exit_code, errors.read_text()[-2000:] if errors.exists() else "")
            return Path(output, "output").read_text()
