"""Memory that replicas lend each other: KV whose layers run elsewhere, parameters to restore from, activations.

One of these per rank; it talks to the same rank of other replicas. A loan covers one layer of one extent of slots, so
that later plans may end some loans of an earlier one and keep the rest.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from kunserve_sgl.errors import InvariantError
from kunserve_sgl.exchange.activations import ActivationBuffer
from kunserve_sgl.memory.borrowed_region import BorrowedRegion
from kunserve_sgl.memory.elastic_kv import ElasticKv
from kunserve_sgl.memory.frame_export import FrameExport
from kunserve_sgl.memory.frame_pool import FramePool
from kunserve_sgl.memory.layer_parameters import LayerParameters
from kunserve_sgl.memory.shared_buffer import SharedBuffer
from kunserve_sgl.memory.slot_space import SlotRange
from kunserve_sgl.memory.vmm import VmmBackend
from kunserve_sgl.policy.plan import Extent, KvLoan, KvPart, ReplicaSteps
from kunserve_sgl.replica.frame_channel import ActivationOffer, FrameChannel, KvOffer, Offer, ParameterOffer

Step = Callable[[], None]
# (the other replica, replica of the slots, first granule, layer)
_KvKey = tuple[int, int, int, int]


class Loans:
    """Books of this rank as lender and as borrower. Nothing here waits: offers are sent into sockets and taken from
    them when they have come."""

    def __init__(
        self,
        replica: int,
        frames: FramePool,
        kv: ElasticKv,
        parameters: LayerParameters,
        channel: FrameChannel,
        activations: SharedBuffer | None,
        activation_vmm: VmmBackend,
        share: Callable[[int, ActivationBuffer], None],
    ) -> None:
        """`activations` is this replica's buffer, or None where activations are sent. `share(owner, buffer)` is called
        with each buffer that becomes available here."""
        self.replica = replica
        self._frames = frames
        self._kv = kv
        self._parameters = parameters
        self._channel = channel
        self._activations = activations
        self._activation_vmm = activation_vmm
        self._share = share
        self._addresses: Sequence[str] = ()
        self._lent: dict[_KvKey, int] = {}
        self._borrowed: dict[_KvKey, int] = {}
        self._lent_regions: list[int] = []
        self._regions: dict[int, BorrowedRegion] = {}
        self._expected: set[object] = set()
        self._known_peers: set[int] = set()
        self._told_peers: set[int] = set()

    def connect(self, addresses: Sequence[str]) -> None:
        """`addresses[r]` is where this rank's peer in replica r takes offers."""
        self._addresses = addresses

    def slots(self, extent: Extent) -> SlotRange:
        return self._kv.space.slots_of(extent.replica, extent.first_granule, extent.granules)

    @property
    def own_granules(self) -> int:
        """Of the own KV cache, without what others lend."""
        return self._kv.granules

    # Prepare

    def prepare(
        self, transition: int, steps: ReplicaSteps, peers: Iterable[int], undo: list[Step], reopen: list[Step]
    ) -> list[Step]:
        """The steps that lend what others will need; notes what is expected from them. What has to be undone if the
        transition fails goes to `undo` (give back what was borrowed) and, for when all have done that, to `reopen`."""
        todo: list[Step] = []
        for loan in steps.borrow_kv:
            for part in loan.parts:
                self._expected.update(_key(loan.owner, part.extent, layer) for layer in part.layers)
        for owed in steps.borrow_parameters:
            self._expected.update(("parameters", layer) for layer in owed.layers)
        for peer in peers if self._activations is not None else ():
            if peer not in self._known_peers:
                self._expected.add(("activations", peer))
            if peer not in self._told_peers:
                todo.append(lambda peer=peer: self._offer_activations(transition, peer))  # type: ignore[misc]
                # It may not have been taken; who has it already does not mind a second offer.
                reopen.append(lambda peer=peer: self._told_peers.discard(peer))  # type: ignore[misc]
        for loan in steps.lend_kv:
            for part in loan.parts:
                for layer in part.layers:
                    todo.append(
                        lambda to=loan.borrower, extent=part.extent, layer=layer: self._lend_kv(  # type: ignore[misc]
                            transition, to, extent, layer, reopen
                        )
                    )
        for given in steps.lend_parameters:
            for layer in given.layers:
                todo.append(
                    lambda to=given.borrower, layer=layer: self._lend_region(transition, to, layer)  # type: ignore[misc]
                )
        reopen.append(self._end_region_loans)
        undo.append(self._return_regions)
        return todo

    @property
    def awaits_offers(self) -> bool:
        return bool(self._expected)

    def receive(self, transition: int, undo: list[Step]) -> bool:
        """Takes one offer; False where none has arrived. Those of other transitions, which failed, are dropped."""
        arrived = self._channel.accept()
        if arrived is None:
            return False
        offer, export = arrived
        with export:
            if offer.transition == transition:
                self._take(offer, export, undo)
        return True

    def _take(self, offer: Offer, export: FrameExport, undo: list[Step]) -> None:
        if isinstance(offer, KvOffer):
            key = (offer.owner, offer.replica, offer.first_granule, offer.layer)
            slots = self._kv.space.slots_of(offer.replica, offer.first_granule, offer.granules)
            self._expect(key)
            self._kv.borrow(_name(offer.owner), offer.loan_id, export, [(slots, [offer.layer])])
            self._borrowed[key] = offer.loan_id
            undo.append(lambda: self._return_kv(key))
        elif isinstance(offer, ParameterOffer):
            self._expect(("parameters", offer.layer))
            region = BorrowedRegion(self._frames, _name(offer.owner), offer.loan_id, export, offer.layer)
            self._regions[offer.layer] = region
        elif offer.owner not in self._known_peers:
            self._expect(("activations", offer.owner))
            self._known_peers.add(offer.owner)
            self._share(offer.owner, ActivationBuffer(SharedBuffer.open(self._activation_vmm, export)))

    def _expect(self, key: object) -> None:
        if key not in self._expected:
            raise InvariantError(f"replica {self.replica} was offered {key}, which it does not expect")
        self._expected.remove(key)

    def _lend_kv(self, transition: int, to: int, extent: Extent, layer: int, reopen: list[Step]) -> None:
        loan = self._frames.lend(_name(to), self._kv.frames_behind(self.slots(extent), [layer]))
        key = _key(to, extent, layer)
        self._lent[key] = loan.loan_id
        reopen.append(lambda: self._end_kv(key))
        offer = KvOffer(
            transition, self.replica, loan.loan_id, extent.replica, extent.first_granule, extent.granules, layer
        )
        with self._frames.vmm.export_frames(loan.frames) as export:
            self._channel.offer(self._addresses[to], offer, export)

    def _lend_region(self, transition: int, to: int, layer: int) -> None:
        loan = self._frames.lend(_name(to), self._parameters.frames_of(layer))
        self._lent_regions.append(loan.loan_id)
        with self._frames.vmm.export_frames(loan.frames) as export:
            offer = ParameterOffer(transition, self.replica, loan.loan_id, layer)
            self._channel.offer(self._addresses[to], offer, export)

    def _offer_activations(self, transition: int, peer: int) -> None:
        assert self._activations is not None
        with self._activations.export() as export:
            offer = ActivationOffer(transition, self.replica, self._activations.size_bytes)
            self._channel.offer(self._addresses[peer], offer, export)
        self._told_peers.add(peer)

    # Load, release, resume

    def load(self, layer: int) -> None:
        """Brings a dropped layer back from what a peer lent. Raises as `LayerParameters.restore`."""
        region = self._regions.pop(layer)
        try:
            self._parameters.restore(layer, region)
        finally:
            region.close()

    def require_droppable(self, layer: int) -> None:
        """Raises as `LayerParameters.require_droppable`."""
        self._parameters.require_droppable(layer)

    def drop(self, layer: int) -> int:
        """Drops a layer's parameters; returns the bytes that became free."""
        frames = self._parameters.report(layer).frames
        self._parameters.drop(layer)
        return frames * self._frames.vmm.frame_bytes

    def map_kv(self, part: KvPart) -> None:
        self._kv.map_hosted(self.slots(part.extent), part.layers)

    def unmap_kv(self, part: KvPart) -> None:
        self._kv.unmap_hosted(self.slots(part.extent), part.layers)

    def give_back(self, loans: Sequence[KvLoan]) -> list[Step]:
        """The steps that unmap what was borrowed."""
        keys = [_key(loan.owner, part.extent, layer) for loan in loans for part in loan.parts for layer in part.layers]
        return [lambda key=key: self._return_kv(key) for key in keys]  # type: ignore[misc]

    def end_loans(self, loans: Sequence[KvLoan]) -> None:
        """Books what was lent as given back: all borrowers have done so."""
        for loan in loans:
            for part in loan.parts:
                for layer in part.layers:
                    self._end_kv(_key(loan.borrower, part.extent, layer))

    def finish(self) -> None:
        """The transition is over, one way or the other. Whoever borrowed parameters has returned them, when it loaded
        them or on its way back."""
        self._expected.clear()
        self._end_region_loans()

    def check(self) -> None:
        """Raises LedgerError where the books do not balance."""
        self._frames.check()

    def _return_kv(self, key: _KvKey) -> None:
        self._frames.return_loan(_name(key[0]), self._borrowed.pop(key))

    def _end_kv(self, key: _KvKey) -> None:
        self._frames.end_loan(self._lent.pop(key))

    def _return_regions(self) -> None:
        for layer in list(self._regions):
            self._regions.pop(layer).close()

    def _end_region_loans(self) -> None:
        while self._lent_regions:
            self._frames.end_loan(self._lent_regions.pop())


def _key(other: int, extent: Extent, layer: int) -> _KvKey:
    return other, extent.replica, extent.first_granule, layer


def _name(replica: int) -> str:
    return f"replica {replica}"
