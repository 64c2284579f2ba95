"""A store of torch's for making process groups across machines: asks that of the coordinator, over a socket with keys.

torch calls it from several threads, some of its own. Each call is one question and one answer, but for those that wait
for a value, which ask again until it is there. Nothing waits past a deadline.
"""

from __future__ import annotations

import math
import threading
import time
from datetime import timedelta
from typing import cast

import msgspec
import zmq
from torch._C._distributed_c10d import Store
from torch.distributed import DistStoreError
from typing_extensions import override

from kunserve_sgl.errors import TransientError
from kunserve_sgl.exits import CONTROLLER_PATIENCE_S
from kunserve_sgl.wire.asking import NOBODY_TO_ASK, connect_asker
from kunserve_sgl.wire.curve import Curve
from kunserve_sgl.wire.rejections import COORDINATOR
from kunserve_sgl.wire.store_messages import MOST_MESSAGE_BYTES, Action, StoreAnswer, StoreOrder

_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.002, 0.05  # between two questions for what is not there yet


class SocketStore(Store):
    """Is one rank's view of the store. Values are bytes, and small. Each of torch's stores has a `timeout`. A call that
    waits for a value for so long raises DistStoreError, and so does any that gets no answer; one that is refused raises
    TransientError. Keep this object as long as torch uses the store: torch keeps only its own part of it."""

    def __init__(self, address: str, curve: Curve) -> None:
        """`address` is that of the coordinator's store. Connects, and waits for nobody."""
        super().__init__()
        self._socket = connect_asker(address, COORDINATOR, curve, MOST_MESSAGE_BYTES)
        self._one_at_a_time = threading.Lock()
        self._number = 0
        self._decoder: msgspec.msgpack.Decoder[StoreAnswer] = msgspec.msgpack.Decoder(StoreAnswer)

    @override
    def set(self, key: str, value: str | bytes) -> None:
        self._ask("set", [key], value=value.encode() if isinstance(value, str) else bytes(value))

    @override
    def get(self, key: str) -> bytes:
        pauses = _Pauses(self._timeout)
        while (value := self._ask("get", [key], deadline_s=pauses.deadline_s).value) is None:
            pauses.pause(key)
        return value

    @override
    def add(self, key: str, amount: int) -> int:
        return self._ask("add", [key], amount=amount).count

    @override
    def check(self, keys: list[str]) -> bool:
        return self._ask("check", keys).count == len(keys)

    @override
    def delete_key(self, key: str) -> bool:
        return self._ask("delete", [key]).count > 0

    deleteKey = delete_key  # the name by which torch finds it, as it does for NCCL

    @override
    def wait(self, keys: list[str], timeout: timedelta | None = None) -> None:
        pauses = _Pauses(self._timeout if timeout is None else timeout)
        while self._ask("check", keys, deadline_s=pauses.deadline_s).count < len(keys):
            pauses.pause(", ".join(keys))

    @property
    def _timeout(self) -> timedelta:
        return cast(timedelta, self.timeout)  # type: ignore[attr-defined]  # torch's stubs do not have it

    def close(self) -> None:
        """Closes the socket, when what is being asked has been answered or is overdue."""
        with self._one_at_a_time:
            self._socket.close(linger=0)

    def _ask(
        self, action: Action, keys: list[str], *, value: bytes = b"", amount: int = 0, deadline_s: float = math.inf
    ) -> StoreAnswer:
        deadline_s = min(deadline_s, time.monotonic() + min(CONTROLLER_PATIENCE_S, self._timeout.total_seconds()))
        if not self._one_at_a_time.acquire(timeout=max(0.0, deadline_s - time.monotonic())):
            raise DistStoreError(f"{action} {keys[0]}: another question was not answered in time")
        try:
            self._number += 1
            order = StoreOrder(self._number, action, keys, value, amount)
            self._socket.send(msgspec.msgpack.encode(order), zmq.NOBLOCK)
            answer = self._answer(deadline_s)
        except zmq.Again:
            raise TransientError(f"the store of the coordinator: {NOBODY_TO_ASK}") from None
        except zmq.ZMQError as error:
            raise TransientError(f"the store of the coordinator: {error}") from error
        finally:
            self._one_at_a_time.release()
        if answer is None:
            raise DistStoreError(f"{action} {keys[0]}: the store of the coordinator has not answered in time")
        if answer.error:
            raise TransientError(f"the store of the coordinator refuses {action} {keys[0]}: {answer.error}")
        return answer

    def _answer(self, deadline_s: float) -> StoreAnswer | None:
        """Returns the answer to the last question, None where it is overdue; leaves out answers that were."""
        while True:
            left_ms = max(0, int(1000 * (deadline_s - time.monotonic())) + 1)
            if not self._socket.poll(left_ms):
                return None
            answer = self._decoder.decode(self._socket.recv())
            if answer.number == self._number:
                return answer


class _Pauses:
    """Waits between two questions, longer each time."""

    def __init__(self, timeout: timedelta) -> None:
        self.deadline_s = time.monotonic() + timeout.total_seconds()
        self._next_s = _FIRST_PAUSE_S

    def pause(self, what: str) -> None:
        """Waits a moment. Raises DistStoreError where all the time has passed."""
        left_s = self.deadline_s - time.monotonic()
        if left_s <= 0:
            raise DistStoreError(f"{what}: nobody has set that in time")
        time.sleep(min(self._next_s, left_s))
        self._next_s = min(2 * self._next_s, _LONGEST_PAUSE_S)
