"""What attention needs of a batch: cut into pieces at its owner, sent to its hosts, and rebuilt there.

Sampling and everything else stays with the owner and the whole batch.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from sglang.srt.model_executor.forward_batch_info import (
    CaptureHiddenMode,
    ForwardBatch,
    ForwardMode,
    clamp_position,
    compute_position,
)
from sglang.srt.speculative.spec_info import SpeculativeAlgorithm

from kunserve_sgl.exchange.work import Work
from kunserve_sgl.policy.micro_batches import Chunk

Int32s = npt.NDArray[np.int32]


@dataclass(frozen=True, slots=True)
class BatchShape:
    """rows, lengths: int32[requests]; extends: int32[requests], None for decode; slots: int64[tokens], of the new
    KV."""

    mode: int
    rows: Int32s
    lengths: Int32s
    extends: Int32s | None
    slots: npt.NDArray[np.int64]

    @classmethod
    def of_batch(cls, batch: Any) -> BatchShape:
        """That of one of SGLang's batches."""
        is_decode = batch.forward_mode.is_decode()
        return cls(
            int(batch.forward_mode),
            batch.req_pool_indices.cpu().numpy().astype(np.int32),
            batch.seq_lens_cpu.numpy().astype(np.int32),
            None if is_decode else np.asarray(batch.extend_seq_lens_cpu, np.int32),
            batch.out_cache_loc.cpu().numpy().astype(np.int64),
        )

    @classmethod
    def of_work(cls, work: Work) -> BatchShape:
        """That of a batch that another replica sent."""
        return cls(
            work.mode,
            np.frombuffer(work.rows, np.int32),
            np.frombuffer(work.lengths, np.int32),
            np.frombuffer(work.extends, np.int32) if work.extends else None,
            np.frombuffer(work.slots, np.int64),
        )

    @property
    def tokens(self) -> int:
        return len(self.slots)

    @property
    def chunks(self) -> list[Chunk]:
        """Cached and new tokens of each request."""
        if self.extends is None:
            return [(length - 1, 1) for length in self.lengths.tolist()]
        return list(zip((self.lengths - self.extends).tolist(), self.extends.tolist(), strict=True))

    def cut(self, sizes: Sequence[int]) -> Iterator[BatchShape]:
        """Pieces of `sizes` tokens. A request may go on in the next piece, whose tokens then attend to these."""
        extends = np.ones_like(self.lengths) if self.extends is None else self.extends
        ends = np.cumsum(extends, dtype=np.int32)
        starts = ends - extends
        borders = itertools.pairwise(itertools.accumulate(sizes, initial=0))
        for first, last in borders:
            low, high = np.maximum(starts, first), np.minimum(ends, last)
            here = low < high
            yield BatchShape(
                self.mode,
                self.rows[here],
                (self.lengths - (ends - high))[here],
                None if self.extends is None else (high - low)[here],
                self.slots[first:last],
            )


def rows_to_keep(batch: Any) -> torch.Tensor | None:
    """Indices int64[requests] of the tokens whose hidden states the owner needs, or None for all of them.

    After a prefill the logits of each request's last token are enough, unless somebody asked for more.
    """
    if not batch.forward_mode.is_extend() or batch.return_logprob:
        return None
    if batch.capture_hidden_mode is not None and batch.capture_hidden_mode.need_capture():
        return None
    return torch.cumsum(batch.extend_seq_lens.to(torch.int64), dim=0) - 1


def rebuild(shape: BatchShape, attention_backend: str, device: torch.device | str) -> ForwardBatch:
    """A batch as the model runner takes it, without its tokens and what sampling needs."""
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
