"""From SGLang's batch to the shape that is cut into pieces and sent, and from a shape to a batch for layers.

Sampling and everything else stays with the owner and the whole batch.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from sglang.srt.model_executor.forward_batch_info import (
    CaptureHiddenMode,
    ForwardBatch,
    ForwardMode,
    compute_position,
)
from sglang.srt.speculative.spec_info import SpeculativeAlgorithm

from kunserve_sgl.replica.batch_shape import BatchShape

_ALIGNMENT = 16  # elements of int64


def shape_of(batch: ForwardBatch) -> BatchShape:
    """Reads what attention needs off the batch. It waits for the device, where rows and slots are."""
    is_decode = batch.forward_mode.is_decode()
    return BatchShape(
        int(batch.forward_mode),
        batch.req_pool_indices.cpu().numpy().astype(np.int32),
        batch.seq_lens_cpu.numpy().astype(np.int32),
        None if is_decode else np.asarray(batch.extend_seq_lens_cpu, np.int32),
        batch.out_cache_loc.cpu().numpy().astype(np.int64),
    )


def rows_to_keep(batch: ForwardBatch) -> torch.Tensor | None:
    """Returns the indices, int64[requests], of the tokens whose hidden states the owner needs, or None for all of them.
    After a prefill the logits of each request's last token are enough, unless somebody asked for more."""
    if not batch.forward_mode.is_extend() or batch.return_logprob:
        return None
    if batch.capture_hidden_mode is not None and batch.capture_hidden_mode.need_capture():
        return None
    return torch.cumsum(batch.extend_seq_lens.to(torch.int64), dim=0) - 1


def rebuild(shape: BatchShape, attention_backend: str, device: torch.device) -> ForwardBatch:
    """Makes a batch as the model runner takes it, without its tokens and what sampling needs. What it has on a GPU
    goes there in one copy, which nothing waits for."""
    tokens, is_decode = shape.tokens, shape.extends is None
    lengths = shape.lengths.astype(np.int64)
    extends = np.ones_like(lengths) if shape.extends is None else shape.extends.astype(np.int64)
    prefixes = lengths - extends
    rows, seq_lens, slots, new, cached = _on(device, shape.rows, lengths, shape.slots, extends, prefixes)
    batch = ForwardBatch(
        forward_mode=ForwardMode(shape.mode),
        batch_size=len(lengths),
        input_ids=torch.zeros(tokens, dtype=torch.int64, device=device),  # read for their number only
        req_pool_indices=rows,
        seq_lens=seq_lens,
        seq_lens_cpu=torch.from_numpy(lengths),
        seq_lens_sum=int(lengths.sum()),
        orig_seq_lens=seq_lens.to(torch.int32),
        out_cache_loc=slots,
        spec_algorithm=SpeculativeAlgorithm.NONE,
        capture_hidden_mode=CaptureHiddenMode.NULL,
        num_token_non_padded_cpu=tokens,
    )
    if is_decode:
        batch.positions = cached  # of the one new token, which is the last
        return batch
    batch.extend_num_tokens = tokens
    batch.extend_seq_lens, batch.extend_prefix_lens = new.to(torch.int32), cached.to(torch.int32)
    batch.extend_seq_lens_cpu, batch.extend_prefix_lens_cpu = extends.tolist(), prefixes.tolist()
    batch.positions, batch.extend_start_loc = compute_position(
        attention_backend, batch.extend_prefix_lens, batch.extend_seq_lens, tokens
    )
    return batch


def _on(device: torch.device, *arrays: npt.NDArray[np.integer]) -> list[torch.Tensor]:
    """Returns the arrays as int64 tensors on the device, which went there together. Each begins at a multiple of 128
    bytes, as one by itself would: Triton compiles its kernels anew for another alignment."""
    starts = np.cumsum([0, *(-(-len(array) // _ALIGNMENT) * _ALIGNMENT for array in arrays)]).tolist()
    packed = torch.empty(starts[-1], dtype=torch.int64, pin_memory=device.type == "cuda")
    memory = packed.numpy()
    for start, array in zip(starts, arrays, strict=False):
        memory[start : start + len(array)] = array
    there = packed.to(device, non_blocking=True)
    return [there[start : start + len(array)] for start, array in zip(starts, arrays, strict=False)]
