"""The launcher's process ends, with the right exit code and its reason as the last line, whatever libraries left."""

from __future__ import annotations

from pathlib import Path

from unit.integration.imported import Imported

# Libraries leave threads that nobody joins, and sockets whose message nobody takes: an interpreter that ends waits for
# the former, and may wait for the latter, without a deadline. Each case in a process of its own, forked.
PROGRAM = """
import os, sys, threading
import zmq
from kunserve_sgl.integration.launcher.launch import end_after
from kunserve_sgl.integration.attach.last_words import StartFailedError
from kunserve_sgl.integration.attach.patches import AttachmentError

def serve(error):
    threading.Thread(target=threading.Event().wait).start()
    socket = zmq.Context.instance().socket(zmq.PUSH)
    socket.connect("ipc:///nonexistent/nobody")
    socket.send(b"nobody takes this")
    if error is not None:
        raise error

for case in sys.argv[2:]:
    if (pid := os.fork()) == 0:
        os.dup2(os.open(os.path.join(sys.argv[1], case), os.O_WRONLY | os.O_CREAT), 2)
        end_after(lambda: serve(eval(case)))
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
"""

# What serving raises: exit code, end of the last line.
CASES = {
    "StartFailedError('no memory')": (1, "KunServe: the server has not started: no memory"),
    "AttachmentError('other source')": (1, "KunServe: cannot attach to SGLang: other source"),
    "OSError('disk full')": (1, "KunServe: the server has failed: OSError: disk full"),
    "SystemExit('no such model')": (1, "KunServe: no such model"),
    "SystemExit(3)": (3, ""),
    "KeyboardInterrupt()": (130, ""),
    "None": (0, ""),
}


def test_the_launcher_ends(tmp_path: Path, imported: Imported) -> None:
    ended = imported.run(PROGRAM, str(tmp_path), *CASES)
    assert [int(line) for line in ended.split()] == [exit_code for exit_code, _ in CASES.values()]
    for case, (_, last_line) in CASES.items():
        if last_line:
            assert (tmp_path / case).read_text().splitlines()[-1].endswith(last_line), case
