"""The CPU attention backend with SGLang's own pools, layers and batches; and what it refuses."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from sglang.srt.layers.attention import attention_registry
from sglang.srt.layers.radix_attention import AttentionType, RadixAttention
from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool, ReqToTokenPool
from sglang.srt.model_executor.forward_batch_info import ForwardBatch, ForwardMode
from torch.nn.functional import scaled_dot_product_attention

from kunserve_sgl.errors import ConfigurationError, InvariantError
from kunserve_sgl.integration.cpu_platform import ATTENTION_BACKEND
from kunserve_sgl.integration.cpu_platform import attention as paged_attention
from kunserve_sgl.integration.cpu_platform.attention import CpuAttentionBackend

pytestmark = pytest.mark.skipif(
    torch.cuda.is_available(), reason="the CPU platform, and with it this backend, is off where CUDA is present"
)

SLOTS, ROWS, CONTEXT = 600, 8, 300
Q_HEADS, KV_HEADS, DIM = 4, 2, 32


def make_runner(**changes: Any) -> SimpleNamespace:
    """What the backend reads of a model runner: SGLang's pools and a few fields."""
    dtype = changes.pop("pool_dtype", torch.float32)
    pool = MHATokenToKVPool(
        SLOTS, 1, dtype, KV_HEADS, DIM, layer_num=2, device="cpu", enable_memory_saver=False, enable_alt_stream=False
    )
    for buffer in pool.k_buffer + pool.v_buffer:
        buffer.fill_(torch.nan)
    arguments = SimpleNamespace(
        dtype=changes.pop("dtype_flag", "auto"),
        kv_cache_dtype=changes.pop("kv_flag", "auto"),
        speculative_algorithm=changes.pop("speculative_algorithm", None),
    )
    runner = SimpleNamespace(
        device="cpu",
        dtype=torch.float32,
        kv_cache_dtype=torch.float32,
        server_args=arguments,
        use_mla_backend=False,
        req_to_token_pool=ReqToTokenPool(ROWS, CONTEXT, "cpu", enable_memory_saver=False),
        token_to_kv_pool=pool,
    )
    vars(runner).update(changes)
    return runner


def make_layer(layer_id: int = 0, **arguments: Any) -> RadixAttention:
    return RadixAttention(Q_HEADS, DIM, DIM**-0.5, KV_HEADS, layer_id, **arguments)


class Sequences:
    """Requests that grow: keeps every key and value it handed out, and compares with a dense computation."""

    def __init__(self, runner: SimpleNamespace, backend: CpuAttentionBackend, layer: RadixAttention) -> None:
        self.runner, self.backend, self.layer = runner, backend, layer
        self.keys: dict[int, torch.Tensor] = {}
        self.values: dict[int, torch.Tensor] = {}
        self.free = torch.randperm(SLOTS, generator=torch.Generator().manual_seed(1)) + 1

    def batch(self, mode: ForwardMode, new_tokens: dict[int, int]) -> ForwardBatch:
        """A hand-built batch, as a replica builds it that hosts layers for others: no field more than needed."""
        lengths = []
        taken = []
        for row, count in new_tokens.items():
            prefix = len(self.keys.get(row, ()))
            slots, self.free = self.free[:count], self.free[count:]
            self.runner.req_to_token_pool.req_to_token[row, prefix : prefix + count] = slots.int()
            taken.append(slots)
            lengths.append(prefix + count)
        batch = ForwardBatch(
            forward_mode=mode,
            batch_size=len(new_tokens),
            input_ids=torch.zeros(sum(new_tokens.values()), dtype=torch.int64),
            req_pool_indices=torch.tensor(list(new_tokens)),
            seq_lens=torch.tensor(lengths),
            out_cache_loc=torch.cat(taken),
            seq_lens_sum=sum(lengths),
        )
        if not mode.is_decode():
            batch.extend_seq_lens = torch.tensor(list(new_tokens.values()), dtype=torch.int32)
        return batch

    def run(self, batch: ForwardBatch, new_tokens: dict[int, int], **arguments: Any) -> None:
        tokens = sum(new_tokens.values())
        q, k, v = (torch.randn(tokens, heads * DIM) for heads in (Q_HEADS, KV_HEADS, KV_HEADS))
        k, v = k.view(tokens, KV_HEADS, DIM), v.view(tokens, KV_HEADS, DIM)
        found = self.backend.forward(q, k, v, self.layer, batch, **arguments)
        assert found.shape == (tokens, Q_HEADS * DIM)
        start = 0
        for row, count in new_tokens.items():
            part = slice(start, start + count)
            start += count
            empty = torch.empty(0, KV_HEADS, DIM)
            self.keys[row] = torch.cat([self.keys.get(row, empty), k[part]])
            self.values[row] = torch.cat([self.values.get(row, empty), v[part]])
            length = len(self.keys[row])
            visible = torch.ones(count, length, dtype=torch.bool).tril(length - count)
            expected = scaled_dot_product_attention(
                q[part].view(count, Q_HEADS, DIM).transpose(0, 1),
                self.keys[row].transpose(0, 1),
                self.values[row].transpose(0, 1),
                attn_mask=visible,
                enable_gqa=True,
            )
            torch.testing.assert_close(found[part].view(count, Q_HEADS, DIM).transpose(0, 1), expected)


