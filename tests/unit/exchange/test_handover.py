"""When a rank begins to receive activations: when it hears that they were sent, whatever it takes first."""

from __future__ import annotations

import threading
from datetime import timedelta
from pathlib import Path

import pytest
import torch
from torch._C._distributed_c10d import FileStore

from kunserve_sgl.errors import InvariantError, TransientError
from kunserve_sgl.exchange.collective_groups import DirectedGroups, GroupMaker
from kunserve_sgl.exchange.collective_transport import CollectiveTransport
from kunserve_sgl.exchange.handover import CollectiveHandover
from kunserve_sgl.exchange.work import Answer, TensorNote
from waiting import wait_until

NOTES = (TensorNote("hidden", "float32", (2, 4)),)
SIZE_BYTES = 64  # of those, with the padding behind them
TIMEOUT_S = 120.0


class FakeTransfer:
    """Ends when the group lets it."""

    def __init__(self, group: FakeGroup) -> None:
        self._group = group

    def wait(self, timeout: timedelta) -> None:
        assert self._group.comes.wait(timeout.total_seconds())
        if self._group.error:
            raise RuntimeError(self._group.error)


class FakeGroup:
    """Notes what a process group is told to do. What it receives is full of the number of the message."""

    def __init__(self) -> None:
        self.log: list[str] = []
        self.received = 0
        self.error = ""
        self.comes = threading.Event()
        self.comes.set()

    def send(self, tensors: list[torch.Tensor], to: int, tag: int) -> FakeTransfer:
        raise AssertionError("nothing is sent")

    def recv(self, tensors: list[torch.Tensor], source: int, tag: int) -> FakeTransfer:
        self.received += 1
        tensors[0].fill_(self.received)
        self.log.append(f"receive {len(tensors[0])} bytes")
        return FakeTransfer(self)

    def abort(self) -> None:
        pass


@pytest.fixture
def group(monkeypatch: pytest.MonkeyPatch) -> FakeGroup:
    fake = FakeGroup()
    monkeypatch.setattr(GroupMaker, "make", lambda *_: DirectedGroups(fake, fake))  # type: ignore[arg-type]
    return fake


@pytest.fixture
def transport(group: FakeGroup, tmp_path: Path) -> CollectiveTransport:
    made = CollectiveTransport(
        FileStore(str(tmp_path / "store")), 1, 0, backend="gloo", device=torch.device("cpu"), timeout_s=TIMEOUT_S
    )
    made.connect([0])
    return made


def answer(batch: int, notes: tuple[TensorNote, ...] = NOTES, host: int = 0) -> Answer:
    return Answer(host, 1, batch, notes, "")


def test_receiving_begins_with_the_message_and_nobody_waits_there(
    group: FakeGroup, transport: CollectiveTransport
) -> None:
    """A send by NCCL keeps the sender's GPU busy until its receive is there, so that comes before anything that may
    wait for a device."""
    handover = CollectiveHandover(transport)
    group.comes.clear()
    for batch in (5, 6):
        handover.arrived(answer(batch))
        assert not handover.has_come(answer(batch))
    assert group.log == [f"receive {SIZE_BYTES} bytes"] * 2
    group.comes.set()
    wait_until(lambda: handover.has_come(answer(6)), "what was sent")
    assert handover.has_come(answer(5))


def test_batches_are_taken_in_any_order_and_get_their_own_tensors(
    group: FakeGroup, transport: CollectiveTransport
) -> None:
    handover = CollectiveHandover(transport)
    for batch in (5, 6, 7):
        handover.arrived(answer(batch))
    taken = {}
    for batch in (6, 7, 5):
        hidden = handover.take(answer(batch), 0)["hidden"]
        assert hidden is not None
        taken[batch] = int(hidden.view(torch.uint8).unique())
    assert taken == {5: 1, 6: 2, 7: 3}
    with pytest.raises(InvariantError, match="batch 5 of replica 1 has not arrived"):
        handover.take(answer(5), 0)


def test_messages_without_activations_receive_nothing(group: FakeGroup, transport: CollectiveTransport) -> None:
    handover = CollectiveHandover(transport)
    handover.arrived(answer(1, ()))
    empty = (TensorNote("hidden", "float32", (0, 4)), TensorNote("residual", "none", ()))
    handover.arrived(answer(2, empty))
    tensors = handover.take(answer(2, empty), 0)
    assert tensors["hidden"] is not None
    assert (tensors["hidden"].shape, tensors["residual"]) == ((0, 4), None)
    assert group.log == []


def test_what_goes_wrong_is_raised_where_the_batch_is_taken(group: FakeGroup, transport: CollectiveTransport) -> None:
    """The inbox goes on: a layer host answers with the error, an owner ends."""
    handover = CollectiveHandover(transport)
    handover.arrived(answer(1, host=2))
    with pytest.raises(TransientError, match="not connected to replica 2"):
        handover.take(answer(1, host=2), 0)
    group.error = "connection reset"
    handover.arrived(answer(2))
    with pytest.raises(TransientError, match="activations from replica 0: connection reset"):
        handover.take(answer(2), 0)
    handover.arrived(answer(4))
    with pytest.raises(TransientError, match="connection reset"):
        wait_until(lambda: handover.has_come(answer(4)), "what was sent")
    with pytest.raises(TransientError, match="disconnected"):
        handover.has_come(answer(4))
    transport.close()
    handover.arrived(answer(3))
    with pytest.raises(TransientError, match="has closed its connections"):
        handover.take(answer(3), 0)
