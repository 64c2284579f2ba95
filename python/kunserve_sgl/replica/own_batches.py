"""Takes the own batches of a rank through their layer hosts.

Executing for others is leaf work: it never waits for anybody. So a replica that waits for its own batch executes those
of others meanwhile, and there is no circle of waiting. Where layer hosts would idle, a batch goes in pieces that follow
each other. Every layer host executes the pieces in order: a request that goes on in the next piece finds there what the
one before has written.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import numpy as np

from kunserve_sgl.errors import KunserveError, TransientError
from kunserve_sgl.exchange.handover import Handover
from kunserve_sgl.exchange.peer_link import PeerLink
from kunserve_sgl.exchange.tensor_layout import Activations
from kunserve_sgl.exchange.work import Answer, RowUpdate, TurnKind, Work
from kunserve_sgl.policy.cutting import piece_sizes
from kunserve_sgl.policy.plan import Segment
from kunserve_sgl.replica.batch_shape import BatchShape
from kunserve_sgl.replica.held_plan import HeldPlan
from kunserve_sgl.replica.kv_writes import KvWrites
from kunserve_sgl.replica.layer_runner import Batch, LayerRunner, Output
from kunserve_sgl.replica.layer_times import LayerTimes
from kunserve_sgl.replica.orders_away import OrdersAway
from kunserve_sgl.replica.pieces import Piece, cut, join, whole_batch
from kunserve_sgl.replica.serving import ServingQueue
from kunserve_sgl.replica.time_spent import TimeSpent
from kunserve_sgl.replica.turns import Turns


class _Leg(NamedTuple):
    """Describes a way through other replicas: up to which segment of the route, whether it is the end of that, the
    segments, and their layer hosts, each once, in the order in which they are visited first."""

    until: int
    is_last: bool
    segments: tuple[Segment, ...]
    hosts: tuple[int, ...]


class OwnBatches:
    """Runs the own batches of one rank. It is called in the scheduler's thread, as SGLang calls its model runner."""

    def __init__(
        self,
        plan: HeldPlan,
        runner: LayerRunner,
        link: PeerLink,
        handover: Handover,
        turns: Turns,
        serving: ServingQueue,
        away: OrdersAway,
        times: LayerTimes,
        spent: TimeSpent,
        writes: KvWrites,
    ) -> None:
        self._plan = plan
        self._runner = runner
        self._link = link
        self._handover = handover
        self._turns = turns
        self._serving = serving
        self._away = away
        self._times = times
        self._spent = spent
        self._writes = writes
        self._replica = link.replica
        self._legs: tuple[tuple[Segment, ...], dict[int, _Leg]] = (), {}  # of the route, by where they begin
        # Whether long batches stop between layers for a transition, also where nobody else is served. Not on a GPU:
        # there a batch at home goes through captured graphs, and a step may wait for all that the device was given.
        # Not with several ranks, which begin a phase at the same boundary.
        self.stops_between_layers = runner.device.type == "cpu" and turns.ranks == 1
        # Called while an own batch is under way and no layer runs, after a look into the inbox.
        self.between_layers: Callable[[], None] = lambda: None
        self.sent = 0  # batches that had layers elsewhere
        self.pieces_sent = 0  # of these batches
        self.merged_s = 0.0  # that they took, where it was known what they would have taken at home, which is
        self.home_s = 0.0

    def forward(self, batch: Batch) -> Output:
        """Runs all layers on a batch, each at its layer host, and norm and logits here. Waits until the batch has come
        back, and executes others' segments meanwhile.

        Raises TransientError where the batch does not come back in time, and BatchCalledOffError where this replica is
        to recover from the death of one that it is merged with, or from the failure of a layer host or of a home of KV,
        of which the coordinator is told; HostFailedError or KvUnreachableError where it lets nobody recover.
        """
        started_s = time.perf_counter()
        # Where the own batch starts elsewhere it is sent first, so that the other layer host has work too.
        if self._plan.serves and self._is_here(self._plan.route[0]):
            self._serving.serve()
        others_s = self._serving.take_others_s()
        try:
            return self._forward(batch, others_s, started_s)
        except KunserveError as error:
            self._away.leave_failed(error, self._plan.is_pipelined)
            raise

    def _forward(self, batch: Batch, others_s: Sequence[float], started_s: float) -> Output:
        is_at_home = not self._plan.serves and not self._plan.is_pipelined
        if is_at_home and not self.stops_between_layers:
            return self._run_to_end(batch, None, 0)
        shape = self._runner.shape_of(batch)
        layers = self._runner.layer_count
        if is_at_home and self._times.slice_end(0, layers, shape) == layers:
            # With norm and logits, which take little beside all layers: nothing else has been measured before a merge.
            with self._times.measure(shape, layers):
                return self._run_to_end(batch, None, 0)
        sizes = self._piece_sizes(shape, others_s)
        if len(sizes) == 1:
            pieces = whole_batch(batch, shape, self._runner)
        else:
            pieces = cut(batch, shape, sizes, self._run(batch, None, 0, 0), self._runner)
        if self._plan.is_pipelined:
            self.sent += 1
            self.pieces_sent += len(pieces)
        output = self._lead(pieces) if self._turns.leads else self._follow(pieces)
        if output is None:
            output = self._run_to_end(batch, join(pieces, shape.tokens), self._runner.layer_count)
        if self._plan.is_pipelined and (cost := self._times.cost) is not None:
            self.merged_s += time.perf_counter() - started_s
            self.home_s += cost.seconds(shape.amount)
        return output

    def _piece_sizes(self, shape: BatchShape, others_s: Sequence[float]) -> tuple[int, ...]:
        """Returns the tokens of each piece, in order. Rank 0 decides, because the clocks of the ranks differ."""
        shares = self._plan.shares
        if len(shares) == 1:
            return (shape.tokens,)
        if not self._turns.leads:
            return self._turns.next().sizes
        sizes = piece_sizes(shape.amount, lambda: shape.chunks, self._times.cost, shares, others_s)
        self._turns.announce(TurnKind.CUT, sizes=sizes)
        return sizes

    def _lead(self, pieces: Sequence[Piece]) -> Output | None:
        """At rank 0: takes the pieces along the route in turn, and serves others in between and while all are away.
        Returns the output if the last layers have run here on the whole batch."""
        ready, away = deque(pieces), deque[Piece]()
        output = None
        while ready or away:
            self._away.leave_if_called_off()
            if ready:
                if (end := self._own_end(ready[0])) is not None:
                    piece = ready.popleft()
                    self._turns.announce(TurnKind.OWN, piece=piece.index, end=end)
                    output = self._advance(piece, end, is_whole=len(pieces) == 1)
                    if piece.order is not None:
                        away.append(piece)
                    elif piece.at < len(self._plan.route):
                        ready.appendleft(piece)
                if ready:
                    self._link.poll(0)
                    self.between_layers()
                    self._serving.serve_each()
            # Waits where there is nothing else to do, for the piece that was sent first.
            while away and (answer := self._answer_of(away[0], waits=not ready)) is not None:
                piece = away.popleft()
                self._receive(piece, answer)
                if piece.at < len(self._plan.route):
                    ready.append(piece)
        self._turns.announce(TurnKind.END)
        return output

    def _answer_of(self, piece: Piece, waits: bool) -> Answer | None:
        assert piece.order is not None
        if waits:
            return self._away.serve_until(piece.order, self.between_layers)
        return self._away.take_answer(piece.order)

    def _follow(self, pieces: Sequence[Piece]) -> Output | None:
        """At another rank: does what `_lead` does at rank 0, in the order that rank 0 announces."""
        output = None
        while (turn := self._turns.next()).kind is not TurnKind.END:
            if turn.kind is TurnKind.SERVE:
                self._serving.follow_turn(turn)
            else:
                self._wait_for(pieces[turn.piece])
                output = self._advance(pieces[turn.piece], turn.end, is_whole=len(pieces) == 1)
        for piece in pieces:
            self._wait_for(piece)
        return output

    def _wait_for(self, piece: Piece) -> None:
        if piece.order is not None:
            self._receive(piece, self._turns.answer_to(piece.order))

    def _own_end(self, piece: Piece) -> int | None:
        """Returns up to which layer the piece goes on now; None where it has to wait for another's long segment."""
        segment = self._plan.route[piece.at]
        if not self._is_here(segment):
            return segment.end
        start = max(piece.layer, segment.start)
        end = self._times.slice_end(start, segment.end, piece.shape)
        is_first_of_long = start == segment.start and end < segment.end
        return None if is_first_of_long and self._serving.has_begun_long else end

    def _advance(self, piece: Piece, end: int, is_whole: bool) -> Output | None:
        """Runs the layers that come next here, up to layer `end`, and sends the piece off if it has to go on elsewhere.
        Returns the output where the last layer has run on the whole batch."""
        segment = self._plan.route[piece.at]
        if not self._is_here(segment):
            if piece.state is None:
                piece.state = self._run(piece.batch, None, 0, 0)
            self._send(piece)
            return None
        start = max(piece.layer, segment.start)
        self._writes.note(piece.shape.slots, range(start, end))
        output = None
        if is_whole and end == self._runner.layer_count:
            output = self._run_to_end(piece.batch, piece.state, start)
        else:
            with self._times.measure(piece.shape, end - start):
                piece.state = self._run(piece.batch, piece.state, start, end)
        piece.layer = end
        self._serving.own_is_begun = end < segment.end
        if self._serving.own_is_begun:
            self._times.pace()
            return None
        piece.at += 1
        if piece.at < len(self._plan.route):
            self._send(piece)
        return output

    def _run(self, batch: Batch, state: Activations | None, start: int, end: int) -> Activations:
        with self._spent.on("own"):
            return self._runner.run_layers(batch, state, start, end)

    def _run_to_end(self, batch: Batch, state: Activations | None, start: int) -> Output:
        with self._spent.on("own"):
            return self._runner.run_to_end(batch, state, start)

    def _send(self, piece: Piece) -> None:
        """Sends the piece along the route, until it has to come back here."""
        assert piece.state is not None
        with self._spent.on("send"):
            shape, leg = piece.shape, self._leg(piece.at)
            piece.at = leg.until
            keep = None
            if leg.is_last and piece.keep is not None:
                piece.has_only_kept = True
                keep = piece.keep.astype(np.int32).tobytes()
            piece.order = self._away.add(leg.hosts)
            first = leg.hosts[0]
            try:
                tensors = self._handover.give(self._replica, first, piece.state, None, piece.place)
            except TransientError as error:
                # Not raised: other ranks may have sent theirs and go on. All leave the batch when it is called off.
                self._away.tell_of_failure(first, str(error))
                return
            work = Work(
                host=self._replica,
                owner=self._replica,
                batch=piece.order,
                epoch=self._plan.epoch,
                segments=leg.segments,
                mode=shape.mode,
                rows=shape.rows.tobytes(),
                lengths=shape.lengths.tobytes(),
                extends=b"" if shape.extends is None else shape.extends.tobytes(),
                slots=shape.slots.tobytes(),
                updates=self._row_updates(shape, leg.hosts),
                tensors=tensors,
                place=piece.place,
                keep=keep,
            )
            self._link.send(first, work)

    def _leg(self, at: int) -> _Leg:
        """Returns what a piece visits from segment `at` of the route on, until it has to come back here."""
        if self._legs[0] is not self._plan.route:
            self._legs = self._plan.route, {}
        route, legs = self._legs
        if at not in legs:
            until = next((i for i in range(at, len(route)) if self._is_here(route[i])), len(route))
            hosts = tuple(dict.fromkeys(segment.host for segment in route[at:until]))
            legs[at] = _Leg(until, until == len(route), route[at:until], hosts)
        return legs[at]

    def _row_updates(self, shape: BatchShape, hosts: Iterable[int]) -> tuple[RowUpdate, ...]:
        """Returns what the layer hosts `hosts` do not know yet of the batch's rows, beside its new slots."""
        updates = []
        for host in hosts:
            update = self._runner.rows.update_for(host, shape.rows, shape.lengths, shape.prefixes)
            if update is not None:
                starts, values = update
                updates.append(RowUpdate(host, starts.tobytes(), values.tobytes()))
        return tuple(updates)

    def _receive(self, piece: Piece, answer: Answer) -> None:
        """Takes over a piece that has come back."""
        self._away.close(answer)
        with self._spent.on("receive"):
            piece.state = self._handover.take(answer, piece.place)
            piece.order = None

    def _is_here(self, segment: Segment) -> bool:
        return segment.host == self._replica
