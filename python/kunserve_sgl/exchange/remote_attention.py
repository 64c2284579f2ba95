"""The layer host's end of remote attention by message: a batch divided over the homes of its KV, orders to them, and
how their answers are waited for.

While it waits, this rank does nothing else: others' orders are answered by a thread (`memory_service.py`). What goes
wrong is not raised in the middle of the layers, where other ranks of the replica would wait in a collective for this
one: the layers run to their end on NaN, which collectives carry to all ranks. These then ask each other whether one of
them lacked an answer: the batch has failed at all of them if so, and else what the model computes is NaN.
"""

from __future__ import annotations

import logging
import time
import weakref
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import msgspec
import torch
import zmq

from kunserve_sgl.errors import TransientError
from kunserve_sgl.exchange.attention_parts import AttentionPart, Integers, divide_batch
from kunserve_sgl.exchange.attention_service import packed, unpacked
from kunserve_sgl.exchange.attention_work import (
    AttentionAnswer,
    AttentionOrder,
    AttentionShape,
    check_answer_tensors,
    note_of_slots,
    order_tensors,
)
from kunserve_sgl.exchange.kv_homes import KvHomes, Pattern
from kunserve_sgl.exchange.peer_link import PeerLink
from kunserve_sgl.exchange.tensor_layout import Activations, notes_of
from kunserve_sgl.policy.demand import AttentionTime
from kunserve_sgl.wire.asking import NOBODY_TO_ASK, connect_asker
from kunserve_sgl.wire.curve import Curve
from kunserve_sgl.wire.framing import MOST_CONTROL_BYTES
from kunserve_sgl.wire.rejections import BadMessageError, require, require_range

logger = logging.getLogger(__name__)

_MOST_ATTENDING_US = 10**12  # of one order
_POLL_SLICE_MS = 1000
_TELL_INTERVAL_S = 1.0


class KvUnreachableError(TransientError):
    """Says that a home has not attended to its KV. What the layers have given is of no use, and who knows what was
    written. `homes` are the replicas that are why; none where this rank does not know, or is to leave the layers."""

    def __init__(self, reason: str, homes: Sequence[int] = ()) -> None:
        super().__init__(reason)
        self.homes = tuple(homes)


class Division:
    """Is a batch divided over the homes of its KV, for all layers with the same homes. `parts` are by home."""

    def __init__(self, number: int, parts: Mapping[int, AttentionPart]) -> None:
        self.number = number
        self.parts = parts
        self.told: set[int] = set()  # homes that have been told their slots


class Pending:
    """Knows the orders of one layer of a batch that have not been answered: home by number."""

    def __init__(self, division: Division, shape: AttentionShape, device: torch.device) -> None:
        self.division = division
        self.shape = shape
        self.device = device
        self.homes: dict[int, int] = {}
        self.answers: dict[int, Activations] = {}  # by home
        self.attending_us: dict[int, int] = {}  # by home, what it took there


