"""Memory by message at one rank: puts together who asks for KV that lies elsewhere and who answers here."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from kunserve_sgl.errors import InvariantError
from kunserve_sgl.exchange.attention_service import AttentionService, PartAttention
from kunserve_sgl.exchange.memory_reads import ReadService
from kunserve_sgl.exchange.memory_service import MemoryService
from kunserve_sgl.exchange.message_limits import most_answer_bytes, most_order_bytes
from kunserve_sgl.exchange.offer_messages import OfferMessages
from kunserve_sgl.exchange.peer_link import PeerLink
from kunserve_sgl.exchange.remote_attention import RemoteAttention
from kunserve_sgl.exchange.work import TurnKind
from kunserve_sgl.exchange.work_check import Limits
from kunserve_sgl.replica.loans import Loans
from kunserve_sgl.replica.orders_away import OrdersAway
from kunserve_sgl.replica.turns import Turns
from kunserve_sgl.wire.curve import Curve


class KvElsewhere:
    """Holds both ends of one rank, each between its loans and its peers."""

    def __init__(
        self,
        link: PeerLink,
        loans: Loans,
        away: OrdersAway,
        turns: Turns,
        all_ranks: Callable[[bool], bool],
        replicas: int,
        layers: int,
        attention: PartAttention,
        offers: OfferMessages,
        bind_address: str,
        address_of: Callable[[int], str],
        curve: Curve | None,
        limits: Limits,
        most_tokens: int,
    ) -> None:
        """`all_ranks` is that of the engine. `offers` takes those that come. Begins to serve at `bind_address`;
        `address_of(replica)` is where the same rank of another does. `curve` has the keys, over TCP. A batch has
        `most_tokens` at most."""
        self._link = link
        self._away = away
        self._turns = turns
        shapes = {attention.shape(layer) for layer in range(layers)}
        answer_bytes = most_answer_bytes(shapes, most_tokens)
        self.remote = RemoteAttention(
            link, loans.homes, address_of, turns.ranks, all_ranks, turns.timeout_s, curve, answer_bytes
        )
        self.remote.why_to_leave = self._why_to_leave
        self.remote.tell_of_waiting = lambda homes, waited_s: away.tell_of_waiting(homes, waited_s)
        self._attention = AttentionService(link.replica, replicas, layers, loans.lent, attention)
        self._reads = ReadService(link.replica, replicas, loans.lent)
        order_bytes = most_order_bytes(limits, shapes, most_tokens)
        self._service = MemoryService(
            bind_address, link.rank, self._attention, self._reads, offers.put, curve, order_bytes
        )
        self.address = self._service.address
        self._service.start()

    def look(self) -> None:
        """Raises InvariantError where nobody is answered here any more, for a reason that nobody expected."""
        if self._service.failure:
            raise InvariantError(f"memory is not given to others any more: {self._service.failure}")

    def forget(self, peer: int) -> None:
        """Closes the way to a peer whose processes have ended, and forgets what they have asked for."""
        self.remote.forget(peer)
        self._attention.forget(peer)

    def close(self) -> None:
        """Closes all sockets, and ends the thread that serves. Raises TransientError as `MemoryService.close`."""
        self.remote.close()
        self._service.close()

    def report(self) -> dict[str, Any]:
        """Counts the orders that were sent and answered and the bytes that were read here since the start, by peer."""
        return {
            "orders_sent": self.remote.report(),
            "orders_answered": self._attention.report(),
            "bytes_given": self._reads.report(),
        }

    def _why_to_leave(self) -> str:
        """Says why an answer is not to be waited for: this replica is to recover. Rank 0 knows and tells the others,
        each of which waits for answers of its own."""
        if self._turns.leads and self._away.is_called_off():
            self._turns.announce(TurnKind.CALL_OFF)
            return f"replica {self._link.replica} is to recover"
        return "rank 0 is to recover" if self._link.is_called_off else ""
