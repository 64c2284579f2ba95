"""The places that all routes come through refuse bad calls before SGLang has copied, queued or sent any of it."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from sglang.srt.managers.embed_types import PositionalEmbeds
from sglang.srt.managers.io_struct import EmbeddingReqInput, GenerateReqInput
from sglang.srt.managers.tokenizer_manager import TokenizerManager

from kunserve_sgl.integration.bad_request import BadRequestError
from kunserve_sgl.integration.launcher.checked_requests import CheckedRequests

ANSWERS = ["first", "second"]


@pytest.fixture
def manager(monkeypatch: pytest.MonkeyPatch) -> Any:
    made = CheckedRequests.__new__(CheckedRequests)
    made.enable_metrics, made.is_generation = True, True
    made.server_args = SimpleNamespace(tokenizer_metrics_allowed_custom_labels=["team"])
    made.model_config = SimpleNamespace(vocab_size=2048)
    made.closed = []

    async def upstream(self: Any, obj: Any, request: Any = None) -> Any:
        try:
            for answer in ANSWERS:
                yield answer
        finally:
            self.closed.append(obj)

    async def score(self: Any, *args: Any, **kwargs: Any) -> Any:
        return args, kwargs

    monkeypatch.setattr(TokenizerManager, "generate_request", upstream)
    monkeypatch.setattr(TokenizerManager, "score_request", score)
    return made


def answers_to(manager: Any, obj: Any) -> list[str]:
    async def all_of_them() -> list[str]:
        return [answer async for answer in manager.generate_request(obj)]

    return asyncio.run(all_of_them())


@pytest.mark.parametrize(
    "call",
    [
        GenerateReqInput(text="a"),
        GenerateReqInput(text="a", sampling_params=[{"n": 2}], rid=["r"]),
        GenerateReqInput(text=["a", "b"], top_logprobs_num=[1, 2], token_ids_logprob=[5]),
        GenerateReqInput(input_ids=[[5], [6]], token_ids_logprob=[[5], [6, 7]], return_logprob=True),
        GenerateReqInput(input_ids=[5], token_ids_logprob=[5], multi_item_delimiter_indices=[0]),
        GenerateReqInput(input_ids=[5], custom_labels={"team": "x"}),
        GenerateReqInput(
            input_ids=[[5]],
            positional_embed_overrides=[PositionalEmbeds(embeds=torch.zeros(1, 4), positions=[0]), None],
        ),
        EmbeddingReqInput(text=["a"], rid=["r"]),
    ],
)
def test_calls_that_make_sense_go_on(manager: Any, call: Any) -> None:
    assert answers_to(manager, call) == ANSWERS


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (GenerateReqInput(text="a", sampling_params={"n": 0}), "n: 0"),
        (GenerateReqInput(text=["a"] * 3, sampling_params={"n": 6000}), "accepted are 1 to 5461 for 3 prompts"),
        (GenerateReqInput(text="a", sampling_params=[{}]), "sampling_params: a list"),
        (GenerateReqInput(text=["a", "b"], return_logprob=[True]), "return_logprob: a list of 1"),
        (GenerateReqInput(text=["a", "b"], token_ids_logprob=[[5]]), "token_ids_logprob: a list of 1"),
        (GenerateReqInput(input_ids=[]), "input_ids"),
        (GenerateReqInput(input_ids=[5], positional_embed_overrides={"a": 1}), "positional_embed_overrides"),
        (GenerateReqInput(input_ids=[5], custom_labels={"x": "y"}), "custom_labels: 'x' .* accepted are team"),
        (EmbeddingReqInput(input_ids=[]), "input_ids"),
    ],
)
def test_calls_that_make_no_sense_do_not(manager: Any, call: Any, message: str) -> None:
    with pytest.raises(BadRequestError, match=message):
        answers_to(manager, call)
    assert not manager.closed
    assert (call.is_single, call.rid) == (False, [])


def test_a_client_that_leaves_ends_the_call_within(manager: Any) -> None:
    async def leave() -> None:
        answers = manager.generate_request(GenerateReqInput(text="a"))
        assert await anext(answers) == "first"
        assert not manager.closed
        await answers.aclose()
        assert len(manager.closed) == 1

    asyncio.run(leave())


@pytest.mark.parametrize(("labels", "message"), [([], "is empty"), ([-1], "-1 is no token id"), ([2048], "2048")])
def test_labels_of_scores_are_refused_by_name(manager: Any, labels: list[int], message: str) -> None:
    with pytest.raises(BadRequestError, match=f"label_token_ids: .*{message}"):
        asyncio.run(manager.score_request("a", ["b"], labels))


def test_scores_are_asked_for_as_they_were(manager: Any) -> None:
    given = asyncio.run(manager.score_request(query="a", items=["b"], label_token_ids=[5], apply_softmax=True))
    assert given == (("a", ["b"], [5]), {"apply_softmax": True})
