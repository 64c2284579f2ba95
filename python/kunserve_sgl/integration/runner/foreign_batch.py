"""From SGLang's batch to the shape that is cut into pieces and sent, and from a shape to a batch for layers.

Sampling and everything else stays with the owner and the whole batch.
"""

from __future__ import annotations

import numpy as np
import torch
from sglang.srt.model_executor.forward_batch_info import (
    CaptureHiddenMode,
    ForwardBatch,
    ForwardMode,
    clamp_position,
    compute_position,
)
from sglang.srt.speculative.spec_info import SpeculativeAlgorithm

from kunserve_sgl.replica.batch_shape import BatchShape, Int32s


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
    """Makes a batch as the model runner takes it, without its tokens and what sampling needs."""
    rows, lengths = _int64(shape.rows), _int64(shape.lengths)
    tokens = shape.tokens
    batch = ForwardBatch(
        forward_mode=ForwardMode(shape.mode),
        batch_size=len(rows),
        input_ids=torch.zeros(tokens, dtype=torch.int64, device=device),  # read for their number only
        req_pool_indices=rows.to(device),
        seq_lens=lengths.to(device),
        seq_lens_cpu=lengths,
        seq_lens_sum=int(lengths.sum()),
        orig_seq_lens=lengths.to(device, torch.int32),
        out_cache_loc=torch.from_numpy(shape.slots.copy()).to(device),
        spec_algorithm=SpeculativeAlgorithm.NONE,
        capture_hidden_mode=CaptureHiddenMode.NULL,
        num_token_non_padded_cpu=tokens,
    )
    if shape.extends is None:
        batch.positions = clamp_position(batch.seq_lens)
        return batch
    extends = _int64(shape.extends)
    prefixes = lengths - extends
    batch.extend_num_tokens = tokens
    batch.extend_seq_lens = extends.to(device, torch.int32)
    batch.extend_prefix_lens = prefixes.to(device, torch.int32)
    batch.extend_seq_lens_cpu, batch.extend_prefix_lens_cpu = extends.tolist(), prefixes.tolist()
    batch.positions, batch.extend_start_loc = compute_position(
        attention_backend, batch.extend_prefix_lens, batch.extend_seq_lens, tokens
    )
    return batch


def _int64(values: Int32s) -> torch.Tensor:
    return torch.from_numpy(values.astype(np.int64))
