"""Penalties that count the tokens of an answer also count those from before a retraction, or before another replica
went on with it: SGLang's penalizers of a new batch begin with none."""

from __future__ import annotations

from typing import Any

import torch
from sglang.srt.sampling.penaltylib import (
    BatchedFrequencyPenalizer,
    BatchedMinNewTokensPenalizer,
    BatchedPresencePenalizer,
    BatchedRepetitionPenalizer,
)
from sglang.srt.sampling.sampling_batch_info import SamplingBatchInfo
from typing_extensions import override


class KunserveSamplingBatchInfo(SamplingBatchInfo):  # type: ignore[misc]
    """Is SGLang's, made for a batch that is going to be prefilled, where all tokens of an answer are earlier ones."""

    @override
    def adjusted_from_schedule_batch(self, batch: Any, vocab_size: int) -> None:
        super().adjusted_from_schedule_batch(batch, vocab_size)
        orchestrator = self.penalizer_orchestrator
        if not orchestrator.is_required:
            return
        for row, req in enumerate(batch.reqs):
            if not len(req.output_ids):
                continue
            # With the overlap schedule tokens are counted one step late, the last one of the prompt in the first step
            # (patch 0004).
            counted = [req.origin_input_ids[-1], *req.output_ids[:-1]] if batch.enable_overlap else req.output_ids
            tokens = torch.tensor(counted, dtype=torch.int64, device=batch.device)
            _count(orchestrator.penalizers, row, tokens)


def _count(penalizers: dict[type, Any], row: int, tokens: torch.Tensor) -> None:
    """Counts `tokens`, int64[tokens], for one request, as `_cumulate_output_tokens` does for a token of each."""
    frequency = penalizers[BatchedFrequencyPenalizer]
    if frequency.is_prepared():
        each = frequency.frequency_penalties[row].expand(len(tokens))
        frequency.cumulated_frequency_penalties[row].scatter_add_(0, tokens, each)
    presence = penalizers[BatchedPresencePenalizer]
    if presence.is_prepared():
        presence.cumulated_presence_penalties[row, tokens] = presence.presence_penalties[row]
    repetition = penalizers[BatchedRepetitionPenalizer]
    if repetition.is_prepared():
        repetition.cumulated_repetition_penalties[row, tokens] = repetition.repetition_penalties[row]
    least = penalizers[BatchedMinNewTokensPenalizer]
    if least.is_prepared():
        least.len_output_tokens[row] = len(tokens)
