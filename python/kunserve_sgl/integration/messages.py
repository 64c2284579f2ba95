"""Messages between the HTTP server, the schedulers and the coordinator, sent over SGLang's own sockets."""

from __future__ import annotations

import enum
from array import array
from typing import Any

from sglang.srt.managers import io_struct
from sglang.srt.managers.io_struct import BaseReq, TokenizedGenerateReqInput

from kunserve_sgl.control.answers import Verdict


class Outcome(str, enum.Enum):
    """Says how a call ended at one replica."""

    DONE = "done"
    NOT_ADDRESSED = "not addressed"
    BAD_REQUEST = "bad request"
    CONFLICT = "conflict"
    BUSY = "busy"  # a conflict that may be over in a moment


class StatusCall(BaseReq, kw_only=True):  # type: ignore[call-arg, misc]
    """Asks every replica for its status."""

    call_id: int


class ResizeKvCall(BaseReq, kw_only=True):  # type: ignore[call-arg, misc]
    """Gives `frames` free frames of one replica to its KV cache, or takes -`frames` back."""

    call_id: int
    replica: int
    frames: int


class WritableCall(BaseReq, kw_only=True):  # type: ignore[call-arg, misc]
    """Asks every replica whether its parameters can be replaced now, with `flushes` together with its cache."""

    call_id: int
    flushes: bool


class CheckCall(BaseReq, kw_only=True):  # type: ignore[call-arg, misc]
    """Asks every replica whether what it has is what it should have. It answers some batches later, and `status` of its
    answer has `differences`, and the `epoch` of its plan."""

    call_id: int


class LoadSnapshotTold(BaseReq, kw_only=True):  # type: ignore[call-arg, misc]
    """Tells the HTTP server the load of a replica, as SGLang encodes it, where that cannot be written into shared
    memory of the head."""

    snapshot: bytes


class MetricsTold(BaseReq, kw_only=True):  # type: ignore[call-arg, misc]
    """Tells the HTTP server what a replica has counted, where that is on another machine: the changed files of
    prometheus_client, by their kind. `who` names the replica and which start of it."""

    who: str
    files: dict[str, bytes]


class ReplicaOrder(BaseReq, kw_only=True):  # type: ignore[call-arg, misc]
    """Carries what the coordinator said, encoded, from rank 0 of a replica to its other ranks."""

    payload: bytes


class ReplicaReply(BaseReq, kw_only=True):  # type: ignore[call-arg, misc]
    """Carries one replica's answer to any call. `status` is its status after the call."""

    call_id: int
    replica: int
    outcome: Outcome
    message: str
    status: dict[str, Any]


class Command(str, enum.Enum):
    """Names what the coordinator can be asked for."""

    STATUS = "status"
    PLAN = "plan"  # of a drop
    PLAN_RESTORE = "plan restore"
    DROP = "drop"
    RESTORE = "restore"
    LEND = "lend"
    PLAN_LEND = "plan lend"
    HOLD_EXCHANGE = "hold exchange"
    FREE_EXCHANGE = "free exchange"


class CoordinatorCall(BaseReq, kw_only=True):  # type: ignore[call-arg, misc]
    """Carries a command to the coordinator, in the data-parallel controller. `layers` are the layer hosts of a drop:
    one per layer, or that for some replicas; of a restore, the layers that come back at some replicas. `force` is for a
    restore, `lender` and `borrower` are of a loan of KV slots. `hold` is the number under which exchanges are held, for
    `hold_s` at most."""

    call_id: int
    command: Command
    groups: list[list[int]] | None = None
    layers: list[int] | dict[int, list[int]] | None = None
    tokens: int | None = None
    force: bool = False
    lender: int | None = None
    borrower: int | None = None
    hold: int = 0
    hold_s: float = 0.0


class CoordinatorReply(BaseReq, kw_only=True):  # type: ignore[call-arg, misc]
    """Carries the coordinator's answer, when the command has ended."""

    call_id: int
    verdict: Verdict
    body: dict[str, Any]


class ReplicasAlive(BaseReq, kw_only=True):  # type: ignore[call-arg, misc]
    """Tells the HTTP server that a replica has ended or is back, and which there are now; the controller sends it."""

    alive: list[int]


class RequestsLost(BaseReq, kw_only=True):  # type: ignore[call-arg, misc]
    """Tells the HTTP server which requests a replica had that has ended, by the names that it was sent, and why; with
    those of them that are in `begun` it had begun. `can_go_on` where another one serves, or will. The controller sends
    it."""

    names: list[str]
    begun: list[str]
    reason: str
    can_go_on: bool


class RequestWaited(BaseReq, kw_only=True):  # type: ignore[call-arg, misc]
    """Tells the HTTP server for how long a request has waited for room, by the name that it was sent. The controller
    sends it when the request waits no more, so that it does not wait as long again where its replica loses it, or gives
    it back."""

    name: str
    waited_s: float


class RequestsReturned(BaseReq, kw_only=True):  # type: ignore[call-arg, misc]
    """Gives requests back to the HTTP server, by the names that the replica was sent: for now it has room for less of
    their answers than at its start, and says so in `reason`. It sends nothing more of them."""

    names: list[str]
    reason: str


class RequestsEnded(BaseReq, kw_only=True):  # type: ignore[call-arg, misc]
    """Tells the controller which requests have been answered, by the names that their replicas know; the HTTP server
    sends it."""

    names: list[str]


class ContinuedGenerateReqInput(TokenizedGenerateReqInput, kw_only=True):  # type: ignore[call-arg, misc]
    """Carries a request that another replica had, with the tokens that the HTTP server has got, if any. Everything else
    is as it was for the first one, `max_new_tokens` too. One that `was_returned` goes where there is as much room as a
    replica has at its start; one that `has_waited` in vain for room takes what there is, also if no replica had it. It
    has waited for room for `waited_s` before."""

    output_ids: array  # type: ignore[type-arg]  # of int64
    cached_tokens: int
    cached_tokens_details: dict[str, Any] | None
    was_returned: bool = False
    has_waited: bool = False
    waited_s: float = 0.0

    @classmethod
    def of(cls, request: TokenizedGenerateReqInput, **fields: Any) -> ContinuedGenerateReqInput:
        """Makes one of what was sent first, with no tokens of its answer, but for `fields`."""
        sent = {name: getattr(request, name) for name in TokenizedGenerateReqInput.__struct_fields__}
        so_far = {"output_ids": array("q"), "cached_tokens": 0, "cached_tokens_details": None}
        return cls(**sent | so_far | fields)


CALLS = (StatusCall, ResizeKvCall, WritableCall, CheckCall, CoordinatorCall)
io_struct.hook_custom_types(
    *(*CALLS, LoadSnapshotTold, MetricsTold, ReplicaOrder, ReplicaReply, CoordinatorReply, ReplicasAlive),
    *(RequestsLost, RequestWaited, RequestsReturned, RequestsEnded, ContinuedGenerateReqInput),
)
