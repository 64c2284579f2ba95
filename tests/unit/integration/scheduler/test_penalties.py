"""Penalties of answers that were begun before: the same as if they had been counted token by token."""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from _patching import patched_module
from sglang.srt.sampling.penaltylib import (
    BatchedFrequencyPenalizer,
    BatchedMinNewTokensPenalizer,
    BatchedPenalizerOrchestrator,
    BatchedPresencePenalizer,
    BatchedRepetitionPenalizer,
)

from kunserve_sgl.integration.scheduler.penalties import KunserveSamplingBatchInfo

VOCAB = 16
KINDS = {
    BatchedFrequencyPenalizer,
    BatchedMinNewTokensPenalizer,
    BatchedPresencePenalizer,
    BatchedRepetitionPenalizer,
}
TOKENIZER = SimpleNamespace(additional_stop_token_ids=None, eos_token_id=3)


PROMPT = array("q", [2, 4])


MODULE = "sglang.srt.managers.schedule_batch"


@pytest.fixture(scope="module", autouse=True)
def patched() -> Iterator[None]:
    """Gives batches the method of SGLang's with our patch, which a server has."""
    with patched_module(MODULE) as made:
        Batch.cumulate_penalty_output_tokens = made.ScheduleBatch.cumulate_penalty_output_tokens
        yield
        del Batch.cumulate_penalty_output_tokens


class Batch:
    """Of SGLang's batch, what penalties need. `tokens` are those of each request's answer so far."""

    device = "cpu"
    cumulate_penalty_output_tokens: Any

    def __init__(self, *tokens: list[int], overlap: bool, **values: float) -> None:
        penalties = {"frequency_penalty": 0.0, "presence_penalty": 0.0, "repetition_penalty": 1.0, "min_new_tokens": 0}
        sampling = SimpleNamespace(stop_token_ids=None, **{**penalties, **values})
        self.enable_overlap = overlap
        self.reqs = [
            SimpleNamespace(
                sampling_params=sampling,
                origin_input_ids=PROMPT,
                output_ids=array("q", each),
                kv_committed_len=len(PROMPT) + len(each),
                tokenizer=TOKENIZER,
            )
            for each in tokens
        ]
        info = KunserveSamplingBatchInfo.__new__(KunserveSamplingBatchInfo)
        info.penalizer_orchestrator = BatchedPenalizerOrchestrator(vocab_size=VOCAB, batch=self, penalizers=KINDS)
        info.adjusted_from_schedule_batch(self, VOCAB)
        self.sampling_info = info

    def decode(self, tokens: list[int], late: bool) -> None:
        """Prepares a step of the decode, as SGLang does. `tokens` come out of the batch before; they are known by then
        unless their result is processed `late`."""
        if not late:
            self._take(tokens)
        self.cumulate_penalty_output_tokens()
        for req in self.reqs:
            req.kv_committed_len += 1
        if late:
            self._take(tokens)

    def _take(self, tokens: list[int]) -> None:
        for req, token in zip(self.reqs, tokens, strict=True):
            req.output_ids.append(token)

    def penalized(self, logits: torch.Tensor) -> torch.Tensor:
        found = logits.clone()
        self.sampling_info.penalizer_orchestrator.apply(found)
        return found


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize(
    "values",
    [
        {},
        {"frequency_penalty": 0.3},
        {"presence_penalty": 0.7},
        {"repetition_penalty": 1.3},
        {"min_new_tokens": 3},
        {"frequency_penalty": 0.1, "presence_penalty": 0.2, "repetition_penalty": 1.1, "min_new_tokens": 9},
    ],
)
def test_tokens_from_before_count(values: dict[str, float], overlap: bool) -> None:
    """Whenever an answer goes on, and whether or not the batch before has been processed when the first step begins."""
    steps = [[5, 7], [6, 7], [5, 8], [5, 3], [9, 9]]
    logits = torch.randn(2, VOCAB, generator=torch.Generator().manual_seed(1))
    whole = Batch([], [], overlap=overlap, **values)
    expected = [whole.penalized(logits)]
    for step in steps:
        whole.decode(step, late=overlap)
        expected.append(whole.penalized(logits))
    assert torch.equal(expected[2], logits) != bool(values)
    for begins in range(len(steps)):
        for late in {overlap, False}:
            rest = Batch(*[[step[row] for step in steps[:begins]] for row in (0, 1)], overlap=overlap, **values)
            found = [rest.penalized(logits)]
            for number, step in enumerate(steps[begins:]):
                rest.decode(step, late=overlap if number else late)
                found.append(rest.penalized(logits))
            for one, other in zip(found, expected[begins:], strict=True):
                assert torch.equal(one, other), (begins, late)