def test_a_batch_through_prefill_mixed_chunk_and_decode() -> None:
    runner = make_runner()
    backend = CpuAttentionBackend(runner)
    sequences = Sequences(runner, backend, make_layer())
    steps = [
        (ForwardMode.EXTEND, {1: 70, 3: 5}),
        (ForwardMode.EXTEND, {1: 30, 5: 64}),
        (ForwardMode.MIXED, {5: 20, 1: 1, 3: 1}),
        (ForwardMode.DECODE, {3: 1, 5: 1, 1: 1}),
        (ForwardMode.DECODE, {5: 1}),
    ]
    for mode, new_tokens in steps:
        batch = sequences.batch(mode, new_tokens)
        backend.init_forward_metadata(batch)
        sequences.run(batch, new_tokens)
    assert backend.token_to_kv_pool.k_buffer[1].isnan().all()  # nothing went into the other layer


def test_two_batches_may_be_between_their_layers_at_once() -> None:
    runner = make_runner()
    backend = CpuAttentionBackend(runner)
    sequences = Sequences(runner, backend, make_layer())
    first, second = {1: 70, 3: 5}, {2: 9}
    batches = [sequences.batch(ForwardMode.EXTEND, tokens) for tokens in (first, second)]
    for batch in batches:
        backend.init_forward_metadata(batch)
    sequences.run(batches[0], first)
    sequences.run(batches[1], second)


def test_save_kv_cache_false_writes_nothing_and_reads_the_cache() -> None:
    runner = make_runner()
    backend = CpuAttentionBackend(runner)
    sequences = Sequences(runner, backend, make_layer())
    new_tokens = {1: 20}
    batch = sequences.batch(ForwardMode.EXTEND, new_tokens)
    backend.init_forward_metadata(batch)
    sequences.run(batch, new_tokens)
    pool = runner.token_to_kv_pool
    before = [buffer.clone() for buffer in pool.k_buffer + pool.v_buffer]
    q = torch.randn(20, Q_HEADS * DIM)
    other = torch.full((20, KV_HEADS, DIM), 7.0)
    with_keys = backend.forward(q, other, other, sequences.layer, batch, save_kv_cache=False)
    without_keys = backend.forward(q, None, None, sequences.layer, batch)
    assert torch.equal(with_keys, without_keys)
    for old, new in zip(before, pool.k_buffer + pool.v_buffer, strict=True):
        torch.testing.assert_close(old, new, rtol=0, atol=0, equal_nan=True)


def test_an_idle_batch_needs_no_plan() -> None:
    runner = make_runner()
    backend = CpuAttentionBackend(runner)
    empty = torch.empty(0, dtype=torch.int64)
    batch = ForwardBatch(ForwardMode.IDLE, 0, empty, empty, empty, empty, 0)
    backend.init_forward_metadata(batch)
    found = backend.forward(torch.empty(0, Q_HEADS * DIM), None, None, make_layer(), batch)
    assert found.shape == (0, Q_HEADS * DIM)


def test_encoder_only_layers_see_every_token() -> None:
    runner = make_runner()
    backend = CpuAttentionBackend(runner)
    layer = make_layer(attn_type=AttentionType.ENCODER_ONLY)
    batch = Sequences(runner, backend, layer).batch(ForwardMode.EXTEND, {1: 50})
    backend.init_forward_metadata(batch)
    q = torch.randn(50, Q_HEADS * DIM)
    k, v = torch.randn(50, KV_HEADS, DIM), torch.randn(50, KV_HEADS, DIM)
    found = backend.forward(q, k, v, layer, batch)
    query = q.view(50, Q_HEADS, DIM).transpose(0, 1)
    expected = scaled_dot_product_attention(query, k.transpose(0, 1), v.transpose(0, 1), enable_gqa=True)
    torch.testing.assert_close(found.view(50, Q_HEADS, DIM).transpose(0, 1), expected)


def test_a_batch_without_metadata_is_an_invariant_error() -> None:
    runner = make_runner()
    backend = CpuAttentionBackend(runner)
    batch = Sequences(runner, backend, make_layer()).batch(ForwardMode.EXTEND, {1: 2})
    with pytest.raises(InvariantError, match="init_forward_metadata was not called"):
        backend.forward(torch.randn(2, Q_HEADS * DIM), None, None, make_layer(), batch)


def test_keys_of_another_shape_than_the_cache_are_refused() -> None:
    runner = make_runner()
    backend = CpuAttentionBackend(runner)
    batch = Sequences(runner, backend, make_layer()).batch(ForwardMode.EXTEND, {1: 2})
    backend.init_forward_metadata(batch)
    layer = RadixAttention(Q_HEADS, DIM, 1.0, Q_HEADS, 0)
    with pytest.raises(InvariantError, match=r"layer 0 wants keys \(4, 32\) per token, the cache holds \(2, 32\)"):
        backend.forward(torch.randn(2, Q_HEADS * DIM), None, None, layer, batch)


