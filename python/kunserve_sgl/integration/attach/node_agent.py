"""What a server has on a node of Ray that does not see its directory: a directory of its own there, and an actor that
answers for the processes of that node.

Ray's workers import this module. Like `process.py`, it must not import SGLang.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from kunserve_sgl.args import KunserveOptions
from kunserve_sgl.control.addresses import begun_requests_path, make_control_directory, remove_files
from kunserve_sgl.control.begun_requests import begun_numbers
from kunserve_sgl.integration.attach import last_words
from kunserve_sgl.integration.attach.reaper import clean_up_after, start_reaper, start_ticks

_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
_PROCESSES = Path("/proc/self/ns/pid")
_POLL_S = 0.05


class Sight(NamedTuple):
    """Names a directory and the machine, as a process sees them. Two that have the same sight of a directory can tell
    each other of files in it, and of processes."""

    directory: str
    seen: tuple[str | int, ...]  # empty where the directory is not there


def sight_of(directory: str) -> Sight:
    """Returns what this process sees."""
    with contextlib.suppress(FileNotFoundError):
        status = os.stat(directory)
        machine = _BOOT_ID.read_text(), os.readlink(_PROCESSES)
        return Sight(directory, (*machine, status.st_dev, status.st_ino))
    return Sight(directory, ())


class NodePlace(NamedTuple):
    """Says where an agent is: the address of its node, and the directory for processes there. `is_shared` where that is
    the server's own."""

    host: str
    directory: str
    is_shared: bool


class Remains(NamedTuple):
    """Is what a rank has left when it ended: its last words, and what it says of the requests that it had begun."""

    words: str | None
    begun: bytes | None


class NodeAgent:
    """Lives on one node as long as the controller, whose end is its own by Ray; the directory goes with it. What may
    wait has a deadline."""

    def __init__(self, head: Sight, files: Mapping[str, bytes]) -> None:
        """Makes a directory with `files`, by name, unless the one that the controller sees is the same here. Raises
        OSError, subprocess.TimeoutExpired, ConfigurationError."""
        self._is_shared = bool(head.seen) and sight_of(head.directory) == head
        self._directory = head.directory if self._is_shared else make_control_directory()
        if not self._is_shared:
            self._lifeline = start_reaper(self._directory)  # stays open until this process ends
            for name, content in files.items():
                with open(os.open(Path(self._directory, name), os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as f:
                    f.write(content)
        self._options = KunserveOptions(kunserve_directory=self._directory)

    def place(self) -> NodePlace:
        """Says where this is."""
        import ray

        return NodePlace(ray.util.get_node_ip_address(), self._directory, self._is_shared)

    def stay(self) -> None:
        """Never returns: who waits for it sees the end of this process."""
        threading.Event().wait()

    def end(self, pid: int, started: str, wait_s: float) -> bool:
        """Kills a process of this node, and waits for its end for so long. Tells whether it has ended, whose files in
        shared memory are gone then."""
        if start_ticks(pid) == started:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        ends_at_s = time.monotonic() + wait_s
        while start_ticks(pid) == started:
            if time.monotonic() >= ends_at_s:
                return False
            time.sleep(_POLL_S)
        clean_up_after(self._directory, pid)
        return True

    def remains(self, replica: int, rank: int, incarnation: int) -> Remains:
        """Returns what a rank has left, all of it: nobody knows more."""
        words = last_words.words_of(self._directory, last_words.scheduler_name(replica, rank))
        begun = begun_numbers(begun_requests_path(self._options, replica, incarnation)) if rank == 0 else None
        return Remains(words, begun)

    def remove_files(self, replica: int, incarnation: int) -> None:
        """Removes the files of an incarnation that has ended, once its remains are known elsewhere."""
        remove_files(self._options, replica, incarnation)
