"""Frames offered from one rank to another over a Unix socket: what they are, and their file descriptors."""

from __future__ import annotations

import contextlib
import os
import socket
import struct

import msgspec
from typing_extensions import override

from kunserve_sgl.exchange.offers import Offer, OfferChannel
from kunserve_sgl.memory.errors import TransferError
from kunserve_sgl.memory.frame_export import FrameExport, receive_export, send_export

_LENGTH = struct.Struct("<I")
_BACKLOG = 4096


class FrameChannel(OfferChannel):
    """Receives offers with descriptors at one address."""

    def __init__(self, path: str, timeout_s: float) -> None:
        """`timeout_s` bounds every transfer, once begun."""
        self.path = path
        self._timeout_s = timeout_s
        self.listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.listener.bind(path)
        os.chmod(path, 0o600)
        self.listener.listen(_BACKLOG)
        self.listener.setblocking(False)
        self._decoder = msgspec.msgpack.Decoder(Offer)

    @override
    def close(self) -> None:
        self.listener.close()
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self.path)

    @override
    def offer(self, borrower: int, address: str, offer: Offer, export: FrameExport) -> None:
        body = msgspec.msgpack.encode(offer)
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
                sock.settimeout(self._timeout_s)
                sock.connect(address)
                sock.sendall(_LENGTH.pack(len(body)) + body)
                send_export(sock, export, self._timeout_s)
        except OSError as error:
            raise TransferError(f"frames cannot be offered to replica {borrower} at {address}: {error}") from error

    @override
    def accept(self) -> tuple[Offer, FrameExport] | None:
        try:
            sock, _ = self.listener.accept()
        except BlockingIOError:
            return None
        with sock:
            sock.settimeout(self._timeout_s)
            try:
                (length,) = _LENGTH.unpack(_receive(sock, _LENGTH.size))
                offer = self._decoder.decode(_receive(sock, length))
            except (OSError, msgspec.DecodeError, msgspec.ValidationError) as error:
                raise TransferError(f"an offer of frames cannot be read: {error}") from error
            return offer, receive_export(sock, self._timeout_s)


def _receive(sock: socket.socket, count: int) -> bytes:
    data = b""
    while len(data) < count:
        more = sock.recv(count - len(data))
        if not more:
            raise TransferError("the peer closed the connection in the middle of an offer")
        data += more
    return data
