"""A batch as its hosts see it: described by its owner, rebuilt by the host.

The host gets what attention needs (rows, lengths, slots) and nothing of sampling, which stays with the owner.
"""

from __future__ import annotations

from typing import Any

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

from kunserve_sgl.execution.work import Work


def rows_to_keep(batch: Any) -> torch.Tensor | None:
    """Indices int64[requests] of the tokens whose hidden states the owner needs, or None for all of them.

    After a prefill the logits of each request's last token are enough, unless somebody asked for more.
    """
    if not batch.forward_mode.is_extend() or batch.return_logprob:
        return None
    if batch.capture_hidden_mode is not None and batch.capture_hidden_mode.need_capture():
        return None
    return torch.cumsum(batch.extend_seq_lens.to(torch.int64), dim=0) - 1


def rebuild(work: Work, attention_backend: str, device: torch.device | str) -> ForwardBatch:
    """The batch that `work` describes, as this host's model runner takes it."""
    rows, lengths = _int64(work.rows), _int64(work.lengths)
    slots = torch.from_numpy(np.frombuffer(work.slots, np.int64).copy())
    tokens = len(slots)
    batch = ForwardBatch(
        forward_mode=ForwardMode(work.mode),
        batch_size=len(rows),
        input_ids=torch.zeros(tokens, dtype=torch.int64, device=device),  # read for their number only
        req_pool_indices=rows.to(device),
        seq_lens=lengths.to(device),
        seq_lens_cpu=lengths,
        seq_lens_sum=int(lengths.sum()),
        orig_seq_lens=lengths.to(device, torch.int32),
        out_cache_loc=slots.to(device),
        spec_algorithm=SpeculativeAlgorithm.NONE,
        capture_hidden_mode=CaptureHiddenMode.NULL,
        num_token_non_padded_cpu=tokens,
    )
    if not work.extends:
        batch.positions = clamp_position(batch.seq_lens)
        return batch
    extends = _int64(work.extends)
    prefixes = lengths - extends
    batch.extend_num_tokens = tokens
    batch.extend_seq_lens = extends.to(device, torch.int32)
    batch.extend_prefix_lens = prefixes.to(device, torch.int32)
    batch.extend_seq_lens_cpu, batch.extend_prefix_lens_cpu = extends.tolist(), prefixes.tolist()
    batch.positions, batch.extend_start_loc = compute_position(
        attention_backend, batch.extend_prefix_lens, batch.extend_seq_lens, tokens
    )
    return batch


def _int64(data: bytes) -> torch.Tensor:
    return torch.from_numpy(np.frombuffer(data, np.int32).astype(np.int64))
