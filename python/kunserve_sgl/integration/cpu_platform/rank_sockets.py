"""What the ranks of a replica add up and gather, by Unix sockets between them: small tensors of a CPU.

gloo hands every transfer to threads of its own and wakes them one after the other. On two cores an all-reduce of 4 KiB
takes 450 us of CPU time at each of two ranks so, and 15 us here; a decode step of a tiny model has ten.
"""

from __future__ import annotations

import socket
import struct
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from kunserve_sgl.errors import KunserveError

MOST_BYTES = 1 << 20
"""What a rank may send to all others at once. Larger tensors are left to gloo, which sends less with many ranks."""

_ROOM_BYTES = 1 << 17  # asked for; what a socket has is what the system allows
_RANK = struct.Struct("!Q")

Share = Callable[[str], Sequence[str]]
"""Gives what it is called with to all ranks; returns what all have given, in the order of ranks."""


class RankEndedError(KunserveError):
    """Says that another rank of this replica is gone, or did nothing within the deadline. This one cannot go on."""


class RankSockets:
    """One rank's sockets to all others. All ranks call the same methods in the same order, with tensors of the same
    shape and dtype."""

    def __init__(self, rank: int, others: Sequence[socket.socket], timeout_s: float) -> None:
        """Takes the stream sockets to the other ranks, in their order. `timeout_s` bounds each wait for one of them."""
        self._rank = rank
        self._others = others
        rooms = []
        for other in others:
            other.settimeout(timeout_s)
            other.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _ROOM_BYTES)
            rooms.append(other.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF))
        # Two pieces may wait for a rank that is behind, and the system counts more than their bytes: nobody who sends
        # waits for somebody who sends.
        self._piece_bytes = min(rooms) // 4

    def all_reduce(self, tensor: torch.Tensor) -> None:
        """Adds up what all ranks have; every rank gets the same bits, as all add in the order of ranks."""
        first, *more = self.all_gather(tensor)
        total = first + more.pop(0)
        for term in more:
            total += term
        tensor.copy_(total)

    def all_gather(self, tensor: torch.Tensor) -> list[torch.Tensor]:
        """Returns the tensors of all ranks, in the order of ranks; this one's may be the argument itself."""
        mine = tensor.contiguous()
        gathered = [torch.empty_like(mine) for _ in self._others]
        sent, received = _bytes_of(mine), [_bytes_of(each) for each in gathered]
        for begin in range(0, len(sent), self._piece_bytes):
            piece = slice(begin, begin + self._piece_bytes)
            for other in self._others:
                self._send(other, sent[piece])
            for other, view in zip(self._others, received, strict=True):
                self._receive(other, view[piece])
        return [*gathered[: self._rank], mine, *gathered[self._rank :]]

    def broadcast(self, tensor: torch.Tensor, source: int) -> None:
        """Gives every rank what rank `source` has in `tensor`, which must be contiguous."""
        view = _bytes_of(tensor)
        if source == self._rank:
            for other in self._others:
                self._send(other, view)
        else:
            self._receive(self._others[source - (source > self._rank)], view)

    def close(self) -> None:
        """Closes the sockets, whereupon the other ranks fail if they wait for this one."""
        for other in self._others:
            other.close()

    def _send(self, other: socket.socket, view: memoryview) -> None:
        try:
            other.sendall(view)
        except OSError as error:  # also a timeout
            raise self._ended(other, error) from error

    def _receive(self, other: socket.socket, view: memoryview) -> None:
        try:
            while view:
                count = other.recv_into(view)
                if not count:
                    raise ConnectionResetError("it has closed the connection")
                view = view[count:]
        except OSError as error:
            raise self._ended(other, error) from error

    def _ended(self, other: socket.socket, error: OSError) -> RankEndedError:
        place = self._others.index(other)
        return RankEndedError(f"rank {place + (place >= self._rank)} of this replica does not answer: {error}")


def connect(rank: int, share: Share, timeout_s: float) -> RankSockets:
    """Connects this rank with all others, which call it at the same time. `timeout_s` bounds each wait, now and later.
    Only processes of the same user can connect: the sockets lie in directories of their own, which are removed."""
    with (
        tempfile.TemporaryDirectory(prefix="ranks-") as directory,
        socket.socket(socket.AF_UNIX) as listener,
    ):
        path = str(Path(directory, str(rank)))
        listener.bind(path)
        listener.listen()
        listener.settimeout(timeout_s)
        paths = share(path)
        others: list[socket.socket] = []
        for lower in paths[:rank]:
            others.append(socket.socket(socket.AF_UNIX))
            others[-1].settimeout(timeout_s)
            others[-1].connect(lower)
            others[-1].sendall(_RANK.pack(rank))
        higher = {}
        for _ in paths[rank + 1 :]:
            other, _ = listener.accept()
            other.settimeout(timeout_s)
            higher[_RANK.unpack(other.recv(_RANK.size, socket.MSG_WAITALL))] = other
        others += [higher[key] for key in sorted(higher)]
    return RankSockets(rank, others, timeout_s)


def _bytes_of(tensor: torch.Tensor) -> memoryview:
    return tensor.view(-1).view(torch.uint8).numpy().data
