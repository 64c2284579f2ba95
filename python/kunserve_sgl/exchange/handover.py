"""How the activations of a batch get from one of its layer hosts to the next: through its owner's buffer, which all of
them map, or sent by NCCL or gloo."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from typing import Protocol

import torch
from typing_extensions import override

from kunserve_sgl.errors import InvariantError, TransientError
from kunserve_sgl.exchange.activations import ActivationBuffer
from kunserve_sgl.exchange.collective_transport import CollectiveTransport, Expected
from kunserve_sgl.exchange.connecting import Connected, Connecting
from kunserve_sgl.exchange.tensor_layout import Activations
from kunserve_sgl.exchange.work import Answer, TensorNote, Work


class Handover(Protocol):
    """Passes the activations of batches on, for one rank. The messages that pass batches on are sent after `give`, and
    name what it returned."""

    def connect(self, peers: Iterable[int], timeout_s: float) -> Connecting | Connected:
        """Begins what must have ended before the first batch to or from `peers`, each of which does the same. The
        attempt that it returns may end with a TransientError."""

    def share(self, owner: int, buffer: ActivationBuffer) -> None:
        """Takes the buffer in which the activations of `owner`'s batches lie, mapped here. Raises InvariantError where
        activations are sent."""

    def forget(self, peer: int, incarnation: int) -> None:
        """Gives up what belongs to the processes of `peer`, which have ended. It is `incarnation` now, with which
        nothing has been shared or connected yet. No batch of it is under way here, nor one of here there."""

    def disconnect(self, peers: Iterable[int]) -> None:
        """Ends the connections to `peers` and all attempts, and forgets what these have sent and nobody took. They do
        so too, and make new ones before the next batch. Who does not do so would not connect again."""

    def give(
        self, owner: int, to: int, tensors: Activations, keep: torch.Tensor | None, place: int
    ) -> tuple[TensorNote, ...]:
        """Gives `tensors` of a batch of `owner`, each (tokens, ...), of each only the rows `keep` where that is given,
        int64[n], to replica `to`. `place` is the byte of the owner's buffer at which the batch's part begins. Returns
        what goes into the message to `to`."""

    def arrived(self, message: Work | Answer) -> None:
        """Takes note of a message that passes a batch on to this rank. It is called for every one, in the order in
        which they came. What goes wrong is raised by `has_come`."""

    def has_come(self, message: Work | Answer) -> bool:
        """Tells whether the tensors that come with the message are here, so that `take` waits for nobody. Raises
        TransientError where they will never be; the message is forgotten then."""
        ...

    def take(self, message: Work | Answer, place: int) -> Activations:
        """Returns the tensors that came with the message: with an answer for the caller to keep, with work until the
        caller gives them on. It may be called once for each message; `place` is as for `give`."""


class MappedHandover(Handover):
    """Passes activations through memory: the next layer host takes out of the owner's buffer what the last one
    wrote."""

    def __init__(self) -> None:
        self._buffers: dict[int, ActivationBuffer] = {}

    @override
    def connect(self, peers: Iterable[int], timeout_s: float) -> Connected:
        """Connects nothing: the buffers come with the loans of a transition."""
        return Connected()

    @override
    def share(self, owner: int, buffer: ActivationBuffer) -> None:
        self._buffers[owner] = buffer

    @override
    def forget(self, peer: int, incarnation: int) -> None:
        if (buffer := self._buffers.pop(peer, None)) is not None:
            buffer.close()

    @override
    def disconnect(self, peers: Iterable[int]) -> None:
        """Does nothing: the buffers stay shared."""

    @override
    def give(
        self, owner: int, to: int, tensors: Activations, keep: torch.Tensor | None, place: int
    ) -> tuple[TensorNote, ...]:
        return self._buffers[owner].write(tensors, keep, place)

    @override
    def arrived(self, message: Work | Answer) -> None:
        """Does nothing: the tensors stay where they are until they are taken."""

    @override
    def has_come(self, message: Work | Answer) -> bool:
        """Is true: they were written before the message was sent."""
        return True

    @override
    def take(self, message: Work | Answer, place: int) -> Activations:
        buffer = self._buffers[message.owner]
        # A layer host passes the batch on when its layers have run; what is back at the owner may be kept for longer.
        take = buffer.borrow if isinstance(message, Work) else buffer.read
        return take(message.tensors, place)


class CollectiveHandover(Handover):
    """Sends activations by a `CollectiveTransport`. Receiving begins as soon as a message says what was sent, in the
    order in which it was: until then a send by NCCL occupies the sender's GPU. Batches are taken in another order, and
    only when what was sent has come: a stream or a thread that waited for what a dead replica had begun to send could
    not be reached any more."""

    def __init__(self, transport: CollectiveTransport) -> None:
        self._transport = transport
        self._one_at_a_time = threading.Lock()
        self._attempts: list[Connecting] = []
        self._expected: dict[tuple[int, int, int], Expected | TransientError] = {}

    @override
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
        """Ends the connections, and forgets what the peers sent and nobody took."""
        self._transport.disconnect(peers)
        gone = set(peers)
        for key in [key for key in tuple(self._expected) if key[0] in gone]:
            self._expected.pop(key, None)

    @override
    def forget(self, peer: int, incarnation: int) -> None:
        for attempt in self._attempts:
            if peer in attempt.peers and not attempt.has_ended:
                attempt.cancel()
        self._disconnect([peer])
        self._transport.expect_incarnation(peer, incarnation)

    @override
    def disconnect(self, peers: Iterable[int]) -> None:
        for attempt in self._attempts:
            if not attempt.has_ended:
                attempt.cancel()
        self._disconnect(peers)

    @override
    def share(self, owner: int, buffer: ActivationBuffer) -> None:
        raise InvariantError(f"replica {owner} shares a buffer, where activations are sent")

    @override
    def give(
        self, owner: int, to: int, tensors: Activations, keep: torch.Tensor | None, place: int
    ) -> tuple[TensorNote, ...]:
        return self._transport.send(to, tensors, keep)

    @override
    def arrived(self, message: Work | Answer) -> None:
        if not message.tensors:
            return
        try:
            self._expected[_key(message)] = self._transport.expect(message.host, message.tensors)
        except TransientError as error:  # raised by `has_come`
            self._expected[_key(message)] = error

    @override
    def has_come(self, message: Work | Answer) -> bool:
        if not message.tensors:
            return True
        expected = self._expected.get(_key(message))
        if expected is None:
            raise TransientError(f"activations from replica {message.host}: disconnected")
        try:
            if isinstance(expected, TransientError):
                raise expected
            return expected.has_come()
        except TransientError:
            self._expected.pop(_key(message), None)
            raise

    @override
    def take(self, message: Work | Answer, place: int) -> Activations:
        expected = self._expected.pop(_key(message), None)
        if expected is None:
            raise InvariantError(f"batch {message.batch} of replica {message.owner} has not arrived")
        if isinstance(expected, TransientError):
            raise expected
        return expected.take()


def _key(message: Work | Answer) -> tuple[int, int, int]:
    return message.host, message.owner, message.batch
