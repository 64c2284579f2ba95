"""What the coordinator and the replicas send each other over ZMQ: msgspec structs, no pickle.

Every tensor-parallel rank of every replica has an inbox of its own and talks to the coordinator itself; what the
coordinator says goes to rank 0 of a replica, which passes it on, so that all ranks act at the same batch boundary.
"""

from __future__ import annotations

import enum
import os

import msgspec

from kunserve_sgl.args import Activations
from kunserve_sgl.policy.demand import ReplicaLoad
from kunserve_sgl.policy.plan import ParameterLoan, Plan, ReplicaFacts

# Characters of an order's reply; a reason that is longer is cut.
MOST_REASON = 10_000


class Phase(str, enum.Enum):
    """Names the steps of a transition, in order; see `policy.plan.ReplicaSteps`. All members finish one before the next
    begins. The last three are those of a recovery."""

    PREPARE = "prepare"
    LOAD = "load"
    SWITCH = "switch"
    RELEASE = "release"
    RESUME = "resume"
    # The way back, possible until the first RELEASE. Three phases, each finished by all members before the next: first
    # everybody takes the old route, then memory is as before, then lenders end their loans and slots are open again.
    REVERT = "revert"
    UNDO = "undo"
    REOPEN = "reopen"
    # Of a recovery, which begins in any state: see `control.recovery`.
    ABANDON = "abandon"
    RELOAD = "reload"
    REVIVE = "revive"


class Result(str, enum.Enum):
    """Says how an order ended at one rank."""

    APPLIED = "applied"
    REFUSED = "refused"
    STALE = "stale"


class Device(msgspec.Struct, frozen=True):
    """Says where the memory of a rank is that others map. `gpu` is the UUID of its GPU, empty on a CPU and where all
    memory is used by messages; `reaches` are those of the other GPUs whose memory that one can read and write.
    `machine` is the same where descriptors can be passed on; empty where that is so for all, and where none are."""

    gpu: str = ""
    reaches: tuple[str, ...] = ()
    machine: str = ""

    def maps(self, other: Device) -> bool:
        """Tells whether each of the two can map the other's memory."""
        has_access = self.gpu == other.gpu or (other.gpu in self.reaches and self.gpu in other.reaches)
        return self.machine == other.machine and has_access


class Hello(msgspec.Struct, frozen=True, tag="hello"):
    """Reports a rank for duty, once the model and the KV cache are in memory; again whenever that changes, after POST
    /kunserve/kv or an update of the weights. `checksums[i]` is that of this rank's parameters of layer i, and
    `rest_checksum` that of what it has beside the layers. A batch of it has `most_requests` requests and `most_tokens`
    tokens at most. `memory_address` is where memory of it is used by messages, empty where the address is known by the
    rank's number. `incarnation` counts the starts of the replica before this one."""

    replica: int
    rank: int
    address: str
    frame_address: str
    facts: ReplicaFacts
    checksums: tuple[str, ...] = ()
    device: Device = Device()
    most_requests: int = 1
    most_tokens: int = 1
    incarnation: int = 0
    rest_checksum: str = ""
    pid: int = msgspec.field(default_factory=os.getpid)
    memory_address: str = ""


class Wanting(msgspec.Struct, frozen=True, tag="wanting"):
    """A rank that is started again wants the parameters of all layers to be offered where it takes offers; or nothing
    any more, when it `is_done`. It has not reported for duty yet."""

    replica: int
    rank: int
    device: Device = Device()
    is_done: bool = False
    incarnation: int = 0
    memory_address: str = ""


class Welcome(msgspec.Struct, frozen=True, tag="welcome"):
    """Tells where everybody is; sent to each replica when all have reported. `inboxes[r][k]` and
    `frame_addresses[r][k]` belong to rank k of replica r. Sent again to those who do not know the plan: it has come
    about by a transition that they were no members of, or by new facts of some replica. And again to all members before
    the first order of a transition, which must begin with the plan that holds. `incarnations[r]` is that of replica r:
    what is known of another one of it is to be forgotten. `activations` says how those are handed over, MAPPED or
    COLLECTIVE, and stays. `memory_addresses` are as `frame_addresses`, and as in `Hello`. `maps[r]` says whether memory
    of replica r and of the one to which this is sent is mapped; empty where it is the same for all, as the flags
    say."""

    inboxes: tuple[tuple[str, ...], ...]
    frame_addresses: tuple[tuple[str, ...], ...]
    incarnations: tuple[int, ...]
    plan: Plan
    activations: Activations = Activations.MAPPED
    memory_addresses: tuple[tuple[str, ...], ...] = ()
    maps: tuple[bool, ...] = ()


