"""Memory of peers that is mapped, with file descriptors that come with the offer: it is used as own memory is."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager

import torch

from kunserve_sgl.exchange.kv_homes import RemoteKv
from kunserve_sgl.exchange.offers import KvOffer, LentOffer, ParameterOffer
from kunserve_sgl.memory.borrowed_region import BorrowedRegion
from kunserve_sgl.memory.frame_export import FrameExport
from kunserve_sgl.memory.frame_loans import Loan
from kunserve_sgl.memory.kv_staging import KvStaging
from kunserve_sgl.memory.layer_sources import LentRegion
from kunserve_sgl.memory.virtual_range import Fence
from kunserve_sgl.policy.plan import KvMove
from kunserve_sgl.replica.batch_shape import Int64s
from kunserve_sgl.replica.kv_copy import KvTransfer
from kunserve_sgl.replica.read_probe import Reading
from kunserve_sgl.replica.replica_memory import ReplicaMemory, named_replica


class MappedMemory:
    """Implements `PeerMemory`. KV that changes its home is copied into memory aside, at addresses of its own, which
    takes its place behind the slots in the end."""

    maps = True

    def __init__(self, memory: ReplicaMemory) -> None:
        self._memory = memory
        self._frames = memory.frames
        self._aside: dict[tuple[int, int], RemoteKv] = {}

    def offered(self, offer: LentOffer, loan: Loan) -> tuple[LentOffer, AbstractContextManager[FrameExport]]:
        """See `PeerMemory`."""
        return offer, self._frames.vmm.export_frames(loan.frames)

    def region(self, offer: ParameterOffer, export: FrameExport) -> LentRegion:
        """See `PeerMemory`."""
        return BorrowedRegion(self._frames, named_replica(offer.owner), offer.loan_id, export, offer.layer)

    def borrow_kv(self, offer: KvOffer, kv: RemoteKv, export: FrameExport, *, aside: bool) -> None:
        """See `PeerMemory`."""
        owner = named_replica(kv.home)
        if aside:
            self._memory.stage_loan(kv.slots, kv.layer, owner, kv.loan, export)
            self._aside[kv.home, kv.loan] = kv
        else:
            self._memory.kv.borrow(owner, kv.loan, export, [(kv.slots, [kv.layer])])

    def return_kv(self, kv: RemoteKv, after: Iterable[Fence] | None = None) -> None:
        """See `PeerMemory`."""
        if (kv.home, kv.loan) in self._aside:
            self._memory.unstage(kv.slots, kv.layer, after)
            del self._aside[kv.home, kv.loan]
        else:
            self._frames.loans.return_loan(named_replica(kv.home), kv.loan, after)

    @contextmanager
    def reading(self, kv: RemoteKv) -> Iterator[Reading]:
        """See `PeerMemory`."""
        part = self._memory.kv.bytes_behind(kv.slots, kv.layer)[0]
        yield lambda into: into.copy_(part[: into.numel()])

    def get_room(self, move: KvMove) -> None:
        """See `PeerMemory`."""
        self._memory.stage(move.extent, move.layer)

    def give_room_back(self, move: KvMove) -> None:
        """See `PeerMemory`."""
        self._memory.unstage(self._memory.slots(move.extent), move.layer)

    def transfer(self, move: KvMove, kv: RemoteKv) -> KvTransfer:
        """See `PeerMemory`."""
        return _Staged(self._memory.staging(move.extent, move.layer))

    def change_over(self, move: KvMove, kv: RemoteKv) -> None:
        """See `PeerMemory`."""
        if move.target != self._memory.replica:
            self._memory.leave_home(move.extent, move.layer, after=())
        self._memory.take_staged(move.extent, move.layer, after=())
        self._aside.pop((kv.home, kv.loan), None)


class _Staged(KvTransfer):
    """Copies in one go."""

    def __init__(self, staging: KvStaging) -> None:
        self._staging = staging
        self.slot_bytes = staging.slot_bytes

    def copy(self, first: int, count: int) -> Iterator[None]:
        self._staging.copy(first, count)
        return iter(())

    def copy_slots(self, ids: Int64s) -> Iterator[None]:
        self._staging.copy_slots(torch.from_numpy(ids))
        return iter(())

    def close(self) -> None:
        """There is nothing to close: the memory belongs to a rank."""
