"""A cable between two network namespaces, which may be slow, lose what goes through it, or be cut. It is a process
(`cable_program.py`) between two TAP devices, so it needs no module of the kernel for that, and frames come to it whole:
no offload puts several into one, or leaves out a checksum."""

from __future__ import annotations

import fcntl
import os
import select
import struct
import subprocess
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from types import TracebackType
from typing import NamedTuple

from typing_extensions import Self

END = "cable"  # the name of the device in each namespace
_PROGRAM = Path(__file__).with_name("cable_program.py")
_DEVICES = "/dev/net/tun"
_NEW_DEVICE = 0x400454CA  # TUNSETIFF
_FRAMES, _NOTHING_BESIDE = 0x0002, 0x1000  # IFF_TAP, IFF_NO_PI
_DEADLINE_S = 60.0  # it answers at once
_SEED = 11

Inside = Callable[[], AbstractContextManager[None]]


class Frames(NamedTuple):
    """How many have been passed on and lost, of both directions."""

    passed_on: int
    lost: int


class Cable:
    """Is there while the context lasts. Each direction holds and loses frames alike."""

    def __init__(self, one: Inside, other: Inside) -> None:
        """Takes what leads this thread into each namespace. Raises OSError where no devices can be
        made."""
        with ExitStack() as stack:
            ends = []
            for inside in (one, other):
                with inside():
                    ends.append(os.open(_DEVICES, os.O_RDWR))
                    stack.callback(os.close, ends[-1])
                    fcntl.ioctl(ends[-1], _NEW_DEVICE, struct.pack("16sH22x", END.encode(), _FRAMES | _NOTHING_BESIDE))
                    # Before anything is passed on: a device that is down takes no frame.
                    subprocess.run(("ip", "link", "set", END, "up"), check=True, timeout=_DEADLINE_S)
            self._process = subprocess.Popen(
                [sys.executable, "-S", str(_PROGRAM), *map(str, ends), str(_SEED)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                pass_fds=ends,
            )  # which alone has the devices then: they are gone when it is

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            _, errors = self._process.communicate(timeout=_DEADLINE_S)  # closes its input
        except subprocess.TimeoutExpired:
            self._process.kill()
            _, errors = self._process.communicate()
        assert self._process.returncode == 0, f"the cable has failed: {errors.decode(errors='replace')}"

    @property
    def pid(self) -> int:
        return self._process.pid

    def set(self, *, delay_s: float = 0.0, loss: float = 0.0) -> Frames:
        """From now on holds each frame for so long, and loses this share of them: 1.0 cuts it, 0.0 mends it. Returns
        the frames so far."""
        return self._ask(f"{delay_s} {loss}")

    def frames(self) -> Frames:
        """The frames so far. AssertionError where the process has ended."""
        return self._ask("")

    def _ask(self, order: str) -> Frames:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.write(f"{order}\n".encode())
            self._process.stdin.flush()
        except BrokenPipeError:
            raise AssertionError("the cable has ended") from None
        ready, _, _ = select.select([self._process.stdout], [], [], _DEADLINE_S)
        assert ready, f"the cable has not answered in {_DEADLINE_S:g} s"
        answer = self._process.stdout.readline()
        assert answer, "the cable has ended"
        passed_on, lost = map(int, answer.split())
        return Frames(passed_on, lost)