@pytest.mark.parametrize(
    ("arguments", "attributes", "feature"),
    [
        ({"is_cross_attention": True}, {}, "cross attention"),
        ({"attn_type": AttentionType.DECODER_BIDIRECTIONAL}, {}, "attn_type decoder_bidirectional"),
        ({"use_irope": True}, {}, "irope"),
        ({"pos_encoding_mode": "ROPE_LLAMA"}, {}, "pos_encoding_mode ROPE_LLAMA"),
        ({"logit_cap": 1.0, "logit_capping_method": "other"}, {}, "logit_capping_method other"),
        ({}, {"xai_temperature_len": 9}, "xai_temperature_len"),
        (
            {"attn_type": AttentionType.ENCODER_ONLY, "sliding_window_size": 9},
            {},
            "a sliding window in both directions",
        ),
    ],
)
def test_layers_with_other_kinds_of_attention_are_refused(
    arguments: dict[str, Any], attributes: dict[str, Any], feature: str
) -> None:
    runner = make_runner()
    backend = CpuAttentionBackend(runner)
    layer = make_layer(**arguments)
    vars(layer).update(attributes)
    batch = Sequences(runner, backend, layer).batch(ForwardMode.EXTEND, {1: 2})
    backend.init_forward_metadata(batch)
    with pytest.raises(ConfigurationError, match=feature):
        backend.forward(torch.randn(2, Q_HEADS * DIM), None, None, layer, batch)


def test_extra_arguments_of_a_layer_are_refused_by_name() -> None:
    runner = make_runner()
    backend = CpuAttentionBackend(runner)
    batch = Sequences(runner, backend, make_layer()).batch(ForwardMode.EXTEND, {1: 2})
    backend.init_forward_metadata(batch)
    with pytest.raises(ConfigurationError, match="passes sinks"):
        backend.forward(
            torch.randn(2, Q_HEADS * DIM),
            None,
            None,
            make_layer(),
            batch,
            sinks=torch.zeros(Q_HEADS),
            topk_indices=None,
        )


def test_modes_of_speculative_decoding_are_refused() -> None:
    runner = make_runner()
    backend = CpuAttentionBackend(runner)
    batch = Sequences(runner, backend, make_layer()).batch(ForwardMode.TARGET_VERIFY, {1: 2})
    with pytest.raises(ConfigurationError, match="does not run TARGET_VERIFY"):
        backend.init_forward_metadata(batch)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"device": "cuda"}, "--device cuda"),
        ({"dtype": torch.float16, "dtype_flag": "half"}, "--dtype half .* accepted: float32, bfloat16"),
        (
            {"kv_cache_dtype": torch.float8_e5m2, "kv_flag": "fp8_e5m2"},
            "--kv-cache-dtype fp8_e5m2 .* accepted: float32",
        ),
        ({"speculative_algorithm": "EAGLE"}, "--speculative-algorithm, got EAGLE"),
        ({"token_to_kv_pool": object()}, "needs a object"),
    ],
)
def test_configurations_it_cannot_serve_are_refused_at_start(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        CpuAttentionBackend(make_runner(**changes))


def test_registration_is_idempotent_and_makes_the_name_a_choice() -> None:
    from sglang.srt.server_args import ATTENTION_BACKEND_CHOICES

    paged_attention.register()
    paged_attention.register()
    assert ATTENTION_BACKEND_CHOICES.count(ATTENTION_BACKEND) == 1
    backend = attention_registry.ATTENTION_BACKENDS[ATTENTION_BACKEND](make_runner())
    assert isinstance(backend, CpuAttentionBackend)


def test_no_helper_of_sglang_uses_triton_for_it() -> None:
    from sglang.srt.mem_cache import allocation
    from sglang.srt.model_executor import forward_batch_info

    attention_registry.ATTENTION_BACKENDS[ATTENTION_BACKEND](make_runner())
    positions, starts = forward_batch_info.compute_position(
        ATTENTION_BACKEND, torch.tensor([3, 0]), torch.tensor([2, 4]), 6
    )
    assert positions.tolist() == [3, 4, 0, 1, 2, 3]
    assert starts.tolist() == [0, 2]
    assert allocation.get_last_loc_triton is allocation.get_last_loc_torch
    # Other backends are asked about as before.
    assert forward_batch_info.support_triton("triton")
    assert not forward_batch_info.support_triton("torch_native")


def test_deepseek_attends_in_absorbed_form_in_every_mode() -> None:
    from sglang.srt.models.deepseek_common.attention_backend_handler import AttentionBackendRegistry
    from sglang.srt.models.deepseek_common.attention_forward_methods.forward_methods import AttnForwardMethod

    attention_registry.ATTENTION_BACKENDS[ATTENTION_BACKEND](make_runner(use_mla_backend=True))
    handler = AttentionBackendRegistry.get_handler(ATTENTION_BACKEND)
    for mode in (ForwardMode.EXTEND, ForwardMode.MIXED, ForwardMode.DECODE):
        batch = SimpleNamespace(forward_mode=mode, extend_prefix_lens_cpu=[0])
        assert handler(SimpleNamespace(), batch) == AttnForwardMethod.MLA
