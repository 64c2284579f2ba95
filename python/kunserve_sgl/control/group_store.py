"""The store over which ranks on several machines make the process groups that send activations: the coordinator's end.

It stands in for a file that all can open, and for torch's own store, which takes orders from anybody on all interfaces.
It knows small values by name, answers each order at once, and waits for nobody: who waits for a value asks again.
"""

from __future__ import annotations

import msgspec
import zmq

from kunserve_sgl.args import KunserveOptions
from kunserve_sgl.control.addresses import group_store_bind_address
from kunserve_sgl.wire.curve import Curve
from kunserve_sgl.wire.rejections import BadMessageError, Rejections, Sender, require, require_count, require_range
from kunserve_sgl.wire.store_messages import (
    MOST_KEY_BYTES,
    MOST_KEYS,
    MOST_MESSAGE_BYTES,
    MOST_SUM,
    MOST_VALUE_BYTES,
    KeyOwners,
    StoreAnswer,
    StoreOrder,
    owners_of,
)

# What two ranks leave behind with one attempt is about ten; older ones than so many are forgotten.
MOST_KEPT = 1024
_MOST_AT_ONCE = 100  # orders; the controller has other things to do, too


class GroupStore:
    """Answers orders that come to `socket`, each from a rank that has keys of the deployment."""

    def __init__(self, bind_address: str, curve: Curve, rejections: Rejections, replicas: int) -> None:
        """Binds `bind_address`; others connect to `address`."""
        self._curve = curve
        self._rejections = rejections
        self.socket = curve.context.socket(zmq.ROUTER)
        for option, value in ((zmq.LINGER, 0), (zmq.MAXMSGSIZE, MOST_MESSAGE_BYTES)):
            self.socket.setsockopt(option, value)
        curve.listen(self.socket)
        self.socket.bind(bind_address)
        self.address = self.socket.getsockopt_string(zmq.LAST_ENDPOINT)
        self._decoder: msgspec.msgpack.Decoder[StoreOrder] = msgspec.msgpack.Decoder(StoreOrder)
        self._incarnations = [0] * replicas
        self._books: dict[KeyOwners, dict[str, bytes]] = {}

    def expect(self, replica: int, incarnation: int) -> None:
        """Forgets what `replica` and its peers have told each other, and takes from now on only what is for this
        incarnation of it. Who still waits for an earlier one is refused."""
        self._incarnations[replica] = incarnation
        self._books = {owners: book for owners, book in self._books.items() if replica not in owners.replicas}

    def serve(self) -> None:
        """Answers what has come, unless that is a great many."""
        for _ in range(_MOST_AT_ONCE):
            try:
                frames = self.socket.recv_multipart(zmq.NOBLOCK, copy=False)
            except zmq.Again:
                return
            answer = self._answer(frames[-1].buffer, self._curve.sender_of(frames[-1]))
            if answer is not None:
                self.socket.send_multipart([frames[0].bytes, msgspec.msgpack.encode(answer)], zmq.NOBLOCK)

    def close(self) -> None:
        """Closes the socket; what was not answered is not."""
        self.socket.close(linger=0)

    def _answer(self, payload: memoryview, sender: Sender) -> StoreAnswer | None:
        """Returns the answer, None for what cannot be read or is nobody's to say."""
        order = self._rejections.read(self._decoder, payload, lambda order: self._check(order, sender))
        if order is None:
            return None
        owners = owners_of(order.keys[0])
        assert owners is not None
        current = tuple(self._incarnations[replica] for replica in owners.replicas)
        if owners.incarnations != current:
            told = f"replicas {owners.replicas} are in incarnations {current}, and asked for is {owners.incarnations}"
            return StoreAnswer(order.number, error=told)
        book = self._books.setdefault(owners, {})
        try:
            return _carry_out(order, book)
        except BadMessageError as error:
            self._rejections.add(type(order).__name__, error)
            return StoreAnswer(order.number, error=str(error))

    def _check(self, order: StoreOrder, sender: Sender) -> None:
        require(len(order.keys) > 0, "no keys")
        require_count("keys", order.keys, MOST_KEYS if order.action == "check" else 1)
        require_count("bytes of a value", order.value, MOST_VALUE_BYTES)
        require_range("amount", order.amount, -MOST_SUM, MOST_SUM)
        owners = owners_of(order.keys[0])
        for key in order.keys:
            require_count("bytes of a key", key.encode(), MOST_KEY_BYTES)
            require(owners is not None and owners_of(key) == owners, "key {!r:.80}", key)
        assert owners is not None
        assert sender is not None
        require(max(owners.replicas) < len(self._incarnations), "replicas {}", owners.replicas)
        replica, rank = sender
        is_owner = replica in owners.replicas and rank == owners.rank
        require(is_owner, "it is from {}, and about rank {} of replicas {}", sender, owners.rank, owners.replicas)


def group_store_of(
    options: KunserveOptions, curve: Curve | None, rejections: Rejections, replicas: int
) -> GroupStore | None:
    """Returns the store of a deployment whose replicas are on several machines, None where they share a file."""
    if curve is None or not options.is_on_network:
        return None
    return GroupStore(group_store_bind_address(options), curve, rejections, replicas)


def _carry_out(order: StoreOrder, book: dict[str, bytes]) -> StoreAnswer:
    key = order.keys[0]
    if order.action == "check":
        return StoreAnswer(order.number, count=sum(each in book for each in order.keys))
    if order.action == "get":
        return StoreAnswer(order.number, value=book.get(key))
    if order.action == "delete":
        return StoreAnswer(order.number, count=0 if book.pop(key, None) is None else 1)
    if order.action == "set":
        _write(book, key, order.value)
        return StoreAnswer(order.number)
    total = _number(book.get(key, b"0")) + order.amount
    require_range("sum", total, -MOST_SUM, MOST_SUM)
    if order.amount or key not in book:
        _write(book, key, str(total).encode())
    return StoreAnswer(order.number, count=total)


def _number(value: bytes) -> int:
    try:
        return int(value)
    except ValueError:
        raise BadMessageError(f"{value[:20]!r} is no number to add to") from None


def _write(book: dict[str, bytes], key: str, value: bytes) -> None:
    """Writes a value, and forgets the one that was written first where there are too many."""
    book.pop(key, None)
    book[key] = value
    if len(book) > MOST_KEPT:
        del book[next(iter(book))]
