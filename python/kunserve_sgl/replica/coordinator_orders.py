"""What the coordinator orders a replica, at its rank 0: taken out of the inbox, checked, and kept until all ranks act
on it at the same boundary."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import msgspec

from kunserve_sgl.args import Activations, KunserveOptions
from kunserve_sgl.control import addresses
from kunserve_sgl.control.messages import FromCoordinator, Order, Phase
from kunserve_sgl.control.order_check import OrderCheck
from kunserve_sgl.exchange.peer_link import PeerLink
from kunserve_sgl.policy.plan import ReplicaFacts
from kunserve_sgl.replica.held_plan import HeldPlan
from kunserve_sgl.replica.place import Place
from kunserve_sgl.wire.rejections import Rejections, Sender


class CoordinatorOrders:
    """Keeps the orders that have come, in order. Nothing here waits."""

    def __init__(
        self,
        place: Place,
        options: KunserveOptions,
        facts: ReplicaFacts,
        link: PeerLink,
        plan: HeldPlan,
        rejections: Rejections,
    ) -> None:
        """`facts` are those of this replica, as the coordinator has been told. What does not make sense by them and by
        `plan` is ignored, and counted in `rejections`."""
        self._me = place.replica, place.rank
        self._options = options
        self._link = link
        self._plan = plan
        self._rejections = rejections
        self._decoder: msgspec.msgpack.Decoder[FromCoordinator] = msgspec.msgpack.Decoder(FromCoordinator)
        self._check = OrderCheck(
            place.replicas,
            place.ranks,
            facts,
            self._is_address,
            partial(addresses.is_memory_address, options),
            Activations(options.kunserve_activations),
        )
        self._waiting: list[bytes] = []  # have come, and are not followed yet
        self._is_called_off = False  # one of them begins a recovery

    def take(self) -> list[bytes]:
        """Returns all that has come, for all ranks of the replica to act on at the same boundary."""
        if not self._plan.serves:  # else the inbox is looked into in and between batches
            self._link.poll(0)
        self.take_in()
        taken, self._waiting, self._is_called_off = self._waiting, [], False
        return taken

    @property
    def is_any_waiting(self) -> bool:
        """Tells whether something has been taken in that is not followed yet."""
        return bool(self._waiting)

    def take_in(self) -> None:
        """Takes what has come out of the inbox."""
        for payload, sender in self._link.take_control():
            message = self.believed(payload, sender)
            if message is not None:
                self._waiting.append(payload)
                self._is_called_off |= isinstance(message, Order) and message.phase is Phase.ABANDON

    def take_while(self, may_follow: Callable[[FromCoordinator], bool]) -> Iterator[bytes]:
        """Yields what may be followed now, one after the other, up to the first that may not."""
        while self._waiting and may_follow(self.read(self._waiting[0])):
            yield self._waiting.pop(0)

    def looks_called_off(self) -> bool:
        """Looks into the inbox, and says whether batches that are on their way are called off."""
        if self._link.has_control:
            self.take_in()
        return self._is_called_off

    def read(self, payload: bytes) -> FromCoordinator:
        """Returns the message in a payload that has been taken."""
        return self._decoder.decode(payload)

    def believed(self, payload: bytes, sender: Sender) -> FromCoordinator | None:
        """Returns a message of the coordinator that makes sense here; one that does not is counted."""
        check, plan = self._check.check, self._plan.agreed
        return self._rejections.read(self._decoder, payload, lambda message: check(message, sender, plan))

    def _is_address(self, replica: int, rank: int, incarnation: int, inbox: str, frame_address: str) -> bool:
        who = replica, rank, incarnation
        is_inbox = addresses.is_inbox_address(self._options, *who, inbox)
        is_own = inbox == self._link.address or (replica, rank) != self._me
        return is_inbox and is_own and addresses.is_frame_address(self._options, *who, frame_address)
