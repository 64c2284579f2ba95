"""The launcher's process ends, with the right exit code and its reason as the last line, whatever libraries left."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

DEADLINE_S = 300.0

# Libraries leave threads that nobody joins, and sockets whose message nobody takes: an interpreter that ends waits for
# the former, and may wait for the latter, without a deadline. All cases in one process, forked: imports take long.
PROGRAM = """
import os, sys, threading
import zmq
from kunserve_sgl.integration.launcher import ending  # imports SGLang
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


def test_the_launcher_ends(tmp_path: Path) -> None:
    command = [sys.executable, "-c", PROGRAM, str(tmp_path), *CASES]
    ended = subprocess.run(command, stdout=subprocess.PIPE, text=True, timeout=DEADLINE_S, check=True)
    assert [int(line) for line in ended.stdout.split()] == [exit_code for exit_code, _ in CASES.values()]
    for case, (_, last_line) in CASES.items():
        if last_line:
            assert (tmp_path / case).read_text().splitlines()[-1].endswith(last_line), case
