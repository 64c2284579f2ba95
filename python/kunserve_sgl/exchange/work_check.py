"""What a rank believes of its peers: every field of every message between the layer hosts of a batch is bounded, and a
peer can name only what is its own. A message that fails is ignored as a whole.

A batch's message is checked in some ten microseconds: arrays as a whole, nothing per token.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from kunserve_sgl.errors import InvariantError
from kunserve_sgl.exchange.tensor_layout import packed_bytes
from kunserve_sgl.exchange.work import Answer, CopySlots, Have, Message, TensorNote, Turn, Work
from kunserve_sgl.memory.slot_space import SlotRange
from kunserve_sgl.wire.rejections import BadMessageError, Sender, require, require_count, require_range

MOST_NUMBER = 1 << 53  # of batches and epochs
MOST_ERROR = 10_000  # characters; who sends a longer one cuts it
_MOST_TENSORS = 16
_MOST_NAME = 64
_MOST_DIMENSIONS = 8
_MOST_PIECES = 1024
_MOST_RANKS = 1024
_MOST_STEPS = 64  # that are remembered: those of a few owners, and of pieces

Integers = npt.NDArray[np.integer]

# Of arrays that are not empty. The methods of arrays do the same at twice the price.
_least, _most = np.minimum.reduce, np.maximum.reduce


@dataclass(frozen=True, slots=True)
class Limits:
    """Says what there is in the deployment. `rows[r]` and `slots[r]` are those of replica r, `row_width` the entries of
    a row, `decode` and `extend` the modes that a batch can have."""

    replicas: int
    layers: int
    rows: Sequence[range]
    slots: Sequence[SlotRange]
    row_width: int
    most_tensor_bytes: int
    decode: int
    extend: Collection[int]


class WorkCheck:
    """Checks messages for the rank `rank` of `replica`. `hosts_of(batch)` are the layer hosts that have the own batch
    of that number, `serves()` says whether others have layers executed here, and `least_epoch()`
    by which plan the earliest that may still do so."""

    def __init__(
        self,
        replica: int,
        rank: int,
        limits: Limits,
        hosts_of: Callable[[int], Collection[int]],
        serves: Callable[[], bool],
        least_epoch: Callable[[], int],
    ) -> None:
        self._serves = serves
        self._least_epoch = least_epoch
        self._replica = replica
        self._rank = rank
        self._limits = limits
        self._hosts_of = hosts_of
        # What was believed last: from step to step of a batch it stays the same.
        self._steps: dict[tuple[int, int], object] = {}  # of decode steps, by owner and place
        self._tensors: tuple[TensorNote, ...] = ()  # of answers

    def check(self, message: Message, sender: Sender) -> None:
        """Raises BadMessageError for a message to ignore."""
        if isinstance(message, Turn):
            require(self._rank > 0 and sender in (None, (self._replica, 0)), "turns come from rank 0, not {}", sender)
            self._check_turn(message)
            return
        if isinstance(message, Have):
            is_own = self._rank == 0 and sender in (None, (self._replica, message.rank))
            require(is_own, "what rank {} has is for rank 0 of its replica, and came from {}", message.rank, sender)
            self._check_have(message)
            return
        peer = message.owner if isinstance(message, CopySlots) else message.host
        require_range("replica", peer, 0, self._limits.replicas - 1)
        require_range("owner", message.owner, 0, self._limits.replicas - 1)
        require_range("batch", message.batch, 0, MOST_NUMBER)
        require(peer != self._replica, "it is from this replica")
        require(sender in (None, (peer, self._rank)), "it came from {}, and speaks for replica {}", sender, peer)
        if isinstance(message, Answer):
            self._check_answer(message)
            return
        require(message.owner != self._replica, "this replica is its owner")
        # Else it would wait here, and be executed when replicas merge. All members serve before the first one sends.
        require(self._serves(), "nobody has layers here")
        # One who was given up while nobody reached it may have sent something before, which comes when somebody does.
        require_range("epoch", message.epoch, self._least_epoch(), MOST_NUMBER)
        if isinstance(message, Work):
            self._check_work(message)
        else:
            self._check_copy(message)

    def _check_work(self, work: Work) -> None:
        lengths, slots = _int32s(work.lengths), _int64s(work.slots)
        require(
            len(work.rows) == len(work.lengths) > 0,
            "{} bytes of rows, {} of lengths",
            len(work.rows),
            len(work.lengths),
        )
        _require_within("lengths", lengths, 1, self._limits.row_width + 1)
        step, key = None, (work.owner, work.place)
        if work.mode == self._limits.decode:
            step = work.segments, work.rows, work.extends, work.tensors, work.keep
        if step is None or step != self._steps.get(key):
            self._check_kind(work, lengths)
            if step is not None:
                if len(self._steps) >= _MOST_STEPS:
                    self._steps.clear()
                self._steps[key] = step
        self._require_slots("slots", slots, work.owner)
        tokens = len(lengths) if step is not None else int(np.add.reduce(_int32s(work.extends), dtype=np.int64))
        require(len(slots) == tokens, "{} slots for {} tokens", len(slots), tokens)
        self._check_updates(work, lengths)

    def _check_kind(self, work: Work, lengths: Integers) -> None:
        """Checks what is the same in each step of a batch that decodes, and all that only others have."""
        limits = self._limits
        self._check_segments(work)
        own = limits.rows[work.owner]
        _require_within("rows", _int32s(work.rows), own.start, own.stop)
        if work.mode == limits.decode:
            tokens = len(lengths)
            require(not work.extends, "a decode step that extends")
        else:
            extends = _int32s(work.extends)
            require(work.mode in limits.extend and len(extends) == len(lengths), "mode {}", work.mode)
            require(_least(extends) >= 1 and bool((extends <= lengths).all()), "more new tokens than a request has")
            tokens = int(np.add.reduce(extends, dtype=np.int64))
        self._check_tensors(work.tensors)
        require_range("place", work.place, 0, limits.most_tensor_bytes)
        if work.keep is not None:
            keep = _int32s(work.keep)
            require(len(keep) <= tokens, "{} of {} tokens to keep", len(keep), tokens)  # a piece may have none
            _require_within("keep", keep, 0, tokens)

    def _check_segments(self, work: Work) -> None:
        require(0 < len(work.segments) <= self._limits.layers, "{} segments", len(work.segments))
        require(work.segments[0].host == self._replica, "it is for replica {}", work.segments[0].host)
        at = work.segments[0].start
        for segment in work.segments:
            require_range("host", segment.host, 0, self._limits.replicas - 1)
            require(segment.host != work.owner, "a segment at its owner")
            require(
                0 <= at == segment.start < segment.end <= self._limits.layers,
                "layers {} to {}",
                segment.start,
                segment.end,
            )
            at = segment.end

    def _check_updates(self, work: Work, lengths: Integers) -> None:
        """Checks only what is for this layer host: the others look at theirs."""
        require_count("updates", work.updates, self._limits.replicas)
        own = [update for update in work.updates if update.host == self._replica]
        require(len(own) <= 1, "{} updates of the rows here", len(own))
        if not own:
            return
        starts, values = _int32s(own[0].starts), _int32s(own[0].values)
        require(len(starts) == len(lengths), "updates of {} rows", len(starts))
        counts = lengths - starts
        require(_least(starts) >= 0 and _least(counts) >= 0, "updates behind the end of a row")
        require(len(values) == int(np.add.reduce(counts, dtype=np.int64)), "{} values of an update", len(values))
        self._require_slots("values of an update", values, work.owner)

    def _check_copy(self, copy: CopySlots) -> None:
        sources, targets = _int64s(copy.sources), _int64s(copy.targets)
        require(len(sources) == len(targets), "{} sources of {} targets", len(sources), len(targets))
        for what, slots in (("sources", sources), ("targets", targets)):
            self._require_slots(what, slots, copy.owner)

    def _check_answer(self, answer: Answer) -> None:
        require(answer.owner == self._replica, "the batch is replica {}'s", answer.owner)
        require(answer.host in self._hosts_of(answer.batch), "batch {} is not there", answer.batch)
        if answer.tensors != self._tensors:
            self._check_tensors(answer.tensors)
            self._tensors = answer.tensors
        require_count("characters of an error", answer.error, MOST_ERROR)

    def _check_turn(self, turn: Turn) -> None:
        require_range("owner", turn.owner, -1, self._limits.replicas - 1)
        require_range("batch", turn.batch, -1, MOST_NUMBER)
        require_range("piece", turn.piece, -1, _MOST_PIECES)
        require_range("end", turn.end, -1, self._limits.layers)
        require_count("pieces", turn.sizes, _MOST_PIECES)
        for size in turn.sizes:
            require_range("tokens of a piece", size, 1, 1 << 31)

    def _check_have(self, have: Have) -> None:
        require_range("rank", have.rank, 1, _MOST_RANKS)
        require_range("owner", have.owner, 0, self._limits.replicas - 1)
        require_range("batch", have.batch, 0, MOST_NUMBER)
        require_range("start", have.start, -2, self._limits.layers)
        require_count("characters of an error", have.error, MOST_ERROR)

    def _check_tensors(self, notes: tuple[TensorNote, ...]) -> None:
        require_count("tensors", notes, _MOST_TENSORS)
        for note in notes:
            require_count("characters of a name", note.name, _MOST_NAME)
            require_count("dimensions", note.shape, _MOST_DIMENSIONS)
            for size in note.shape:
                require_range("a dimension", size, 0, self._limits.most_tensor_bytes)
        try:
            size_bytes = packed_bytes(notes)
        except InvariantError as error:
            raise BadMessageError(str(error)) from error
        require_range("bytes of tensors", size_bytes, 0, self._limits.most_tensor_bytes)

    def _require_slots(self, what: str, slots: Integers, owner: int) -> None:
        """Requires the owner's own slots, or slot 0, where tokens write that nobody reads."""
        own = self._limits.slots[owner]
        if len(slots) and (_least(slots) < own.first or _most(slots) >= own.stop):
            _require_within(what, slots[slots != 0], own.first, own.stop)


def _require_within(what: str, values: Integers, start: int, stop: int) -> None:
    if len(values) and not (start <= _least(values) and _most(values) < stop):
        raise BadMessageError(f"{what} outside [{start}, {stop})")


def _int32s(data: bytes) -> Integers:
    require(len(data) % 4 == 0, "{} bytes of int32", len(data))
    return np.frombuffer(data, np.int32)


def _int64s(data: bytes) -> Integers:
    require(len(data) % 8 == 0, "{} bytes of int64", len(data))
    return np.frombuffer(data, np.int64)
