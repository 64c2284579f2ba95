"""What answers peers on a GPU: in a stream of its own, which waits for no batch, and done when it has answered."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch

from kunserve_sgl.cpu_attention.paged_attention import plan_part
from kunserve_sgl.cuda_attention import part_kernel
from kunserve_sgl.exchange.attention_parts import PartSlots, divide_batch
from kunserve_sgl.exchange.attention_service import AttentionService, BatchPart, PartAttention
from kunserve_sgl.exchange.attention_work import KEY, LSE, OUTPUT, QUERY, VALUE, AttentionShape
from kunserve_sgl.exchange.device_copies import fill, fill_rows, on_device, on_host
from kunserve_sgl.exchange.kv_homes import KvHomes, RemoteKv
from kunserve_sgl.exchange.memory_reads import ReadService
from kunserve_sgl.exchange.memory_service import MemoryService
from kunserve_sgl.exchange.peer_link import PeerLink
from kunserve_sgl.exchange.remote_attention import RemoteAttention
from kunserve_sgl.exchange.tensor_layout import Activations
from kunserve_sgl.memory.slot_space import SlotRange

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU with its driver"),
]

HOST, HOME = 0, 1
SLOTS, HEADS, DIM = 256, 4, 64
SHAPE = AttentionShape(HEADS, HEADS, DIM, DIM, DIM, "bfloat16")
DEADLINE_S = 60.0
BUSY_CYCLES = 4_000_000_000  # of the GPU's clock: 2 s and more


class Home(PartAttention):
    """KV of one layer, all of it lent."""

    def __init__(self) -> None:
        self.device = torch.device("cuda", torch.cuda.current_device())
        self.key, self.value = (
            torch.randn(SLOTS, HEADS, DIM, dtype=torch.bfloat16, device=self.device) for _ in range(2)
        )
        self.streams: set[int] = set()

    def shape(self, layer: int) -> AttentionShape:
        return SHAPE

    def part(self, slots: PartSlots) -> BatchPart:
        return Part(self, slots)

    @contextmanager
    def held(self, borrower: int, layer: int, loans: Sequence[int]) -> Iterator[list[SlotRange]]:
        yield [SlotRange(0, SLOTS)]

    @contextmanager
    def held_bytes(self, borrower: int, loan: int, *, writes: bool = False) -> Iterator[Sequence[torch.Tensor]]:
        yield ()


class Part(BatchPart):
    def __init__(self, home: Home, slots: PartSlots) -> None:
        self.home = home
        self.tables = part_kernel.tables_of(plan_part(*slots.arrays), home.device)
        (self.new_slots,) = on_device(home.device, slots.new_slots)

    def attend(self, layer: int, tensors: Activations) -> Activations:
        home = self.home
        home.streams.add(torch.cuda.current_stream().cuda_stream)
        for memory, new in ((home.key, tensors[KEY]), (home.value, tensors[VALUE])):
            if new is not None:
                memory[self.new_slots] = new
        query = tensors[QUERY]
        assert query is not None
        output, lse = part_kernel.attend(self.tables, query, home.key, home.value, scale=DIM**-0.5)
        return {OUTPUT: output, LSE: lse}


@pytest.fixture
def both(tmp_path: Path) -> Iterator[tuple[RemoteAttention, Home]]:
    home, address = Home(), f"ipc://{tmp_path}/home"
    service = MemoryService(
        address, 0, AttentionService(HOME, 2, 1, home, home), ReadService(HOME, 2, home), lambda offer: None
    )
    service.start()
    link = PeerLink(HOST, 0, f"ipc://{tmp_path}/inbox")
    homes = KvHomes(HOST, [RemoteKv(SlotRange(0, SLOTS), 0, HOME, 1)])
    remote = RemoteAttention(link, lambda: homes, lambda replica: address, 1, bool, DEADLINE_S)
    try:
        yield remote, home
    finally:
        remote.close()
        service.close()
        link.close()


def ask(remote: RemoteAttention, home: Home, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """One request of so many tokens, the last of which is new; returns what has come, and what should have."""
    lengths, slots = np.array([length]), np.arange(1, length + 1, dtype=np.int32)
    division = remote.divide(0, slots, lengths, np.ones(1, np.int64))
    assert division is not None
    query, key, value = (torch.randn(1, HEADS, DIM, dtype=torch.bfloat16, device=home.device) for _ in range(3))
    answers = remote.collect(remote.ask(division, 0, SHAPE, query, key, value))
    assert answers is not None
    found = answers[HOME][OUTPUT]
    assert found is not None
    keys, values = torch.cat([home.key[1:length], key]), torch.cat([home.value[1:length], value])
    expected = torch.nn.functional.scaled_dot_product_attention(
        *(each.float().transpose(0, 1).unsqueeze(0) for each in (query, keys, values))
    )
    return found, expected.squeeze(0).transpose(0, 1)


def test_an_answer_waits_for_no_other_stream(both: tuple[RemoteAttention, Home]) -> None:
    """As where a collective in the stream of batches waits for the rank that has asked."""
    remote, home = both
    torch.testing.assert_close(*ask(remote, home, 40), rtol=0, atol=3e-2)  # compiles
    asking, busy = torch.cuda.Stream(), torch.cuda.Stream()  # type: ignore[no-untyped-call]
    torch.cuda.synchronize()
    with torch.cuda.stream(busy):
        torch.cuda._sleep(BUSY_CYCLES)
    with torch.cuda.stream(asking):
        found, expected = ask(remote, home, 100)
        still_busy = not busy.query()
        torch.testing.assert_close(found, expected, rtol=0, atol=3e-2)
    assert still_busy, "the answer came when the other stream had ended"
    assert len(home.streams) == 1
    assert home.streams != {torch.cuda.default_stream().cuda_stream}


def test_what_is_copied_is_there() -> None:
    """Behind a stream that is busy, from a thread of its own."""
    device = torch.device("cuda", torch.cuda.current_device())
    table = torch.zeros(64, 128, dtype=torch.uint8, device=device)
    data = np.random.default_rng(0).integers(256, size=(3, 128), dtype=np.uint8)

    def copy() -> None:
        fill_rows(table, np.array([5, 60, 7]), data.tobytes())
        fill(table[1], data[0].tobytes())

    thread = threading.Thread(target=copy)
    thread.start()
    thread.join(DEADLINE_S)
    assert torch.equal(table[[5, 60, 7, 1]].cpu(), torch.from_numpy(data[[0, 1, 2, 0]]))
    assert on_host(table).numpy().tobytes() == table.cpu().numpy().tobytes()


def test_parts_are_divided_by_what_is_on_the_device() -> None:
    slots = np.arange(1, 11, dtype=np.int32)
    parts = divide_batch(slots, np.array([0] * 4 + [1] * 6), np.array([10]), np.array([3]))
    device = torch.device("cuda", torch.cuda.current_device())
    tokens, new = parts[1].indices(device)
    assert tokens.device.type == new.device.type == "cuda"
    assert tokens.tolist() == new.tolist() == [0, 1, 2]
