"""Frames on their way to another process: the value, and sending it over a Unix socket."""

from __future__ import annotations

import array
import json
import os
import socket
import struct
import time
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType
from typing import Any, TypeVar

from kunserve_sgl.memory.errors import TransferError

_T = TypeVar("_T")

_VERSION = 1
_LENGTH = struct.Struct("<I")
_MAX_HEADER_BYTES = 16 << 20
# Linux passes at most 253 descriptors in one message.
_FDS_PER_MESSAGE = 128


@dataclass(frozen=True, slots=True)
class FrameRun:
    """Names `count` frames from index `first` on, of the memory behind descriptor number `fd_slot` of the export."""

    fd_slot: int
    first: int
    count: int


@dataclass(frozen=True, slots=True)
class FrameExport:
    """Holds open file descriptors and says which frames of them are meant, in order. It owns the descriptors until it
    is closed."""

    backend: str
    frame_bytes: int
    runs: tuple[FrameRun, ...]
    fds: tuple[int, ...]

    @property
    def frame_count(self) -> int:
        """Counts the frames of all runs."""
        return sum(run.count for run in self.runs)

    def close(self) -> None:
        """Closes the descriptors, once. Frames that were imported from them stay usable."""
        for fd in self.fds:
            os.close(fd)

    def __enter__(self) -> FrameExport:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def send_export(sock: socket.socket, export: FrameExport, timeout_s: float) -> None:
    """Sends `export` over a connected Unix stream socket. The sender still owns and closes its descriptors.

    Raises TransferError when the peer is gone or `timeout_s` passes; the stream is then unusable.
    """
    header = {
        "version": _VERSION,
        "backend": export.backend,
        "frame_bytes": export.frame_bytes,
        "runs": [[run.fd_slot, run.first, run.count] for run in export.runs],
        "fds": len(export.fds),
    }
    body = json.dumps(header, separators=(",", ":")).encode()
    if len(body) > _MAX_HEADER_BYTES:
        raise TransferError(f"{export.frame_count} frames are too many for one transfer; send them in parts")

    def send() -> None:
        sock.sendall(_LENGTH.pack(len(body)) + body)
        for at in range(0, len(export.fds), _FDS_PER_MESSAGE):
            deadline()
            socket.send_fds(sock, [b"f"], list(export.fds[at : at + _FDS_PER_MESSAGE]))

    deadline = _deadline(sock, timeout_s)
    _with_timeout(sock, deadline, send)


def receive_export(sock: socket.socket, timeout_s: float) -> FrameExport:
    """Receives what `send_export` sent; the caller closes it. Raises TransferError; then no descriptor stays
    open."""
    fds: list[int] = []

    def receive() -> FrameExport:
        (length,) = _LENGTH.unpack(_receive_exactly(sock, _LENGTH.size, deadline))
        if length > _MAX_HEADER_BYTES:
            raise TransferError(f"the header claims {length} bytes; at most {_MAX_HEADER_BYTES} are accepted")
        backend, frame_bytes, runs, fd_count = _parse(_receive_exactly(sock, length, deadline))
        while len(fds) < fd_count:
            deadline()
            received = _receive_fds(sock)
            fds.extend(received)
            if not received:
                raise TransferError(f"the peer sent {len(fds)} of {fd_count} file descriptors and stopped")
        if len(fds) != fd_count:
            raise TransferError(f"the peer sent {len(fds)} file descriptors, not {fd_count}")
        return FrameExport(backend, frame_bytes, runs, tuple(fds))

    deadline = _deadline(sock, timeout_s)
    try:
        return _with_timeout(sock, deadline, receive)
    except BaseException:
        for fd in fds:
            os.close(fd)
        raise


def _parse(body: bytes) -> tuple[str, int, tuple[FrameRun, ...], int]:
    try:
        header: Any = json.loads(body)
        if header["version"] != _VERSION:
            raise TransferError(f"the peer speaks version {header['version']}; this process speaks {_VERSION}")
        backend, frame_bytes, fd_count = (
            str(header["backend"]),
            int(header["frame_bytes"]),
            int(header["fds"]),
        )
        runs = tuple(FrameRun(int(slot), int(first), int(count)) for slot, first, count in header["runs"])
    except (ValueError, TypeError, KeyError) as error:
        raise TransferError(f"the header cannot be read: {error!r}") from error
    for run in runs:
        if not (0 <= run.fd_slot < fd_count and run.first >= 0 and run.count > 0):
            raise TransferError(f"{run} cannot be among {fd_count} file descriptors")
    return backend, frame_bytes, runs, fd_count


def _deadline(sock: socket.socket, timeout_s: float) -> Callable[[], None]:
    """Returns a function that gives the socket the time that is left, each time it is called."""
    end_s = time.monotonic() + timeout_s

    def allow_rest() -> None:
        left_s = end_s - time.monotonic()
        if left_s <= 0:
            raise TransferError(f"the peer did not finish within {timeout_s} s")
        sock.settimeout(left_s)

    return allow_rest


def _with_timeout(sock: socket.socket, deadline: Callable[[], None], work: Callable[[], _T]) -> _T:
    before_s = sock.gettimeout()
    try:
        deadline()
        return work()
    except TimeoutError as error:
        raise TransferError("the peer did not answer in time") from error
    except OSError as error:
        raise TransferError(f"the connection to the peer failed: {error}") from error
    finally:
        sock.settimeout(before_s)


def _receive_exactly(sock: socket.socket, size: int, deadline: Callable[[], None]) -> bytes:
    parts: list[bytes] = []
    while size:
        deadline()
        part = sock.recv(size)
        if not part:
            raise TransferError("the peer closed the connection in the middle of a transfer")
        parts.append(part)
        size -= len(part)
    return b"".join(parts)


def _receive_fds(sock: socket.socket) -> list[int]:
    """Receives the descriptors of one message, closed on exec; none at the end of the stream.

    `socket.recv_fds` ignores its flags argument, so it cannot close them on exec.
    """
    received = array.array("i")
    space = socket.CMSG_SPACE(_FDS_PER_MESSAGE * received.itemsize)
    _, ancillary, flags, _ = sock.recvmsg(1, space, socket.MSG_CMSG_CLOEXEC)
    for level, kind, data in ancillary:
        if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
            received.frombytes(data[: len(data) - len(data) % received.itemsize])
    if flags & socket.MSG_CTRUNC:
        for fd in received:
            os.close(fd)
        raise TransferError("file descriptors were lost; is the limit of open files (ulimit -n) too low?")
    return received.tolist()
