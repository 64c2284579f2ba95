"""Frames offered from one rank to another over a Unix socket: what they are, and their file descriptors."""

from __future__ import annotations

import os
import socket
import struct
from typing import TypeVar

import msgspec

from kunserve_sgl.memory.errors import TransferError
from kunserve_sgl.memory.frame_export import FrameExport, receive_export, send_export

_LENGTH = struct.Struct("<I")
_BACKLOG = 4096


class KvOffer(msgspec.Struct, frozen=True, tag="kv"):
    """Offers layer `layer` of the slots in granules [first_granule, first_granule + granules) of replica `replica`, at
    home at `owner`; without descriptors at the memory service of `incarnation`."""

    transition: int
    owner: int
    loan_id: int
    replica: int
    first_granule: int
    granules: int
    layer: int
    incarnation: int = 0


class ParameterOffer(msgspec.Struct, frozen=True, tag="parameters"):
    """Offers the region of layer `layer`, to be read; without descriptors at the memory service of `incarnation`."""

    transition: int
    owner: int
    loan_id: int
    layer: int
    incarnation: int = 0


class ActivationOffer(msgspec.Struct, frozen=True, tag="activations"):
    """Offers the buffer for the activations of `owner`'s batches. Stays shared when the transition is over."""

    transition: int
    owner: int
    size_bytes: int


Offer = KvOffer | ParameterOffer | ActivationOffer
LentOffer = TypeVar("LentOffer", KvOffer, ParameterOffer)


class FrameChannel:
    """Receives offers at one address. Accepting never waits for an offer that has not begun to arrive."""

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

    def close(self) -> None:
        """Takes no more offers."""
        self.listener.close()

    def offer(self, path: str, offer: Offer, export: FrameExport) -> None:
        """Sends an offer to the rank that listens at `path`; it need not be accepting yet. Raises TransferError."""
        body = msgspec.msgpack.encode(offer)
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
                sock.settimeout(self._timeout_s)
                sock.connect(path)
                sock.sendall(_LENGTH.pack(len(body)) + body)
                send_export(sock, export, self._timeout_s)
        except OSError as error:
            raise TransferError(f"frames cannot be offered at {path}: {error}") from error

    def accept(self) -> tuple[Offer, FrameExport] | None:
        """Returns the next offer, or None where none has arrived; the caller closes the export. Raises
        TransferError."""
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
