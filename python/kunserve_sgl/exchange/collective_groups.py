"""Process groups of two replicas, one for each direction, made over a store that all replicas of a server share.

They are made directly, not by `torch.distributed.init_process_group`: that is one per process, and SGLang has it. A
pair agrees on an attempt first. The higher replica asks under the next number; the lower one answers the newest
question that is neither answered nor withdrawn; the groups are then made under that number. So what a failed attempt
left in the store is not taken for the peer, and nobody begins to make a group before the peer is there. A replica
that was started again has none of what it had before, so each pair of incarnations has names of its own in the store.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from typing import Literal, Protocol, TypeVar, cast

import torch
from torch._C._distributed_c10d import PrefixStore, ProcessGroupGloo, Store, Work

from kunserve_sgl.errors import ConfigurationError, KunserveError, TransientError
from kunserve_sgl.wire.store_messages import pair_prefix

BackendName = Literal["gloo", "nccl"]

SENDER, RECEIVER = 0, 1  # ranks in a group
_LOOK_INTERVAL_S = 0.25  # whether somebody who waits is still wanted to
_WATCHDOG_FACTOR = 2  # torch ends a process whose NCCL transfer is overdue; our own check comes first
_T = TypeVar("_T")


class Group(Protocol):
    """Names what is used of a process group of torch: one of two ranks, SENDER and RECEIVER."""

    def send(self, tensors: list[torch.Tensor], to: int, tag: int, /) -> Work:
        """Begins to send the only one of `tensors` to rank `to` of the group."""

    def recv(self, tensors: list[torch.Tensor], source: int, tag: int, /) -> Work:
        """Begins to fill the only one of `tensors` with what rank `source` of the group sends."""

    def abort(self) -> None:
        """Ends transfers that are under way, at both ends."""


@dataclass(frozen=True)
class DirectedGroups:
    """Pairs the groups with one peer: in `outgoing` this replica is SENDER, in `incoming` RECEIVER."""

    outgoing: Group
    incoming: Group


class GroupMaker:
    """Makes the groups of one rank of one replica with the same rank of others."""

    def __init__(
        self,
        store: Store,
        replica: int,
        *,
        backend: BackendName,
        device: torch.device,
        timeout_s: float,
        incarnation: int = 0,
        host: str = "127.0.0.1",
    ) -> None:
        """Makes no connection yet. `store` is that of this rank, the same for all replicas. `timeout_s` bounds what is
        sent later on. gloo binds `host`, an address of this machine that the others reach it by, to ports that the
        system picks; NCCL chooses for itself. Raises ConfigurationError."""
        _require_usable(backend, device)
        self._store = store
        self._replica = replica
        self.incarnations = {replica: incarnation}  # of those that have been started again
        self._backend: BackendName = backend
        self._device = device
        self._timeout_s = timeout_s
        self._gloo_device = ProcessGroupGloo.create_device(hostname=host) if backend == "gloo" else None

    def make(self, peer: int, deadline_s: float, is_cancelled: Callable[[], bool] = lambda: False) -> DirectedGroups:
        """Makes both groups with `peer`, which does the same; when it returns, something went through each.
        `deadline_s` is on time.monotonic. Raises TransientError where the peer does not join in or `is_cancelled` says
        so, ConfigurationError where it is one that never can."""
        usual = self._store.timeout  # type: ignore[attr-defined]  # torch's stubs do not have it
        try:
            return self._make(peer, deadline_s, _Wait(deadline_s, is_cancelled))
        finally:
            self._store.set_timeout(usual)  # a group goes on asking the store

    def _make(self, peer: int, deadline_s: float, wait: _Wait) -> DirectedGroups:
        low, high = min(self._replica, peer), max(self._replica, peer)
        of = [self.incarnations.get(each, 0) for each in (low, high)]
        pair = PrefixStore(pair_prefix(low, of[0], high, of[1]), self._store)
        pair.set_timeout(_left(deadline_s))
        try:
            attempt = self._agree(pair, peer, wait)
        except RuntimeError as error:  # the store's
            raise TransientError(f"replica {peer} cannot be connected to: {error}") from error
        groups = {}
        for sender, receiver in ((low, high), (high, low)):  # in the same order at both
            store = PrefixStore(f"{attempt}/{sender}>{receiver}", pair)
            rank = SENDER if self._replica == sender else RECEIVER
            what = f"the {self._backend} group for sending from replica {sender} to {receiver}"
            groups[sender] = _within(wait, what, partial(self._group, store, rank, deadline_s))
        return DirectedGroups(outgoing=groups[self._replica], incoming=groups[peer])

    def _agree(self, pair: Store, peer: int, wait: _Wait) -> int:
        """Agrees with the peer on the number under which both make their groups."""
        if self._replica > peer:
            number = pair.add("questions", 1)
            pair.set(f"question/{number}", self._identity)
            try:
                theirs = _wait_for(pair, f"answer/{number}", wait, peer)
            except TransientError:
                pair.set(f"withdrawn/{number}", "")
                raise
        else:
            number = max(1, pair.add("questions", 0))
            while True:
                theirs = _wait_for(pair, f"question/{number}", wait, peer)
                number = max(number, pair.add("questions", 0))
                if not pair.check([f"answer/{number}"]) and not pair.check([f"withdrawn/{number}"]):
                    break
                number += 1
            theirs = _wait_for(pair, f"question/{number}", wait, peer)
            pair.set(f"answer/{number}", self._identity)
        self._require_fitting(peer, theirs)
        return number

    @property
    def _identity(self) -> str:
        if self._backend == "gloo":
            return self._backend
        return f"{self._backend} {torch.cuda.get_device_properties(self._device).uuid}"

    def _require_fitting(self, peer: int, theirs: str) -> None:
        backend = theirs.split()[0]
        if backend != self._backend:
            raise ConfigurationError(
                f"replica {peer} sends activations by {backend}, this one by {self._backend}; accepted: one for all"
            )
        if backend == "nccl" and theirs == self._identity:
            raise ConfigurationError(
                f"replicas {self._replica} and {peer} are on the same GPU, between which NCCL cannot send; "
                "accepted: a GPU for each replica, or activations through shared memory"
            )

    def _group(self, store: Store, rank: int, deadline_s: float) -> Group:
        store.set_timeout(_left(deadline_s))
        group = self._gloo_group(store, rank) if self._backend == "gloo" else self._nccl_group(store, rank)
        # The first transfer makes NCCL's communicator, for which both must be there. Later ones wait for nobody.
        byte = torch.zeros(1, dtype=torch.uint8, device=self._device)
        work = group.send([byte], RECEIVER, 0) if rank == SENDER else group.recv([byte], SENDER, 0)
        work.wait(_left(deadline_s))
        return group

    def _gloo_group(self, store: Store, rank: int) -> Group:
        options = ProcessGroupGloo._Options()  # type: ignore[attr-defined]
        options._devices = [self._gloo_device]
        options._threads = 1  # for collectives, of which there are none
        options._timeout = timedelta(seconds=self._timeout_s)
        return cast(Group, ProcessGroupGloo(store, rank, 2, options))

    def _nccl_group(self, store: Store, rank: int) -> Group:
        from torch._C._distributed_c10d import ProcessGroupNCCL

        options = ProcessGroupNCCL.Options(is_high_priority_stream=True)
        options._timeout = timedelta(seconds=_WATCHDOG_FACTOR * self._timeout_s)
        with torch.cuda.device(self._device):
            return cast(Group, ProcessGroupNCCL(store, rank, 2, options))


def _require_usable(backend: str, device: torch.device) -> None:
    if backend not in ("gloo", "nccl"):
        raise ConfigurationError(f"activations by {backend!r}; accepted: 'gloo', 'nccl'")
    needed = "cpu" if backend == "gloo" else "cuda"
    if device.type != needed:
        raise ConfigurationError(f"{backend} sends what is on {needed}, and the activations are on {device}")
    if backend == "nccl" and not torch.distributed.is_nccl_available():
        raise ConfigurationError("this torch was built without NCCL; accepted: one with it, or another transport")


def _left(deadline_s: float) -> timedelta:
    """Returns the time until the deadline, at least 1 ms, because 0 means without a bound."""
    return timedelta(seconds=max(0.001, deadline_s - time.monotonic()))


@dataclass(frozen=True)
class _Wait:
    """Says until when to wait, and what ends it before."""

    deadline_s: float
    is_cancelled: Callable[[], bool]

    @property
    def is_over(self) -> bool:
        return self.is_cancelled() or time.monotonic() >= self.deadline_s

    @property
    def next_look(self) -> timedelta:
        return _left(min(self.deadline_s, time.monotonic() + _LOOK_INTERVAL_S))


def _wait_for(store: Store, key: str, wait: _Wait, peer: int) -> str:
    while True:
        try:
            store.wait([key], wait.next_look)
        except RuntimeError:
            if wait.is_over:
                raise TransientError(f"replica {peer} did not connect in time") from None
        else:
            return store.get(key).decode()


def _within(wait: _Wait, what: str, make: Callable[[], _T]) -> _T:
    """Returns what `make` returns, from a thread of its own: what torch does there has no bound of its own that always
    holds. A thread that is late is left behind, and what it makes in the end is dropped."""
    made: list[_T] = []
    failed: list[Exception] = []

    def run() -> None:
        try:
            made.append(make())
        except Exception as error:  # noqa: BLE001 - raised below, in the thread that waits
            failed.append(error)

    thread = threading.Thread(target=run, name="kunserve-connect", daemon=True)
    thread.start()
    while thread.is_alive() and not wait.is_over:
        thread.join(wait.next_look.total_seconds())
    if made:
        return made[0]
    if failed and isinstance(failed[0], KunserveError):
        raise failed[0]
    reason = str(failed[0]) if failed else "not in time"
    raise TransientError(f"{what} could not be made: {reason}") from (failed[0] if failed else None)
