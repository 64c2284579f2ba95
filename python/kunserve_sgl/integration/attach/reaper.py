"""Removes what a server leaves on the machine, however it ends: its temporary directory and its shared memory files.

Most ways to end a server kill its processes before they could clean up: SGLang itself does so on SIGTERM. So a small
process outside the server's session and process tree waits for the launcher's end, then for that of the processes that
signed up, kills those that stay, and removes the server's private directory and the files in /dev/shm whose names
carry the pid or instance id of one that signed up. Run as a script it uses only the standard library.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import stat
import sys
import tempfile
import time
from pathlib import Path

# Set in the environment of everything a server starts.
DIRECTORY_VARIABLE = "KUNSERVE_DIRECTORY"
_SHARED_MEMORY = Path("/dev/shm")
_MEMBERS = "members"
# A killed process takes a while to give a GPU's memory back.
_END_DEADLINE_S = 20.0
_START_DEADLINE_S = 30.0
_POLL_S = 0.05


def start_reaper(directory: str) -> int:
    """Starts the reaper of this process, the launcher; it removes `directory` in the end. Returns the file descriptor
    whose closing, by the end of this process, it waits for. Raises OSError, subprocess.TimeoutExpired."""
    # Nothing else in the launcher needs it.
    import subprocess

    Path(directory, _MEMBERS).mkdir()
    os.environ.pop(DIRECTORY_VARIABLE, None)
    read_fd, write_fd = os.pipe()
    with contextlib.closing(os.fdopen(read_fd)) as stdin:
        started = subprocess.Popen(
            [sys.executable, "-I", "-S", __file__, directory],
            stdin=stdin,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
            cwd="/",
        )
        if started.wait(_START_DEADLINE_S):
            raise OSError(f"the process that cleans up after the server ended with status {started.returncode}")
    join(directory)
    os.environ[DIRECTORY_VARIABLE] = directory
    return write_fd


def join(directory: str) -> None:
    """Signs this process of the server up."""
    Path(directory, _MEMBERS, str(os.getpid())).write_text(start_ticks(os.getpid()) or "")


def clean_up_after(directory: str, pid: int) -> None:
    """Signs off a process of the server that has ended, and removes its shared memory files: others go on. It may have
    ended before it signed up."""
    member = Path(directory, _MEMBERS, str(pid))
    if not member.exists():
        return
    _remove_shared_memory({member.name}, member.stat().st_mtime)
    member.unlink()


def name_instance(directory: str, instance_id: str) -> None:
    """Signs up an id that SGLang names shared memory after."""
    Path(directory, _MEMBERS, instance_id).write_text("")


def keep_temporary_files_in(directory: str) -> None:
    """Makes this process, not its children, create temporary files in `directory`: SGLang's sockets are among them."""
    tempfile.tempdir = directory


def start_ticks(pid: int) -> str | None:
    """Returns when a process of this machine started, which with its pid tells it from all others; None once it has
    ended."""
    with contextlib.suppress(OSError):
        fields = Path(f"/proc/{pid}/stat").read_text(errors="replace").rsplit(")", 1)[1].split()
        return fields[19] if fields[0] not in "ZX" else None
    return None


def _marked(directory: Path) -> dict[int, str]:
    """Finds the processes that the launcher or its children have started. A child of SGLang dies with its parent, but
    only once it has asked for that; later than that the mark may be gone too, because process titles are written over
    it."""
    mark = f"{DIRECTORY_VARIABLE}={directory}\0".encode()
    found: dict[int, str] = {}
    for entry in os.scandir("/proc"):
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            with contextlib.suppress(OSError):
                started = start_ticks(int(entry.name))
                if started is not None and mark in Path(entry.path, "environ").read_bytes():
                    found[int(entry.name)] = started
    return found


def _end_processes(directory: Path, processes: dict[int, str]) -> None:
    """Waits for the end of `processes` and of all that have the mark; past the deadline kills them."""
    for _ in range(2):
        end_s = time.monotonic() + _END_DEADLINE_S
        while time.monotonic() < end_s:
            processes |= _marked(directory)
            processes = {pid: started for pid, started in processes.items() if start_ticks(pid) == started}
            if not processes:
                return
            time.sleep(_POLL_S)
        for pid in processes:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGKILL)


def _remove_shared_memory(tokens: set[str], since_s: float) -> None:
    """Removes this user's files in /dev/shm that are younger than the server and carry one of its names.

    SGLang names them after an instance id or the pid of their creator, and so do the libraries under it.
    """
    for path in _SHARED_MEMORY.iterdir() if tokens and _SHARED_MEMORY.is_dir() else ():
        with contextlib.suppress(FileNotFoundError, PermissionError):
            status = path.lstat()
            named = tokens & set(re.split(r"[-_.]", path.name))
            if named and stat.S_ISREG(status.st_mode) and status.st_uid == os.getuid() and status.st_ctime >= since_s:
                path.unlink()


def _reap(directory: Path) -> None:
    since_s = (directory / _MEMBERS).stat().st_mtime  # nobody has signed up yet
    while os.read(0, 4096):
        pass
    members = {entry.name: Path(entry.path).read_text() for entry in os.scandir(directory / _MEMBERS)}
    _end_processes(directory, {int(name): started for name, started in members.items() if started})
    _remove_shared_memory({entry.name for entry in os.scandir(directory / _MEMBERS)}, since_s)
    shutil.rmtree(directory, ignore_errors=True)


def main() -> None:
    """Runs the reaper: leaves the process tree of the launcher, ignores signals, and cleans up when the launcher has
    ended. The directory is the first argument."""
    if os.fork():
        # The launcher's child ends here; what goes on is nobody's child, so that killing the launcher's tree,
        # as SGLang does, does not reach it.
        os._exit(0)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    _reap(Path(sys.argv[1]))


if __name__ == "__main__":
    main()
