"""The link of one rank to its peers: one inbox, one outbox per peer, and orders kept in the order they came.

Nothing here blocks: `poll` waits for at most the time it is given, and sending drops into a queue. A message that
passes a batch on counts as received when its activations are here too, so that who acts on it waits for nobody.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from typing import Protocol, TypeVar, cast

import msgspec
import zmq

from kunserve_sgl.errors import BatchCalledOffError, InvariantError, TransientError
from kunserve_sgl.exchange.rank_agreement import RankAgreement, have_of
from kunserve_sgl.exchange.work import Answer, CopySlots, Have, Message, PeerOrder, Turn, TurnKind, Work
from kunserve_sgl.wire.curve import Curve
from kunserve_sgl.wire.framing import CONTROL, MOST_CONTROL_BYTES, WORK
from kunserve_sgl.wire.rejections import UNREADABLE, Rejections, Sender, require_range

_POLL_SLICE_MS = 1000
# As plain numbers: the inbox is looked into several times in a step, and zmq's flags take longer than the look.
_EVENTS, _READABLE, _NOW, _WAIT = int(zmq.EVENTS), int(zmq.POLLIN), int(zmq.NOBLOCK), 0
# Far more than anybody who waits for answers sends: a transition has eight phases, a batch a few dozen pieces.
_MOST_CONTROL = 1000
_MOST_ORDERS = 1000
_SHORTEST_PAUSE_S, _LONGEST_PAUSE_S = 2e-5, 1e-3  # between looks at activations, which no poller can wait for
_PASSING_ON, _ORDERS = (Work, Answer), (Work, CopySlots)
_T = TypeVar("_T")


class Arrivals(Protocol):
    """Says what the link has to know of activations; see `exchange.handover.Handover`."""

    def arrived(self, message: Work | Answer) -> None:
        """Takes note of a message that passes a batch on, in the order in which they arrive."""

    def has_come(self, message: Work | Answer) -> bool:
        """Tells whether the activations of the message are here. Raises TransientError where they will never be."""
        ...


class _AllHere(Arrivals):
    def arrived(self, message: Work | Answer) -> None:
        pass

    def has_come(self, message: Work | Answer) -> bool:
        return True


class PeerLink:
    """Holds the sockets of one rank. `replica` and `rank` say who this is; the peers are the same rank of other
    replicas, and the other ranks of this replica."""

    def __init__(
        self,
        replica: int,
        rank: int,
        inbox_address: str,
        rejections: Rejections | None = None,
        curve: Curve | None = None,
        most_bytes: int = MOST_CONTROL_BYTES,
    ) -> None:
        """Binds `inbox_address`, which takes no message of more than `most_bytes`."""
        self._curve = curve
        self.rejections = rejections or Rejections()
        self.replica = replica
        self.rank = rank
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context.instance() if curve is None else curve.context
        self.inbox = self._context.socket(zmq.PULL)
        self.inbox.setsockopt(zmq.RCVHWM, 0)
        self.inbox.setsockopt(zmq.MAXMSGSIZE, most_bytes)
        if curve is not None:
            curve.listen(self.inbox)
        self.inbox.bind(inbox_address)
        self.address = self.inbox.getsockopt_string(zmq.LAST_ENDPOINT)
        self._patience_ms = 0  # of the inbox; see `_wait_for_message`
        self._outboxes: dict[tuple[int, int], zmq.Socket[bytes]] = {}
        self._encoder = msgspec.msgpack.Encoder()
        self._decoder: msgspec.msgpack.Decoder[Message] = msgspec.msgpack.Decoder(Message)
        self._orders: dict[int, deque[PeerOrder]] = {}  # by owner; whoever was served last comes last
        self._answers: dict[int, Answer] = {}
        self._agreement = RankAgreement()  # of use at rank 0
        self._turns: deque[Turn] = deque()
        self._control: deque[tuple[bytes, Sender]] = deque()
        # Behind rank 0: that has said that what runs is given up. `forget_answers` ends it.
        self.is_called_off = False
        self._check: Callable[[Message, Sender], None] = lambda message, sender: None
        self._arrivals: Arrivals = _AllHere()
        self._on_failure: Callable[[int, str], None] = lambda host, reason: None
        self._coming: dict[int, deque[Work | Answer]] = {}  # by sender: of the first, activations are on their way

    def connect(self, inboxes: Sequence[Sequence[str]]) -> None:
        """Opens a way to every peer that has none yet; `inboxes[r][k]` is the address of rank k of replica r. It waits
        for nobody."""
        self._agreement.ranks = len(inboxes[self.replica])
        for replica, addresses in enumerate(inboxes):
            for rank, address in enumerate(addresses):
                is_peer = (replica == self.replica) != (rank == self.rank)
                if is_peer and (replica, rank) not in self._outboxes:
                    outbox = self._context.socket(zmq.PUSH)
                    outbox.setsockopt(zmq.LINGER, 0)
                    outbox.setsockopt(zmq.SNDHWM, 0)
                    if self._curve is not None:
                        self._curve.call(outbox, (replica, rank))
                    outbox.connect(address)
                    self._outboxes[replica, rank] = outbox

    def forget(self, replica: int) -> None:
        """Closes the ways to `replica`, and drops the orders of it that wait here. What was sent to it and has not left
        yet is lost. `connect` opens new ways."""
        for peer in [peer for peer in self._outboxes if peer[0] == replica != self.replica]:
            self._outboxes.pop(peer).close(linger=0)
        self._orders.pop(replica, None)
        self._agreement.forget_orders_of(replica)
        self._keep_coming(lambda message: message.host != replica and message.owner != replica)

    def wait_for_activations(self, arrivals: Arrivals, on_failure: Callable[[int, str], None]) -> None:
        """Holds messages back until their activations are here. Where these will never be, the message is dropped, and
        `on_failure` called with the replica that sent it, and the reason."""
        self._arrivals, self._on_failure = arrivals, on_failure

    def check_with(self, check: Callable[[Message, Sender], None]) -> None:
        """Ignores messages for which `check` raises BadMessageError."""
        self._check = check

    def close(self) -> None:
        """Closes all sockets at once; what was not sent yet is dropped."""
        for socket in (self.inbox, *self._outboxes.values()):
            socket.close(linger=0)
        self._outboxes.clear()

    def send(self, replica: int, message: Message, rank: int | None = None) -> None:
        """Queues `message` for the same rank of another replica, or for `rank` of this one, and waits for nobody. Every
        peer has been connected before."""
        outbox = self._outboxes[replica, self.rank if rank is None else rank]
        outbox.send(WORK + self._encoder.encode(message), _NOW)

    def poll(self, timeout_ms: int) -> None:
        """Takes in what has arrived; waits up to `timeout_ms` for a first message, or for activations that come. A wait
        that an answer ends may leave what came behind it."""
        if self._coming:
            if not self._take_in_what_has_come() and timeout_ms:
                self._sleep(timeout_ms)
        elif timeout_ms and (not self._wait_for_message(timeout_ms) or self._answers):
            return  # an answer is what most wait for; what came behind it is taken in at the next look
        while self._has_message():
            self._take_in_message(*self._receive(_NOW))

    def _wait_for_message(self, timeout_ms: int) -> bool:
        """Takes in the next message. Returns whether one has come in time."""
        if timeout_ms != self._patience_ms:
            self._patience_ms = timeout_ms
            self.inbox.setsockopt(zmq.RCVTIMEO, timeout_ms)
        try:
            data, sender = self._receive(_WAIT)  # one call, where a poller takes a second one for the message
        except zmq.Again:
            return False
        self._take_in_message(data, sender)
        return True

    def _sleep(self, timeout_ms: int) -> None:
        """Waits for a message, or for activations that come."""
        ends_at_s, pause_s = time.monotonic() + timeout_ms / 1000, _SHORTEST_PAUSE_S
        while not self._has_message():
            if self._take_in_what_has_come() or time.monotonic() >= ends_at_s:
                return
            time.sleep(pause_s)
            pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)

    def _has_message(self) -> bool:
        return bool(int(self.inbox.getsockopt(_EVENTS)) & _READABLE)

    def _receive(self, flags: int) -> tuple[bytes, Sender]:
        """Returns the next message, and its sender. What comes in parts is several messages."""
        if self._curve is None:
            return self.inbox.recv(flags), None
        frame = self.inbox.recv(flags, copy=False)
        return frame.bytes, self._curve.sender_of(frame)

    def _take_in_message(self, data: bytes, sender: Sender) -> None:
        if data[:1] == WORK:
            self._take_in(memoryview(data)[1:], sender)
        elif data[:1] == CONTROL:
            self._take_in_control(data[1:], sender)
        else:
            self.rejections.add(UNREADABLE, "it does not say what it is about")

    def _take_in_control(self, payload: bytes, sender: Sender) -> None:
        if self.rank != 0 or len(self._control) >= _MOST_CONTROL:
            self.rejections.add(UNREADABLE, "orders go to rank 0, and not so many")
        else:
            self._control.append((payload, sender))

    def _take_in(self, payload: memoryview, sender: Sender) -> None:
        def check(message: Message) -> None:
            self._check(message, sender)
            if isinstance(message, _ORDERS):
                require_range("orders of one owner", self._waiting_of(message.owner), 0, _MOST_ORDERS)

        message = self.rejections.read(self._decoder, payload, check)
        if message is None:
            return
        if isinstance(message, _PASSING_ON):
            self._arrivals.arrived(message)
            if message.host in self._coming or not self._take_in_if_come(message):
                self._coming.setdefault(message.host, deque()).append(message)
        elif isinstance(message, Turn):
            if message.kind is TurnKind.CALL_OFF:
                self.is_called_off = True
            else:
                self._turns.append(message)
        elif isinstance(message, Have):
            self._deliver(self._agreement.note(message))
        else:
            self._receive_whole(message)

    def _waiting_of(self, owner: int) -> int:
        """Counts the orders of `owner` that have come and have not been taken out."""
        waiting = len(self._orders.get(owner, ()))
        if self.holds_back:
            waiting += self._agreement.held_of(owner)
            waiting += sum(each.owner == owner for coming in self._coming.values() for each in coming)
        return waiting

    def _take_in_if_come(self, message: Work | Answer) -> bool:
        """Returns whether the activations of the message have come, or will never come."""
        try:
            if not self._arrivals.has_come(message):
                return False
        except TransientError as error:
            self._on_failure(message.host, str(error))
        else:
            self._receive_whole(message)
        return True

    def _take_in_what_has_come(self) -> bool:
        """Returns whether the activations of any message have come, or will never come."""
        is_any = False
        for host, coming in tuple(self._coming.items()):
            while coming:
                if not self._take_in_if_come(coming[0]):
                    break
                coming.popleft()
                is_any = True
            else:
                del self._coming[host]
        return is_any

    def _keep_coming(self, is_kept: Callable[[Work | Answer], bool]) -> None:
        kept = {host: deque(filter(is_kept, coming)) for host, coming in self._coming.items()}
        self._coming = {host: coming for host, coming in kept.items() if coming}

    def _receive_whole(self, message: PeerOrder | Answer) -> None:
        if self.rank == 0:
            self._deliver(self._agreement.receive(message))
        else:
            self._deliver(message)
            self.send(self.replica, have_of(message, self.rank), 0)

    def _deliver(self, message: PeerOrder | Answer | None) -> None:
        if isinstance(message, Answer):
            self._answers[message.batch] = message
        elif message is not None:
            self._orders.setdefault(message.owner, deque()).append(message)

    def take_control(self) -> list[tuple[bytes, Sender]]:
        """Returns what the coordinator sent since the last call, undecoded, and who sent it."""
        taken = list(self._control)
        self._control.clear()
        return taken

    @property
    def has_control(self) -> bool:
        """Tells whether `take_control` would return anything, as far as the inbox has been looked into."""
        return bool(self._control)

    def take_order(self) -> PeerOrder | None:
        """Returns an order of the owner that has not been served for longest, None where no order waits. Orders of one
        owner come in the order in which it sent them."""
        for owner, orders in self._orders.items():
            if orders:
                self._orders[owner] = self._orders.pop(owner)
                return orders.popleft()
        return None

    def take_one_order_per_owner(self) -> list[PeerOrder]:
        """Returns the oldest order of each owner that waits here, so that nobody is served twice before the own
        batch."""
        return [order for _ in range(sum(map(bool, self._orders.values()))) if (order := self.take_order()) is not None]

    def put_back(self, order: PeerOrder) -> None:
        """Puts back an order that was taken out and not finished. It is the first of its owner's orders again, so that
        it is taken before what that owner sent later."""
        self._orders[order.owner].appendleft(order)

    def forget_orders_but(self, owners: Iterable[int]) -> None:
        """Drops the orders that wait here, except those of `owners`."""
        kept = set(owners)
        self._agreement.forget_orders_but(kept)
        self._keep_coming(lambda message: isinstance(message, Answer) or message.owner in kept)
        self._orders = {owner: orders for owner, orders in self._orders.items() if owner in kept}

    @property
    def holds_back(self) -> bool:
        """Tells whether something has come whose activations are on their way, or to rank 0 that other ranks of the
        replica have not said to have."""
        return self._agreement.holds_back or bool(self._coming)

    @property
    def order_count(self) -> int:
        """Counts the orders that wait here."""
        return sum(map(len, self._orders.values()))

    def take_answer(self, batch: int) -> Answer | None:
        """Returns the answer to the own order of that number, once; None where it has not been taken in."""
        return self._answers.pop(batch, None)

    def forget_answers(self) -> None:
        """Drops the answers that nobody has taken, and takes nothing to be called off."""
        self._answers.clear()
        self.is_called_off = False
        self._agreement.forget_answers()
        self._keep_coming(lambda message: isinstance(message, Work))

    # What the ranks behind rank 0 wait for; rank 0 of their own replica is never far behind or ahead.

    def wait_turn(self, deadline_s: float) -> Turn:
        """Returns the next turn that rank 0 of this replica announced. `deadline_s` is on time.monotonic. Raises
        TransientError when it passes, and BatchCalledOffError where rank 0 leaves the own batch; so do the others."""
        turn = self._wait(lambda: self._turns.popleft() if self._turns else None, deadline_s, "rank 0's next turn")
        if turn.kind is TurnKind.LEAVE:
            raise BatchCalledOffError(f"rank 0 of replica {self.replica} leaves the own batch")
        return turn

    def wait_order(self, owner: int, batch: int, deadline_s: float) -> PeerOrder:
        """Returns the order of that owner and number, and takes it out, also if others came before it. `deadline_s` is
        on time.monotonic. Raises TransientError when it passes."""

        def find() -> PeerOrder | None:
            orders = self._orders.get(owner, ())
            for order in orders:
                if order.batch == batch:
                    self._orders[owner].remove(order)
                    return order
            return None

        return cast(PeerOrder, self._wait_for_peer(find, deadline_s, f"batch {batch} of replica {owner}"))

    def wait_answer(self, batch: int, deadline_s: float) -> Answer:
        """Returns the answer to the own order of that number. `deadline_s` is on time.monotonic. Raises TransientError
        when it passes."""
        return self._wait_for_peer(lambda: self.take_answer(batch), deadline_s, f"the answer to batch {batch}")

    def wait_leave(self, deadline_s: float) -> None:
        """Drops turns until rank 0 leaves the own batch, and raises BatchCalledOffError; returns at `deadline_s`, on
        time.monotonic."""
        while (left_s := deadline_s - time.monotonic()) > 0:
            while self._turns:
                if self._turns.popleft().kind is TurnKind.LEAVE:
                    raise BatchCalledOffError(f"rank 0 of replica {self.replica} leaves the own batch")
            self.poll(min(_POLL_SLICE_MS, max(1, int(1000 * left_s))))

    def _wait_for_peer(self, find: Callable[[], _T | None], deadline_s: float, what: str) -> _T:
        """Waits as `_wait`. The peer may be dead: raises BatchCalledOffError where rank 0 has gone on, to leave."""

        def find_unless_left() -> _T | None:
            if any(turn.kind is TurnKind.LEAVE for turn in self._turns):
                self._turns.clear()
                raise BatchCalledOffError(f"rank 0 of replica {self.replica} leaves the own batch")
            return find()

        return self._wait(find_unless_left, deadline_s, what)

    def _wait(self, find: Callable[[], _T | None], deadline_s: float, what: str) -> _T:
        while (found := find()) is None:
            left_s = deadline_s - time.monotonic()
            if left_s <= 0:
                raise TransientError(f"replica {self.replica} rank {self.rank}: {what} did not come in time")
            self.poll(min(_POLL_SLICE_MS, max(1, int(1000 * left_s))))
        return found


def require_own(order: PeerOrder, replica: int) -> None:
    """Raises InvariantError where `order` was meant for another replica."""
    if isinstance(order, Work) and order.segments[0].host != replica:
        raise InvariantError(f"replica {replica} received a segment for replica {order.segments[0].host}")
    if isinstance(order, CopySlots) and order.owner == replica:
        raise InvariantError(f"replica {replica} received its own order to copy slots")
