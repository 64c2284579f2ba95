"""How the activations of a batch get from one of its layer hosts to the next: through its owner's buffer, which all of
them map, or sent by NCCL or gloo."""

from __future__ import annotations

import threading
from collections import defaultdict, deque
from collections.abc import Callable, Iterable
from typing import Protocol

import torch

from kunserve_sgl.errors import InvariantError
from kunserve_sgl.exchange.activations import ActivationBuffer
from kunserve_sgl.exchange.collective_transport import CollectiveTransport
from kunserve_sgl.exchange.connecting import Connected, Connecting
from kunserve_sgl.exchange.tensor_layout import Activations
from kunserve_sgl.exchange.work import Answer, TensorNote, Work


class Handover(Protocol):
    """One rank's. The messages that pass batches on are sent after `give`, and name what it returned."""

    def connect(self, peers: Iterable[int], timeout_s: float) -> Connecting | Connected:
        """Begins what must have ended before the first batch to or from `peers`, each of which does the same. It may
        end with a TransientError."""

    def share(self, owner: int, buffer: ActivationBuffer) -> None:
        """`buffer` is for the activations of `owner`'s batches."""

    def give(
        self, owner: int, to: int, tensors: Activations, keep: torch.Tensor | None, place: int
    ) -> tuple[TensorNote, ...]:
        """Gives `tensors` of a batch of `owner`, of each only the rows `keep` where that is given, int64[n], to
        replica `to`. `place` is the batch's place in the owner's buffer."""

    def arrived(self, message: Work | Answer) -> None:
        """Told of every message that passes a batch on to this rank, in the order in which they came."""

    def take(self, message: Work | Answer, place: int) -> Activations:
        """The tensors that came with the message. Once for each."""


class MappedHandover:
    """Through memory: the next layer host copies out of the buffer what the last one wrote."""

    def __init__(self) -> None:
        self._buffers: dict[int, ActivationBuffer] = {}

    def connect(self, peers: Iterable[int], timeout_s: float) -> Connected:
        """Buffers come with the loans of a transition."""
        return Connected()

    def share(self, owner: int, buffer: ActivationBuffer) -> None:
        self._buffers[owner] = buffer

    def give(
        self, owner: int, to: int, tensors: Activations, keep: torch.Tensor | None, place: int
    ) -> tuple[TensorNote, ...]:
        return self._buffers[owner].write(tensors, keep, place)

    def arrived(self, message: Work | Answer) -> None:
        """The tensors stay where they are until they are taken."""

    def take(self, message: Work | Answer, place: int) -> Activations:
        return self._buffers[message.owner].read(message.tensors, place)


class CollectiveHandover:
    """Sent. A peer's tensors are received in the order in which it sent them; batches are taken in another order, so
    what came before is received with them and kept."""

    def __init__(self, transport: CollectiveTransport) -> None:
        self._transport = transport
        self._one_at_a_time = threading.Lock()
        self._attempts: list[Connecting] = []
        self._on_the_way: defaultdict[int, deque[Work | Answer]] = defaultdict(deque)
        self._kept: dict[tuple[int, int, int], Activations] = {}

    def connect(self, peers: Iterable[int], timeout_s: float) -> Connecting | Connected:
        # What an attempt that was cancelled has connected goes when it ends. The next one comes after that.
        self._attempts = [attempt for attempt in self._attempts if not attempt.has_ended]
        stay = self._transport.peers.difference(*(attempt.peers for attempt in self._attempts))
        missing = set(peers) - stay
        if not missing:
            return Connected()

        def connect(peers: Iterable[int], is_cancelled: Callable[[], bool]) -> None:
            self._transport.connect(peers, timeout_s, is_cancelled)

        self._attempts.append(Connecting(missing, connect, self._disconnect, self._one_at_a_time))
        return self._attempts[-1]

    def _disconnect(self, peers: Iterable[int]) -> None:
        """What they sent and nobody took is no more."""
        self._transport.disconnect(peers)
        for peer in peers:
            self._on_the_way.pop(peer, None)
            for key in [key for key in tuple(self._kept) if key[0] == peer]:
                self._kept.pop(key, None)

    def share(self, owner: int, buffer: ActivationBuffer) -> None:
        raise InvariantError(f"replica {owner} shares a buffer, where activations are sent")

    def give(
        self, owner: int, to: int, tensors: Activations, keep: torch.Tensor | None, place: int
    ) -> tuple[TensorNote, ...]:
        return self._transport.send(to, tensors, keep)

    def arrived(self, message: Work | Answer) -> None:
        if message.tensors:
            self._on_the_way[message.host].append(message)

    def take(self, message: Work | Answer, place: int) -> Activations:
        wanted = _key(message)
        before = self._on_the_way[message.host]
        while wanted not in self._kept:
            if not before:
                raise InvariantError(f"batch {message.batch} of replica {message.owner} has not arrived")
            oldest = before.popleft()
            self._kept[_key(oldest)] = self._transport.receive(oldest.host, oldest.tensors)
        return self._kept.pop(wanted)


def _key(message: Work | Answer) -> tuple[int, int, int]:
    return message.host, message.owner, message.batch
