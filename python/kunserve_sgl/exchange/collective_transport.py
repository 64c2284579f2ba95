"""Activations sent from replica to replica by NCCL, or by gloo on a CPU, instead of through a mapped buffer.

Both ends of a transfer are the same rank of two replicas. There is a group, and with NCCL a communicator and a stream,
for each direction: a communicator works in the order of its calls, so two replicas that both send first would wait for
each other on a common one. Messages over ZMQ stay what says who does what; their `TensorNote`s tell a receiver what
comes, and a receiver begins to receive from a peer in the order in which that peer sent, when the message is there.

When to prefer it to the mapped buffer (`exchange/activations.py`):

- The mapped buffer needs GPUs with access to each other's memory. NCCL also goes through the CPU's memory.
- Handing a place of the buffer over makes the writer wait until its GPU has written. A send is put behind the
  computation in a stream, and any number may be under way, so computation goes on beside transfers.
- On a CPU, the mapped buffer: a transfer by gloo goes through the kernel and two threads, the buffer is one copy.
- Replicas on one GPU: the mapped buffer. NCCL cannot send between them, and refuses.

What NCCL costs: two communicators per peer, of GPU memory too, that nothing accounts for; and a transfer occupies part
of the GPU from when it is put on the stream until its other end is. From a send until the peer's receive, whoever waits
for the whole device waits for the peer; if the peer does so too, with a send the other way, both hang until torch ends
them. Against that:

- A receive is put on its stream when the message of the send has come, not when it is needed, and a rank looks for
  messages before each step of a transition.
- KunServe waits for streams, not for the device: sends have streams of their own, which nothing waits for.
- CUDA loads all kernels at start (`integration/attach/process.py`): loading one later waits for the device.

What is left is what the driver waits for by itself, as it may when memory is unmapped or freed, in the time that a
message takes; and making a communicator while batches are under way, where merged replicas merge with further ones.
None of it was ever run on GPUs.

What is bounded, and how: connecting by its deadline. A transfer fails when its peer dies or disconnects, as gloo
reports at once, and NCCL for most ends; else after `timeout_s`, counted from when it was begun or, with gloo, the one
before it had come. `Expected.has_come` and the next call for the same peer and direction raise that. A batch is not
begun before `has_come` (`exchange/peer_link.py`), so that neither a thread nor a stream waits for a peer: with NCCL a
stream could be freed only by `disconnect`, for which the process has to be in its loop. What that costs is the time
from the end of a transfer to the launch of what uses it. If a stream waits nevertheless, torch ends the process after
twice `timeout_s`. What was received before a TransientError from the same peer may be undefined: drop the batch.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import timedelta

import torch
from torch._C._distributed_c10d import PrefixStore, Store

from kunserve_sgl.errors import InvariantError, TransientError
from kunserve_sgl.exchange.collective_groups import BackendName, DirectedGroups, GroupMaker
from kunserve_sgl.exchange.collective_lanes import (
    Arrival,
    GlooReceiveLane,
    GlooSendLane,
    NcclReceiveLane,
    NcclSendLane,
    ReceiveLane,
    SendLane,
)
from kunserve_sgl.exchange.tensor_layout import Activations, notes_of, pack, packed_bytes, unpack
from kunserve_sgl.exchange.work import TensorNote
from kunserve_sgl.wire.store_messages import rank_prefix


@dataclass(frozen=True)
class _Lanes:
    outgoing: SendLane
    incoming: ReceiveLane


class Expected:
    """Is a set of named tensors that a peer has sent."""

    def __init__(self, notes: Sequence[TensorNote], arrival: Arrival | None, device: torch.device) -> None:
        """`arrival` is None where the tensors have no elements."""
        self._notes = notes
        self._arrival = arrival
        self._device = device

    def has_come(self) -> bool:
        """Tells whether all of it is here, and waits for nobody. Raises TransientError where it does not come in time,
        or the connection is gone."""
        return self._arrival is None or self._arrival.has_come()

    def take(self) -> Activations:
        """Returns the tensors, which the current stream may use. They lie in one piece of memory, which the last of
        them keeps. It may be called once. Raises TransientError where they do not come in time or the connection is
        gone."""
        if self._arrival is None:
            return unpack(self._notes, torch.empty(0, dtype=torch.uint8, device=self._device))
        return unpack(self._notes, self._arrival.take())


class CollectiveTransport:
    """Sends and receives named tensors. One thread uses it; `close` may come from another, and so may `connect`, one
    call at a time and for peers that nothing is sent to meanwhile."""

    def __init__(
        self,
        store: Store,
        replica: int,
        rank: int,
        *,
        backend: BackendName,
        device: torch.device,
        timeout_s: float,
        incarnation: int = 0,
        host: str = "127.0.0.1",
    ) -> None:
        """Connects to nobody yet. `store` is where the ranks of all replicas find each other: a file in the server's
        private directory, or that of the coordinator. `timeout_s` bounds `connect` and each transfer, `incarnation` is
        this replica's, `host` the address of this machine that gloo binds. Raises ConfigurationError where the backend
        does not fit the device."""
        self._replica = replica
        self._backend = backend
        self._device = device
        self._timeout_s = timeout_s
        self._store = store  # torch keeps only its part of one that is made in Python
        store.set_timeout(timedelta(seconds=timeout_s))
        self._maker = GroupMaker(
            PrefixStore(rank_prefix(rank), store),
            replica,
            backend=backend,
            device=device,
            timeout_s=timeout_s,
            incarnation=incarnation,
            host=host,
        )
        self._lanes: dict[int, _Lanes] = {}
        self._closed = False

    @property
    def peers(self) -> frozenset[int]:
        """Names the replicas that are connected."""
        return frozenset(self._lanes)

    def connect(
        self,
        peers: Iterable[int],
        timeout_s: float | None = None,
        is_cancelled: Callable[[], bool] = lambda: False,
    ) -> None:
        """Makes the lanes to and from `peers`, each of which names this replica in a call of its own; those that are
        connected already cost nothing. The order does not matter: pairs are made in the same order everywhere.

        Raises TransientError when a peer has not joined in after `timeout_s` (that of the transport, if it is not
        given) or soon after `is_cancelled` says so, ConfigurationError for one that never can. Those that were
        connected by then stay connected, and a later call makes the rest.
        """
        deadline_s = time.monotonic() + (self._timeout_s if timeout_s is None else timeout_s)
        pairs = sorted((min(self._replica, peer), max(self._replica, peer), peer) for peer in set(peers))
        for _, _, peer in pairs:
            if peer == self._replica:
                raise InvariantError(f"replica {peer} is to send activations to itself")
            if peer in self._lanes:
                continue
            self._require_open()
            self._lanes[peer] = self._make_lanes(peer, self._maker.make(peer, deadline_s, is_cancelled))
            if self._closed:  # meanwhile
                self.disconnect([peer])

    def expect_incarnation(self, peer: int, incarnation: int) -> None:
        """Connects to this incarnation of `peer` from now on; it is disconnected."""
        self._maker.incarnations[peer] = incarnation

    def disconnect(self, peers: Iterable[int]) -> None:
        """Ends what is under way to and from `peers`, at their side too. Both sides do this before they connect
        again. Those that are not connected are ignored."""
        for peer in set(peers):
            lanes = self._lanes.pop(peer, None)
            if lanes is not None:
                lanes.outgoing.abort()
                lanes.incoming.abort()

    def close(self) -> None:
        """Ends all that is under way: a receive that waits raises TransientError. Closing twice is allowed."""
        self._closed = True
        self.disconnect(tuple(self._lanes))

    def send(self, to: int, tensors: Activations, keep: torch.Tensor | None = None) -> tuple[TensorNote, ...]:
        """Sends the tensors, of each only the rows `keep` where that is given, int64[n]; float32, bfloat16 or float16.

        Waits for nobody. The tensors are copied, on a GPU in the order of the current stream, so that they may be
        written over. What has no elements is not sent. The notes are for the peer's `expect`. Raises TransientError
        where the connection is gone or what was sent before is overdue.
        """
        lanes = self._lanes_of(to)
        notes = notes_of(tensors, keep)
        size_bytes = packed_bytes(notes)
        if size_bytes:
            message = torch.empty(size_bytes, dtype=torch.uint8, device=self._device)
            pack(tensors, keep, message)
            lanes.outgoing.send(message)
        return notes

    def expect(self, source: int, notes: Sequence[TensorNote]) -> Expected:
        """Begins to receive what `source` sent under `notes`, which are the oldest of its notes that were not expected
        yet. Waits for nobody. Raises TransientError where the connection is gone."""
        lanes = self._lanes_of(source)
        size_bytes = packed_bytes(notes)
        return Expected(notes, lanes.incoming.post(size_bytes) if size_bytes else None, self._device)

    def _lanes_of(self, peer: int) -> _Lanes:
        self._require_open()
        lanes = self._lanes.get(peer)
        if lanes is None:
            raise TransientError(f"replica {self._replica} is not connected to replica {peer} for activations")
        return lanes

    def _require_open(self) -> None:
        if self._closed:
            raise TransientError(f"replica {self._replica} has closed its connections for activations")

    def _make_lanes(self, peer: int, groups: DirectedGroups) -> _Lanes:
        sending = f"activations to replica {peer}"
        receiving = f"activations from replica {peer}"
        if self._backend == "gloo":
            return _Lanes(
                GlooSendLane(groups.outgoing, sending, self._timeout_s),
                GlooReceiveLane(groups.incoming, receiving, self._timeout_s),
            )
        return _Lanes(
            NcclSendLane(groups.outgoing, sending, self._timeout_s),
            NcclReceiveLane(groups.incoming, receiving, self._timeout_s, self._device),
        )
