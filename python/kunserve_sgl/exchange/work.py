"""Messages between the layer hosts of a batch: what to execute, and that it is done.

A batch, or a piece of one, visits its layer hosts in turn and is at one place at a time. Its activations lie in a
buffer of its owner that all members of the group map, or are sent along; these messages say who has them next. Arrays
travel as the bytes of int32 or int64.
"""

from __future__ import annotations

import enum

import msgspec

from kunserve_sgl.policy.plan import Segment


class RowUpdate(msgspec.Struct, frozen=True, array_like=True):
    """Says what layer host `host` does not know yet of the batch's request rows: of row i, positions [starts[i],
    lengths[i]) hold the next `lengths[i] - starts[i]` of `values`. Both are int32. A layer host without an update lacks
    at most the slots of the batch's new tokens, which are the last ones of each row."""

    host: int
    starts: bytes
    values: bytes


class TensorNote(msgspec.Struct, frozen=True, array_like=True):
    """Describes a tensor that is passed on: tensors lie one behind the other in the order of their notes."""

    name: str
    dtype: str
    shape: tuple[int, ...]


class Work(msgspec.Struct, frozen=True, array_like=True, tag="work"):
    """Asks a layer host to execute `segments[0]`, which is its own, and then to pass the rest on, or to answer the
    owner where none is left.

    `host` is who sends this. rows, lengths: int32[requests]; extends: int32[requests], empty for decode; slots:
    int64[tokens], where the new KV goes. `place`: where its part of the owner's buffer begins, in bytes. `keep`: int32
    indices of the tokens that the owner needs back, None for all of them.
    """

    host: int
    owner: int
    batch: int
    epoch: int
    segments: tuple[Segment, ...]
    mode: int
    rows: bytes
    lengths: bytes
    extends: bytes
    slots: bytes
    updates: tuple[RowUpdate, ...]
    tensors: tuple[TensorNote, ...]
    place: int
    keep: bytes | None


class CopySlots(msgspec.Struct, frozen=True, array_like=True, tag="copy"):
    """Asks a layer host to copy the KV of `sources` to `targets`, int64[n] each and disjoint, in the layers that it
    hosts for `owner`, and then to answer."""

    owner: int
    batch: int
    epoch: int
    sources: bytes
    targets: bytes


class Answer(msgspec.Struct, frozen=True, array_like=True, tag="answer"):
    """Says that the batch is back at its owner. `error` is empty, or says why it could not be executed."""

    host: int
    owner: int
    batch: int
    tensors: tuple[TensorNote, ...]
    error: str


class TurnKind(int, enum.Enum):
    """Names what rank 0 announces; see `Turn`."""

    SERVE = 0
    END = 1
    CUT = 2
    OWN = 3
    LEAVE = 4
    CALL_OFF = 5


class Turn(msgspec.Struct, frozen=True, array_like=True, tag="turn"):
    """Tells the other ranks of a replica what comes next there, so that all take the same order; rank 0 sends it.

    SERVE is the order `batch` of `owner`; END goes on with what was interrupted; CUT cuts the own batch into pieces of
    `sizes` tokens; OWN goes on with piece `piece` of the own batch; LEAVE gives that up; CALL_OFF says
    in the middle of layers that no answers about remote KV are waited for any more, and is no turn. What is executed
    goes on up to layer `end`.
    """

    kind: TurnKind
    owner: int = -1
    batch: int = -1
    piece: int = -1
    end: int = -1
    sizes: tuple[int, ...] = ()


class Have(msgspec.Struct, frozen=True, array_like=True, tag="have"):
    """Tells rank 0 that another rank of its replica has received an order or an answer about the batch `batch` of
    `owner`: a segment that begins with layer `start`, or what `rank_agreement` says. `error` is that of an answer."""

    rank: int
    owner: int
    batch: int
    start: int
    error: str = ""


PeerOrder = Work | CopySlots  # what a replica asks of another; a transition has orders of its own, of the coordinator
Message = Work | CopySlots | Answer | Turn | Have
