"""Memory that replicas lend each other: KV whose layers run elsewhere, parameters to restore from, activations.

One of these per rank; it talks to the same rank of other replicas. A loan covers one layer of one extent of slots, so
that later plans may end some loans of an earlier one and keep the rest.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from functools import partial

from kunserve_sgl.errors import InvariantError, KunserveError
from kunserve_sgl.exchange.activations import ActivationBuffer
from kunserve_sgl.exchange.kv_homes import KvHomes, RemoteKv
from kunserve_sgl.exchange.offers import (
    ActivationOffer,
    KvOffer,
    LentOffer,
    Offer,
    OfferAddress,
    OfferChannel,
    ParameterOffer,
)
from kunserve_sgl.memory.errors import TransferError
from kunserve_sgl.memory.frame_export import FrameExport
from kunserve_sgl.memory.frame_loans import Loan
from kunserve_sgl.memory.layer_parameters import LayerState
from kunserve_sgl.memory.layer_sources import LentRegion
from kunserve_sgl.memory.shared_buffer import SharedBuffer
from kunserve_sgl.memory.virtual_range import Fence
from kunserve_sgl.memory.vmm import VmmBackend
from kunserve_sgl.policy.plan import Extent, KvLoan, ParameterLoan, Plan, ReplicaSteps
from kunserve_sgl.replica.ending_loans import EndingLoans
from kunserve_sgl.replica.lent_memory import LentMemory
from kunserve_sgl.replica.loan_books import KvKey, differences, kv_key
from kunserve_sgl.replica.peer_memory import WaysToPeers
from kunserve_sgl.replica.replica_memory import ReplicaMemory
from kunserve_sgl.replica.replica_memory import named_replica as _name
from kunserve_sgl.replica.steps import Step, named

logger = logging.getLogger(__name__)


class Loans:
    """Keeps the books of this rank as lender and as borrower. Nothing here waits: offers are sent into sockets and
    taken from them when they have come."""

    def __init__(
        self,
        memory: ReplicaMemory,
        channel: OfferChannel,
        ways: WaysToPeers,
        activation_vmm: VmmBackend,
        share: Callable[[int, ActivationBuffer], None],
        longest_order_s: float,
    ) -> None:
        """`ways` are those in which memory of peers is used. `share(owner, buffer)` is called with each buffer
        that becomes available here. An order that is served for `longest_order_s` after its loan was to end is taken
        to hang."""
        self._replica = memory.replica
        self._memory = memory
        self._frames = memory.frames
        self._channel = channel
        self.ways = ways
        self.lent = LentMemory()
        self.ending = EndingLoans(self.lent, memory.frames.loans, longest_order_s)
        self._activations: SharedBuffer | None = None  # this replica's; none where activations are sent
        self._activation_vmm = activation_vmm
        self._share = share
        self._address_of: Callable[[int], OfferAddress] = lambda peer: OfferAddress("", maps=True)
        self._lent: dict[KvKey, Loan] = {}
        self._borrowed: dict[KvKey, RemoteKv] = {}
        self._changes = 0  # of what is borrowed
        self._homes: tuple[object, KvHomes] | None = None  # with what they were made of
        self._lent_regions: dict[tuple[int, int], Loan] = {}  # by borrower and layer
        self._regions: dict[int, LentRegion] = {}  # by layer
        self._expected: set[object] = set()
        self._aside: set[KvKey] = set()  # of these, what is not to be mapped behind its slots
        self._known_peers: set[int] = set()
        self._told_peers: set[int] = set()

    def connect(self, address_of: Callable[[int], OfferAddress]) -> None:
        """Tells where and how peers take offers: `address_of(r)` is that of this rank in replica r."""
        self._address_of = address_of

    def offer_activations(self, buffer: SharedBuffer) -> None:
        """Offers this replica's buffer to peers from now on, and takes theirs."""
        self._activations = buffer

    def forget(self, peer: int) -> None:
        """Takes `peer` to have no buffer of here, and to have shared none: its processes have ended. Loans are ended by
        the transition that takes the plan apart."""
        self._told_peers.discard(peer)
        self._known_peers.discard(peer)

    # Lending

    def lending(self, transition: int, steps: ReplicaSteps, peers: Iterable[int]) -> Iterator[Step]:
        """Yields the steps that lend what others will need of this rank."""
        for peer in peers if self._activations is not None else ():
            if peer not in self._told_peers:
                yield Step(
                    f"offer the activation buffer to replica {peer}",
                    partial(self._offer_activations, transition, peer),
                    # It may not have been taken; who has it already does not mind a second offer.
                    reopen=partial(self._told_peers.discard, peer),
                )
        for loan in steps.lend_kv:
            for part in loan.parts:
                for layer in part.layers:
                    yield from self._lending_kv(transition, loan.borrower, part.extent, layer)
        for given in steps.lend_parameters:
            for layer in given.layers:
                key = given.borrower, layer
                what = f"the parameters of layer {layer} to replica {given.borrower}"
                yield Step(f"lend {what}", partial(self._lend_region, key))
                yield Step(f"offer {what}", partial(self._offer_region, transition, key))

    def _lending_kv(self, transition: int, to: int, extent: Extent, layer: int) -> Iterator[Step]:
        """Yields two steps, to lend and to offer: a loan that was offered in vain has to end, too."""
        key = kv_key(to, extent, layer)
        what = f"the KV of {named(extent)} in layer {layer} to replica {to}"
        yield Step(f"lend {what}", partial(self._lend_kv, key, extent), reopen=partial(self._end_kv, key))
        yield Step(f"offer {what}", partial(self._offer_kv, transition, key, extent))

    def end_loans(self, loans: Sequence[KvLoan]) -> None:
        """Books what was lent as given back: all borrowers have done so. See `EndingLoans`."""
        for loan in loans:
            for part in loan.parts:
                for layer in part.layers:
                    self._end_kv(kv_key(loan.borrower, part.extent, layer))

    # Borrowing

    def expect(self, steps: ReplicaSteps, peers: Iterable[int]) -> None:
        """Notes what others will offer in this transition."""
        for loan in steps.borrow_kv:
            for part in loan.parts:
                granules = part.extent.granules
                self._expected.update((kv_key(loan.owner, part.extent, layer), granules) for layer in part.layers)
        self._aside.update(kv_key(m.target, m.extent, m.layer) for m in steps.moves if m.target != self._replica)
        for owed in steps.borrow_parameters:
            self._expected.update(("parameters", layer) for layer in owed.layers)
        if self._activations is not None:
            self._expected.update(("activations", peer) for peer in peers if peer not in self._known_peers)

    @property
    def borrowed(self) -> Collection[tuple[int, int, int, int]]:
        """Lists what is borrowed: whose memory, the replica of the slots, their first granule, and the layer."""
        return self._borrowed.keys()

    def borrowed_of(self, owner: int, extent: Extent, layer: int) -> RemoteKv:
        """Returns what `owner` has lent of a layer of these slots."""
        return self._borrowed[kv_key(owner, extent, layer)]

    def is_mapped(self, owner: int, extent: Extent, layer: int) -> bool:
        """Tells whether `owner` has lent a layer of these slots, and it is mapped."""
        kv = self._borrowed.get(kv_key(owner, extent, layer))
        return kv is not None and kv.is_mapped

    def homes(self) -> KvHomes:
        """Returns where the KV is that is attended to here: what is borrowed, and neither mapped nor aside, is at its
        owner."""
        aside = self.ways.aside
        made_of = self._changes, aside
        if self._homes is None or self._homes[0] != made_of:
            by_message = (kv for kv in self._borrowed.values() if not kv.is_mapped)
            remote = [kv for kv in by_message if (kv.home, kv.loan) not in aside]
            self._homes = made_of, KvHomes(self._replica, remote)
        return self._homes[1]

    @property
    def awaits_offers(self) -> bool:
        """Says whether offers are expected that have not come."""
        return bool(self._expected)

    def receive(self, transition: int) -> Step | None:
        """Returns the step that takes one offer, to be run at once; None where none has arrived. Those of other
        transitions, which failed, are dropped."""
        arrived = self._channel.accept()
        if arrived is None:
            return None
        offer, export = arrived
        if offer.transition != transition:
            return Step(f"drop an offer of transition {offer.transition}", export.close)
        if isinstance(offer, KvOffer):
            key = offer.owner, offer.replica, offer.first_granule, offer.layer
            what = f"borrow KV in layer {offer.layer} of replica {offer.owner}"
            return Step(what, partial(self._take, offer, export), undo=partial(self._return_kv, key))
        if isinstance(offer, ParameterOffer):
            what = f"borrow the parameters of layer {offer.layer} of replica {offer.owner}"
            return Step(what, partial(self._take, offer, export), undo=partial(self._close_region, offer.layer))
        return Step(f"take the activation buffer of replica {offer.owner}", partial(self._take, offer, export))

    def take_region(self, layer: int) -> LentRegion | None:
        """Hands over the parameters of a layer at the peer that lent them, if there is one; the caller closes them."""
        return self._regions.pop(layer, None)

    # Beside the way from plan to plan

    def lend_layer(self, number: int, borrower: int, address: Callable[[], OfferAddress], layer: int) -> Loan | None:
        """Lends a layer's parameters to who waits at `address` for what was ordered under `number`, where they are
        here. The borrower has other sources, so one that cannot be reached is no failure: the log says so, and None is
        returned."""
        if self._memory.parameters.state(layer) is not LayerState.RESIDENT:
            logger.warning("KunServe: layer %d is not here to be lent to replica %d", layer, borrower)
            return None
        # The same replica may have been lent the layer by another order, before it ended.
        loan = self._lend_parameters(f"{_name(borrower)}, {number}", borrower, layer)
        try:
            offer = ParameterOffer(number, self._replica, loan.loan_id, layer)
            self._send_offer(borrower, address(), offer, loan)
        except KunserveError as error:
            logger.warning("KunServe: layer %d is not lent to replica %d: %s", layer, borrower, error)
            self.ending.end(loan)
            return None
        return loan

    def giving_back(self, steps: ReplicaSteps) -> Iterator[Step]:
        """Yields the steps that unmap what was borrowed, once the device has finished what touches it; not what is used
        until other memory takes its place."""
        kept = {kv_key(move.source, move.extent, move.layer) for move in steps.moves}
        for loan in steps.return_kv:
            for part in loan.parts:
                for layer in part.layers:
                    if kv_key(loan.owner, part.extent, layer) in kept:
                        continue
                    what = f"give back the KV of {named(part.extent)} in layer {layer} to replica {loan.owner}"
                    yield Step(what, partial(self._return_kv, kv_key(loan.owner, part.extent, layer), after=()))

    def give_back(self, owner: int, extent: Extent, layer: int) -> None:
        """Unmaps what was borrowed of `owner` behind a layer of these slots; the device has finished what touches it.
        Raises as `FrameLoans.return_loan`."""
        self._return_kv(kv_key(owner, extent, layer), after=())

    # A recovery: whatever is in the books ends, and layers that lack come from who has them.

    def giving_all_back(self) -> Iterator[Step]:
        """Yields the steps that unmap all that is borrowed, once the device has finished what touches it."""
        self._expected.clear()
        for key in list(self._borrowed):
            what = (
                f"give back the KV of granules from {key[2]} of replica {key[1]} in layer {key[3]} to replica {key[0]}"
            )
            yield Step(what, partial(self._return_kv, key, after=()))
        for layer in list(self._regions):
            what = f"give back the parameters of layer {layer}"
            yield Step(what, partial(self._close_region, layer))

    def end_all(self) -> None:
        """Books all that was lent as given back: whoever lives has done so. See `EndingLoans`."""
        for key in tuple(self._lent):
            self._end_kv(key)
        self._end_regions()

    def lending_lacking(self, number: int, loans: Iterable[ParameterLoan]) -> Iterator[Step]:
        """Yields the steps that lend what others lack, by the loans of recovery `number`."""
        for given in loans:
            for layer in given.layers if given.owner == self._replica else ():
                lend = partial(self._lend_lacking, number, given.borrower, layer)
                yield Step(f"lend the parameters of layer {layer} to replica {given.borrower}", lend)

    def expect_layers(self, layers: Iterable[int]) -> None:
        """Notes which parameters others will offer."""
        self._expected = {("parameters", layer) for layer in layers}

    def receive_layer(self, number: int) -> int | None:
        """Takes one offer of a layer's parameters, and returns the layer, which `take_region` then hands over or
        not; None where none has come. What is not expected is dropped: it came too late, or of what was before.
        A lender that fails in the middle of an offer is no failure here."""
        while True:
            try:
                arrived = self._channel.accept()
                if arrived is None:
                    return None
                offer, export = arrived
            except TransferError as error:
                logger.warning("KunServe: %s", error)
                continue
            is_due = offer.transition == number
            if not (is_due and isinstance(offer, ParameterOffer) and ("parameters", offer.layer) in self._expected):
                export.close()
                continue
            try:
                self._take(offer, export)
            except KunserveError as error:
                logger.warning("KunServe: layer %d is not borrowed of replica %d: %s", offer.layer, offer.owner, error)
            return offer.layer

    def give_up_waiting(self) -> list[int]:
        """Returns the layers that were expected and have not come, which are not expected any more."""
        late = [layer for layer in range(self._memory.layer_count) if ("parameters", layer) in self._expected]
        self._expected.clear()
        return late

    def finish(self) -> None:
        """Ends what belongs to one transition, which is over, one way or the other. Whoever borrowed parameters has
        returned them, when it loaded them or on its way back."""
        self._expected.clear()
        self._aside.clear()
        self._end_regions()

    def differences(self, plan: Plan) -> list[str]:
        """Says which loans there are that `plan`, which holds, does not want, and which it wants that there are not."""
        found = [*differences(plan, self._replica, self._lent, self._borrowed)]
        if self._lent_regions or self._regions:
            found.append("parameters are lent or borrowed, and no transition is under way")
        return found

    # One loan

    def _take(self, offer: Offer, export: FrameExport) -> None:
        with export:
            if isinstance(offer, KvOffer):
                key = offer.owner, offer.replica, offer.first_granule, offer.layer
                self._require_expected((key, offer.granules))
                slots = self._memory.kv.space.slots_of(offer.replica, offer.first_granule, offer.granules)
                way = self.ways.taking(export)
                kv = RemoteKv(slots, offer.layer, offer.owner, offer.loan_id, way.maps)
                way.borrow_kv(offer, kv, export, aside=key in self._aside)
                self._borrowed[key] = kv
                self._changes += 1
            elif isinstance(offer, ParameterOffer):
                self._require_expected(("parameters", offer.layer))
                self._regions[offer.layer] = self.ways.taking(export).region(offer, export)
            elif offer.owner not in self._known_peers:
                self._require_expected(("activations", offer.owner))
                self._known_peers.add(offer.owner)
                self._share(offer.owner, ActivationBuffer(SharedBuffer.open(self._activation_vmm, export)))

    def _require_expected(self, key: object) -> None:
        if key not in self._expected:
            raise InvariantError(f"replica {self._replica} was offered {key}, which it does not expect")
        self._expected.remove(key)

    def _lend_kv(self, key: KvKey, extent: Extent) -> None:
        borrower, layer = key[0], key[3]
        slots, kv = self._memory.slots(extent), self._memory.kv
        loan = self._lent[key] = self._frames.loans.lend(_name(borrower), kv.frames_behind(slots, [layer]))
        self.lent.lend_slots(loan.loan_id, borrower, layer, slots)
        self.lent.lend_bytes(loan.loan_id, borrower, kv.bytes_behind(slots, layer), is_writable=True)

    def _offer_kv(self, transition: int, key: KvKey, extent: Extent) -> None:
        loan, (borrower, replica, first_granule, layer) = self._lent[key], key
        offer = KvOffer(transition, self._replica, loan.loan_id, replica, first_granule, extent.granules, layer)
        self._send_offer(borrower, self._address_of(borrower), offer, loan)

    def _lend_region(self, key: tuple[int, int]) -> None:
        borrower, layer = key
        self._lent_regions[key] = self._lend_parameters(_name(borrower), borrower, layer)

    def _lend_parameters(self, name: str, borrower: int, layer: int) -> Loan:
        parameters = self._memory.parameters
        loan = self._frames.loans.lend(name, parameters.frames_of(layer))
        self.lent.lend_bytes(loan.loan_id, borrower, [parameters.lent_bytes(layer)])
        return loan

    def _offer_region(self, transition: int, key: tuple[int, int]) -> None:
        loan, (borrower, layer) = self._lent_regions[key], key
        offer = ParameterOffer(transition, self._replica, loan.loan_id, layer)
        self._send_offer(borrower, self._address_of(borrower), offer, loan)

    def _send_offer(self, borrower: int, to: OfferAddress, offer: LentOffer, loan: Loan) -> None:
        sent, exported = self.ways.lending(to.maps).offered(offer, loan)
        with exported as export:
            self._channel.offer(borrower, to.address, sent, export)

    def _lend_lacking(self, number: int, borrower: int, layer: int) -> None:
        if (loan := self.lend_layer(number, borrower, partial(self._address_of, borrower), layer)) is not None:
            self._lent_regions[borrower, layer] = loan

    def _offer_activations(self, transition: int, peer: int) -> None:
        assert self._activations is not None
        with self._activations.export() as export:
            offer = ActivationOffer(transition, self._replica, self._activations.size_bytes)
            self._channel.offer(peer, self._address_of(peer).address, offer, export)
        self._told_peers.add(peer)

    def _return_kv(self, key: KvKey, after: Iterable[Fence] | None = None) -> None:
        kv = self._borrowed.pop(key)
        self._changes += 1
        self.ways.of(kv).return_kv(kv, after)

    def _end_kv(self, key: KvKey) -> None:
        self.ending.end(self._lent.pop(key))

    def _end_regions(self) -> None:
        while self._lent_regions:
            self.ending.end(self._lent_regions.popitem()[1])

    def _close_region(self, layer: int) -> None:
        """Gives borrowed parameters back, unless they have been loaded from."""
        if (region := self._regions.pop(layer, None)) is not None:
            region.close()
