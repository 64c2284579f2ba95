"""From SGLang's batch to the shape that is cut into pieces and sent, and from a shape to a batch for layers.

Sampling and everything else stays with the owner and the whole batch.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

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

from kunserve_sgl.exchange.device_copies import on_device
from kunserve_sgl.replica.batch_shape import BatchShape, Int64s

_MODES = {int(mode): mode for mode in ForwardMode}


def shape_of(batch: ForwardBatch) -> BatchShape:
    """Reads what attention needs off the batch. It waits for the device, where rows and slots are, once."""
    is_decode = batch.forward_mode.is_decode()
    rows, slots = _off(batch.req_pool_indices, batch.out_cache_loc)
    return BatchShape(
        int(batch.forward_mode),
        rows.astype(np.int32),
        batch.seq_lens_cpu.numpy().astype(np.int32),
        None if is_decode else np.asarray(batch.extend_seq_lens_cpu, np.int32),
        slots.astype(np.int64),
    )


def rows_to_keep(batch: ForwardBatch) -> Int64s | None:
    """Returns the indices, int64[requests], of the tokens whose hidden states the owner needs, or None for all of them.
    After a prefill the logits of each request's last token are enough, unless somebody asked for more."""
    if not batch.forward_mode.is_extend() or batch.return_logprob:
        return None
    if batch.capture_hidden_mode is not None and batch.capture_hidden_mode.need_capture():
        return None
    return np.cumsum(batch.extend_seq_lens_cpu, dtype=np.int64) - 1


def rebuild(shape: BatchShape, attention_backend: str, device: torch.device) -> ForwardBatch:
    """Makes a batch as the model runner takes it, without its tokens and what sampling needs. What it has on a GPU
    goes there in one copy, which nothing waits for."""
    if shape.extends is None and device.type == "cpu":
        return _decode_step(shape)
    tokens, lengths, prefixes = shape.tokens, shape.lengths, shape.prefixes
    extends = () if shape.extends is None else (shape.extends,)
    rows, seq_lens, slots, cached, *new = on_device(device, shape.rows, lengths, shape.slots, prefixes, *extends)
    batch = _blank_batch()
    batch.forward_mode = _MODES[shape.mode]
    batch.batch_size = len(lengths)
    batch.input_ids = slots  # read for their number only
    batch.req_pool_indices, batch.out_cache_loc = rows, slots
    batch.seq_lens, batch.orig_seq_lens = seq_lens, seq_lens.to(torch.int32)
    batch.seq_lens_cpu = torch.from_numpy(lengths.astype(np.int64))
    batch.seq_lens_sum = int(np.add.reduce(lengths, dtype=np.int64))
    batch.num_token_non_padded_cpu = tokens
    if shape.extends is None:
        batch.positions = cached  # of the one new token, which is the last
        return batch
    batch.extend_num_tokens = tokens
    batch.extend_seq_lens, batch.extend_prefix_lens = new[0].to(torch.int32), cached.to(torch.int32)
    batch.extend_seq_lens_cpu, batch.extend_prefix_lens_cpu = shape.extends.tolist(), prefixes.tolist()
    batch.positions, batch.extend_start_loc = compute_position(
        attention_backend, batch.extend_prefix_lens, batch.extend_seq_lens, tokens
    )
    return batch


def new_entries(batch: ForwardBatch) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns where the slots of a rebuilt batch's new tokens go in its rows: rows and positions, int64[tokens] each.
    Nothing waits for the device."""
    if batch.forward_mode.is_decode():
        return batch.req_pool_indices, batch.positions
    rows = torch.repeat_interleave(batch.req_pool_indices, batch.extend_seq_lens, output_size=batch.extend_num_tokens)
    return rows, batch.positions.to(torch.int64)


def _decode_step(shape: BatchShape) -> ForwardBatch:
    """Makes a decode step on the CPU, in as few array operations as it takes: it is made over and over."""
    lengths = shape.lengths.astype(np.int64)
    seq_lens, slots = torch.from_numpy(lengths), torch.from_numpy(shape.slots.astype(np.int64))
    return _blank_batch(
        forward_mode=_MODES[shape.mode],
        batch_size=len(lengths),
        input_ids=slots,  # read for their number only
        req_pool_indices=_rows(shape.rows.tobytes()),
        out_cache_loc=slots,
        seq_lens=seq_lens,
        seq_lens_cpu=seq_lens,
        orig_seq_lens=torch.from_numpy(shape.lengths.astype(np.int32)),
        seq_lens_sum=int(shape.amount.pairs),
        num_token_non_padded_cpu=len(lengths),
        positions=torch.from_numpy(lengths - 1),
    )


@functools.lru_cache(maxsize=64)
def _rows(rows: bytes) -> torch.Tensor:
    """Returns int32 rows as int64[requests]. From step to step of a batch they stay the same; nobody writes to them."""
    return torch.from_numpy(np.frombuffer(rows, np.int32).astype(np.int64))


def _blank_batch(**fields: Any) -> ForwardBatch:
    """Makes a batch with what all foreign batches have in common, and `fields`."""
    batch = ForwardBatch.__new__(ForwardBatch)
    # A small part of what its more than a hundred fields take one by one.
    batch.__dict__ = {**_blank_fields(), **fields}
    return batch


@functools.cache
def _blank_fields() -> Mapping[str, Any]:
    blank = ForwardBatch(
        forward_mode=ForwardMode.DECODE,
        batch_size=0,
        input_ids=None,
        req_pool_indices=None,
        seq_lens=None,
        out_cache_loc=None,
        seq_lens_sum=0,
        spec_algorithm=SpeculativeAlgorithm.NONE,
        capture_hidden_mode=CaptureHiddenMode.NULL,
    )
    fields: Mapping[str, Any] = vars(blank)
    return fields


def _off(*tensors: torch.Tensor) -> list[npt.NDArray[np.integer]]:
    """Returns the tensors' integers in CPU memory. From a GPU they come in one copy."""
    if tensors[0].device.type == "cpu":
        return [tensor.numpy() for tensor in tensors]
    together = torch.cat([tensor.to(torch.int64) for tensor in tensors]).cpu().numpy()
    return np.split(together, np.cumsum([len(tensor) for tensor in tensors[:-1]]))