class RemoteAttention:
    """Asks the homes of KV, for the batches that one rank executes. It is called in the thread that runs them."""

    def __init__(
        self,
        link: PeerLink,
        homes: Callable[[], KvHomes],
        address_of: Callable[[int], str],
        ranks: int,
        all_ranks: Callable[[bool], bool],
        timeout_s: float,
        curve: Curve | None = None,
        most_bytes: int = MOST_CONTROL_BYTES,
    ) -> None:
        """`homes()` are those of now, `address_of(home)` is where the same rank of a home serves; each replica has so
        many `ranks`, and `all_ranks` tells whether all of this one say yes, when each has called it. What is not
        answered within `timeout_s` has failed. `curve` has the keys, over TCP. No frame of an answer has more than
        `most_bytes`."""
        self.replica = link.replica
        self._link = link
        self._homes = homes
        self._address_of = address_of
        self._ranks = ranks
        self._all_ranks = all_ranks
        self._timeout_s = timeout_s
        self._curve = curve
        self._most_bytes = most_bytes
        self._sockets: dict[int, zmq.Socket[bytes]] = {}
        self._ended: dict[int, list[int]] = {}  # by home: parts that it may forget
        self._last_part = self._last_number = 0
        self._failure = ""
        self._failed_homes: Sequence[int] = ()  # that are why, where one is known
        self._decoder = msgspec.msgpack.Decoder(AttentionAnswer)
        self.asked: Counter[int] = Counter()  # orders, by home
        self._spent_s: defaultdict[int, float] = defaultdict(float)  # by home
        self._attending_us: Counter[int] = Counter()
        # Says why an answer is not to be waited for any more; empty where it is.
        self.why_to_leave: Callable[[], str] = lambda: ""
        # Called with the homes that have not answered for a second or more, and for how long.
        self.tell_of_waiting: Callable[[Sequence[int], float], None] = lambda homes, waited_s: None

    def pattern(self, layer: int) -> Pattern:
        """Returns what of the KV of a layer is elsewhere now; empty where nothing is. See `KvHomes.pattern`."""
        return self._homes().pattern(layer)

    def divide(self, layer: int, slots: Integers, lengths: Integers, query_counts: Integers) -> Division | None:
        """Divides a batch as `divide_batch` for all layers with the pattern of `layer`; None where all of it is here.
        Homes keep their parts until what is returned is gone."""
        parts = divide_batch(slots, self._homes().of(slots, layer), lengths, query_counts)
        elsewhere = [home for home in parts if home != self.replica]
        if not elsewhere:
            return None
        self._last_part += 1
        division = Division(self._last_part, parts)
        for home in elsewhere:
            weakref.finalize(division, self._ended.setdefault(home, []).append, division.number)
        return division

    def ask(
        self,
        division: Division,
        layer: int,
        shape: AttentionShape,
        query: torch.Tensor,
        key: torch.Tensor | None,
        value: torch.Tensor | None,
    ) -> Pending:
        """Sends every other home of the batch its order for a layer, and waits for nobody but the stream that makes
        the tensors, which are as `order_tensors` takes them."""
        pending, homes = Pending(division, shape, query.device), self._homes()
        for home, part in division.parts.items():
            if home == self.replica or self._failure:
                continue
            try:
                socket = self._socket(home)
            except TransientError as error:  # it has ended, and nobody is there any more
                self._fail(f"replica {home} cannot be asked: {error}", [home])
                continue
            tensors = order_tensors(part, query, key, value)
            self._last_number += 1
            order = AttentionOrder(
                host=self.replica,
                number=self._last_number,
                layer=layer,
                loans=homes.loans(home, layer),
                part=division.number,
                slots=None if home in division.told else note_of_slots(part.slots),
                ended=tuple(self._take_ended(home)),
                tensors=notes_of(tensors, None),
            )
            try:
                socket.send_multipart([msgspec.msgpack.encode(order), packed(tensors)], zmq.NOBLOCK, copy=False)
            except zmq.Again:
                self._fail(f"replica {home} cannot be asked: {NOBODY_TO_ASK}", [home])
                continue
            division.told.add(home)
            pending.homes[order.number] = home
            self.asked[home] += 1
        return pending

    def collect(self, pending: Pending) -> Mapping[int, Activations] | None:
        """Waits for the answers, and returns them by home. None where one does not come: `whole` raises why when the
        layers have run."""
        began_s = told_s = time.monotonic()
        poller = zmq.Poller()
        poller.register(self._link.inbox, zmq.POLLIN)
        for home in set(pending.homes.values()):
            poller.register(self._socket(home), zmq.POLLIN)
        while pending.homes and not self._failure:
            self._take_answers(pending)
            if not pending.homes:
                break
            now_s = time.monotonic()
            homes = sorted(pending.homes.values())
            left_s = began_s + self._timeout_s - now_s
            if left_s <= 0:
                self._fail(f"replica {homes} did not attend to its KV within {self._timeout_s:g} s", homes)
            elif why := self.why_to_leave():
                self._fail(why)
            else:
                if now_s - told_s >= _TELL_INTERVAL_S:
                    told_s = now_s
                    self.tell_of_waiting(homes, now_s - began_s)
                poller.poll(min(_POLL_SLICE_MS, max(1, int(1000 * left_s))))
                self._link.poll(0)
        return None if self._failure else pending.answers

    def account(self, pending: Pending, seconds: float) -> None:
        """Takes note that a layer whose answers are there has taken `seconds` because of its other homes: all but
        attention to what is here. They are taken to have equal parts in it, since their answers are waited for at the
        same time."""
        for home, attending_us in pending.attending_us.items():
            self._spent_s[home] += seconds / len(pending.attending_us)
            self._attending_us[home] += attending_us

    def times(self) -> tuple[AttentionTime, ...]:
        """Returns what attention elsewhere has taken since the start, by home."""
        return tuple(
            AttentionTime(home, self.asked[home], int(1000 * spent_s), self._attending_us[home] // 1000)
            for home, spent_s in sorted(self._spent_s.items())
        )

    @contextmanager
    def whole(self) -> Iterator[Callable[[Iterable[torch.Tensor | None]], None]]:
        """Sees to it that layers which run in the block have had all answers: the block calls what it is given with
        what has come out of them, which is the same at all ranks of the replica. Raises KvUnreachableError where that
        is not so, at all ranks alike.

        Where one lacks an answer, what comes out is NaN at all of them. So ranks agree, which is a collective, where
        there is a NaN, or nothing that could be one.
        """

        def check(results: Iterable[torch.Tensor | None]) -> None:
            has_all = not self._failure
            if self._ranks > 1 and _may_lack_answers(results):
                has_all = self._all_ranks(has_all)
            if self._failure:
                raise KvUnreachableError(self._failure, self._failed_homes)
            if not has_all:
                raise KvUnreachableError("another rank lacks the answer of a home of KV")

        try:
            yield check
        finally:
            self._failure, self._failed_homes = "", ()

    def forget(self, home: int) -> None:
        """Closes the way to a replica whose processes have ended. The next order goes to those that are there then."""
        if (socket := self._sockets.pop(home, None)) is not None:
            socket.close(linger=0)
        self._ended.pop(home, None)

    def close(self) -> None:
        """Closes all ways."""
        for home in tuple(self._sockets):
            self.forget(home)

    def report(self) -> dict[str, int]:
        """Counts the orders that have been sent, by home."""
        return {str(home): count for home, count in sorted(self.asked.items())}

    def _fail(self, why: str, homes: Sequence[int] = ()) -> None:
        logger.warning("KunServe: %s", why)
        self._failure, self._failed_homes = why, homes

    def _take_ended(self, home: int) -> list[int]:
        """Takes out the parts that `home` may forget. What the collector adds meanwhile comes with a later order."""
        ended = self._ended.get(home, [])
        return [ended.pop() for _ in range(len(ended))]

    def _socket(self, home: int) -> zmq.Socket[bytes]:
        socket = self._sockets.get(home)
        if socket is None:
            whom = home, self._link.rank
            socket = self._sockets[home] = connect_asker(self._address_of(home), whom, self._curve, self._most_bytes)
        return socket

    def _take_answers(self, pending: Pending) -> None:
        """Takes in what has come; answers to orders that were given up are dropped."""
        for home in sorted(set(pending.homes.values())):
            socket = self._socket(home)
            while home in pending.homes.values() and socket.poll(0):
                try:
                    self._take_answer(pending, home, socket.recv_multipart(zmq.NOBLOCK))
                except (BadMessageError, msgspec.DecodeError, RecursionError) as error:
                    self._fail(f"replica {home} has answered what makes no sense: {error}", [home])
                    return

    def _take_answer(self, pending: Pending, home: int, frames: Sequence[bytes]) -> None:
        require(len(frames) == 2, "{} frames of an answer", len(frames))
        answer = self._decoder.decode(frames[0])
        if pending.homes.get(answer.number) != home:
            return
        del pending.homes[answer.number]
        if answer.error:
            self._fail(f"replica {home} could not attend to its KV: {answer.error}", [home])
            return
        require_range("attending_us", answer.attending_us, 0, _MOST_ATTENDING_US)
        check_answer_tensors(answer.tensors, pending.division.parts[home], pending.shape)
        pending.attending_us[home] = answer.attending_us
        pending.answers[home] = unpacked(answer.tensors, frames[1], pending.device)


def _may_lack_answers(results: Iterable[torch.Tensor | None]) -> bool:
    """Tells whether an answer may have been lacking, by what has come out of layers."""
    there = [result for result in results if result is not None]
    return not there or any(bool(result.isnan().any()) for result in there)
