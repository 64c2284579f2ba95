"""A layer host and a home on CUDA's side of things, over real messages: the backend's `forward` is SGLang's as long as
all KV is here, and asks the home for what is there. Kernels are interpreted, and the device is the CPU."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from attention_world import Requests, interpret_triton
from sglang.srt.layers.radix_attention import AttentionType, RadixAttention
from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool
from triton.runtime import jit

from kunserve_sgl.cpu_attention.paged_attention import PagedAttention
from kunserve_sgl.errors import ConfigurationError
from kunserve_sgl.exchange.attention_service import AttentionService
from kunserve_sgl.exchange.kv_homes import KvHomes, RemoteKv
from kunserve_sgl.exchange.memory_reads import ReadService
from kunserve_sgl.exchange.memory_service import MemoryService
from kunserve_sgl.exchange.peer_link import PeerLink
from kunserve_sgl.exchange.remote_attention import RemoteAttention
from kunserve_sgl.integration.attention import cuda_backend
from kunserve_sgl.integration.attention.part_attention import _PoolPart
from kunserve_sgl.memory.slot_space import SlotRange

CPU = torch.device("cpu")
HOST, HOME = 0, 1
DEADLINE_S = 300.0
REQUESTS = Requests([40, 30, 9], [1, 1, 1], [[1] * 30 + [0] * 11, [1] * 31, [0] * 10])


class Runner:
    """What is read of a model runner: a rank with the cached KV of one home; everything else is NaN but slot 0."""

    def __init__(self, home: int, **layer: Any) -> None:
        requests, self.dtype = REQUESTS, REQUESTS.dtype
        self.pool = self.token_to_kv_pool = MHATokenToKVPool(
            len(requests.key), 1, requests.dtype, requests.kv_heads, requests.head_dim, layer_num=1, device="cpu",
            enable_memory_saver=False, enable_alt_stream=False,
        )  # fmt: skip
        own = slice(home * requests.span, (home + 1) * requests.span)
        for buffer, there in ((self.pool.k_buffer[0], requests.key), (self.pool.v_buffer[0], requests.value)):
            buffer.fill_(torch.nan)
            buffer[own] = there[own]
            buffer[requests.new_slots] = torch.nan
            buffer[0] = buffer[0].nan_to_num(0.0)
        self.layer = RadixAttention(requests.q_heads, requests.head_dim, requests.scale, requests.kv_heads, 0, **layer)
        self.model = torch.nn.ModuleList([self.layer])
        self.server_args = SimpleNamespace(
            triton_attention_num_kv_splits=2, get_attention_backends=lambda: ("triton", "triton")
        )
        self.req_to_token_pool = SimpleNamespace(req_to_token=requests.table)
        self.undivided: list[Any] = []
        self.attn_backend: Any = SimpleNamespace(forward=self._forward)

    def _forward(self, *arguments: Any, **named: Any) -> torch.Tensor:
        self.undivided.append((arguments, named))
        return torch.zeros(1)

    @contextmanager
    def held(self, borrower: int, layer: int, loans: Sequence[int]) -> Iterator[list[SlotRange]]:
        yield REQUESTS.slots_at(HOME)

    @contextmanager
    def held_bytes(self, borrower: int, loan: int, *, writes: bool = False) -> Iterator[Sequence[torch.Tensor]]:
        yield ()


@pytest.fixture(autouse=True)
def interpreted(monkeypatch: pytest.MonkeyPatch) -> None:
    """One kernel at a time: the interpreter is for one thread."""
    interpret_triton(monkeypatch)
    lock, run = threading.Lock(), jit.JITFunction.run

    def run_alone(*arguments: Any, **named: Any) -> None:
        with lock:
            run(*arguments, **named)

    monkeypatch.setattr(jit.JITFunction, "run", run_alone)


@pytest.fixture
def remote(tmp_path: Path) -> Iterator[RemoteAttention]:
    home = Runner(HOME)
    attention = AttentionService(HOME, 2, 1, home, cuda_backend.part_attention(home, CPU))
    address = f"ipc://{tmp_path}/home"
    service = MemoryService(address, 0, attention, ReadService(HOME, 2, home), lambda offer: None)
    service.start()
    link = PeerLink(HOST, 0, f"ipc://{tmp_path}/inbox")
    here: list[RemoteKv] = []
    found = RemoteAttention(link, lambda: KvHomes(HOST, here), lambda replica: address, 1, bool, DEADLINE_S)
    found.lent = here  # type: ignore[attr-defined]
    try:
        yield found
    finally:
        found.close()
        service.close()
        link.close()


def batch() -> Any:
    lengths = torch.tensor(REQUESTS.lengths)
    mode = SimpleNamespace(is_decode=lambda: True, is_idle=lambda: False)
    return SimpleNamespace(forward_mode=mode, seq_lens=lengths, seq_lens_cpu=lengths, req_pool_indices=REQUESTS.rows)


def tensors() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    new = REQUESTS.new_slots
    return REQUESTS.query.flatten(1), REQUESTS.key[new].flatten(1), REQUESTS.value[new].flatten(1)


def test_what_is_elsewhere_is_asked_for_and_what_is_here_goes_the_backends_way(remote: Any) -> None:
    runner = Runner(HOST)
    cuda_backend.divide(runner, remote, CPU)
    forward = runner.attn_backend.forward
    forward(*tensors(), runner.layer, batch(), False, sinks=None)
    assert len(runner.undivided) == 1
    assert runner.undivided[0][0][5] is False
    remote.lent.append(RemoteKv(REQUESTS.slots_at(HOME)[0], 0, HOME, 7))
    step = batch()
    for _ in range(2):  # two layers of the same shape: the home is told its slots once
        output = forward(*tensors(), runner.layer, step)
        expected, _ = REQUESTS.undivided(PagedAttention(), torch.float32)
        torch.testing.assert_close(output.view_as(expected), expected, rtol=0, atol=1e-5)
    assert len(runner.undivided) == 1
    assert remote.report() == {str(HOME): 2}
    assert runner.token_to_kv_pool.kv_may_be_elsewhere, "no model stores KV past the backend"


def test_both_parts_are_attended_to_at_the_same_time(remote: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    runner = Runner(HOST)
    cuda_backend.divide(runner, remote, CPU)
    remote.lent.append(RemoteKv(REQUESTS.slots_at(HOME)[0], 0, HOME, 7))
    both, attend = threading.Barrier(2, timeout=DEADLINE_S), _PoolPart.attend

    def attend_together(part: Any, layer: int, given: Any) -> Any:
        both.wait()
        return attend(part, layer, given)

    monkeypatch.setattr(_PoolPart, "attend", attend_together)
    output = runner.attn_backend.forward(*tensors(), runner.layer, batch())
    assert remote.report() == {str(HOME): 1}
    assert not output.isnan().any()


def test_what_parts_do_not_have_is_refused(remote: Any) -> None:
    for kind in (AttentionType.ENCODER_ONLY, AttentionType.DECODER_BIDIRECTIONAL):
        with pytest.raises(ConfigurationError, match=r"layer 0 needs .*; accepted: auto, map"):
            cuda_backend.part_attention(Runner(HOST, attn_type=kind), CPU)
    quantized = Runner(HOST)
    quantized.token_to_kv_pool.dtype = torch.float8_e4m3fn
    with pytest.raises(ConfigurationError, match=r"keeps KV as torch.float8_e4m3fn.*--kv-cache-dtype"):
        cuda_backend.part_attention(quantized, CPU)
    runner = Runner(HOST)
    cuda_backend.divide(runner, remote, CPU)
    with pytest.raises(ConfigurationError, match="layer 0 passes sinks"):
        runner.attn_backend.forward(*tensors(), runner.layer, batch(), sinks=torch.zeros(4))