class Order(msgspec.Struct, frozen=True, tag="order"):
    """Carry out one phase of the transition `transition` from plan `old_epoch` to `plan`, within `timeout_s`. `forces`
    lets requests that are in the way of slots which go give up theirs, where else they are waited for.

    The same message for every phase, so that a rank that missed one can say so. A recovery has a number as a transition
    has; it leaves whatever plan a rank follows, and `members` are those who recover. In its RELOAD, `loans` say who
    lends which parameters to whom, and `lend_timeout_s` how long a borrower waits for them."""

    transition: int
    phase: Phase
    old_epoch: int
    plan: Plan
    timeout_s: float
    loans: tuple[ParameterLoan, ...] = ()
    lend_timeout_s: float = 0.0
    forces: bool = False
    members: tuple[int, ...] = ()


class LayerLoan(msgspec.Struct, frozen=True):
    """Names layers whose parameters `borrower`, which is `incarnation`, may read. `memory_addresses` are those of its
    ranks, as in `Hello`; `maps` says whether it maps them, where that differs."""

    borrower: int
    incarnation: int
    layers: tuple[int, ...]
    memory_addresses: tuple[str, ...] = ()
    maps: bool = False


class Lend(msgspec.Struct, frozen=True, tag="lend"):
    """Lend parameters to others, whatever else is under way, in place of what was lent under the same `number`; nothing
    any more where `loans` is empty. Nobody waits for an answer."""

    number: int
    loans: tuple[LayerLoan, ...] = ()


class Resize(msgspec.Struct, frozen=True, tag="resize"):
    """Give so many free frames to the KV cache of a replica that shares memory with nobody, or free so many of its
    frames where negative. A rank that has done so reports its new memory (`Hello`); else it says why not."""

    number: int
    frames: int


class ResizeRefused(msgspec.Struct, frozen=True, tag="resize_refused"):
    """Rank 0 of a replica says why the KV cache stays as it is after the `Resize` of that number."""

    replica: int
    number: int
    reason: str
    incarnation: int = 0


class ReadSpeeds(msgspec.Struct, frozen=True):
    """Says how fast a rank reads its own memory, and what `owner` has lent it, in bytes per second. Single measurements
    differ by the share `noise` from these."""

    owner: int
    own: float
    borrowed: float
    noise: float


class LinkSpeed(msgspec.Struct, frozen=True, tag="link"):
    """A rank says how fast memory of the same rank of replica `peer`, which is `peer_incarnation`, comes to it by
    messages, in bytes per second."""

    replica: int
    rank: int
    peer: int
    peer_incarnation: int
    bytes_per_second: float
    incarnation: int = 0


class OrderReply(msgspec.Struct, frozen=True, tag="order_reply"):
    """Answers an order, for one rank. `pause_s` is the time this phase kept its scheduler from running batches;
    `freed_bytes` what became free by dropping parameters in this phase, `extension_slots` what its allocator gained in
    it. After ABANDON, `resident` are the layers whose parameters are there, ascending. `reads` is what was measured in
    PREPARE, of owners that had not been measured before."""

    transition: int
    phase: Phase
    replica: int
    rank: int
    result: Result
    reason: str = ""
    pause_s: float = 0.0
    longest_pause_s: float = 0.0
    freed_bytes: int = 0
    extension_slots: int = 0
    resident: tuple[int, ...] = ()
    reads: tuple[ReadSpeeds, ...] = ()


class LoadReport(msgspec.Struct, frozen=True, tag="load"):
    """Rank 0 of a replica says how much its requests need, and what has gone through the pipeline since the start.

    `remote_tokens` are KV tokens, of requests and of the radix cache, that are attended to by messages or through
    mapped memory: those in slots of which a layer has its KV elsewhere than where it runs."""

    replica: int
    load: ReplicaLoad
    batches_sent: int = 0
    batches_served: int = 0
    remote_tokens: int = 0
    incarnation: int = 0


class Waiting(msgspec.Struct, frozen=True, tag="waiting"):
    """Rank 0 of a replica says, again and again, that a batch of it has not come back from the layer hosts `hosts`,
    which it visits in that order, for `waited_s`."""

    replica: int
    hosts: tuple[int, ...]
    waited_s: float
    incarnation: int = 0


class HostFailed(msgspec.Struct, frozen=True, tag="host_failed"):
    """A rank says that layer host `host` could not execute a batch of it, or that activations to or from `host` were
    lost, and why. Who knows what was written: it can go on only as a replica by itself."""

    replica: int
    rank: int
    host: int
    reason: str
    incarnation: int = 0


ToCoordinator = Hello | OrderReply | LoadReport | Waiting | Wanting | HostFailed | ResizeRefused | LinkSpeed
FromCoordinator = Welcome | Order | Lend | Resize
