"""Questions in tokens whose answers can be told in advance: greedy, and of a given length."""

from __future__ import annotations

import random
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from _http import Endpoint, Json

CLIENTS = 12
MOST_AT_ONCE = 32  # what the servers run at once


@dataclass(frozen=True)
class Question:
    """A prompt in tokens, and how many tokens to answer. `replica` is who has to answer, None for anybody."""

    prompt: tuple[int, ...]
    answer_tokens: int
    replica: int | None = None

    def body(self, **options: Any) -> Json:
        """What POST /generate takes, with `options` as further fields."""
        sampling = {"temperature": 0, "max_new_tokens": self.answer_tokens, "ignore_eos": True}
        where = {} if self.replica is None else {"routed_dp_rank": self.replica}
        return {"input_ids": self.prompt, "sampling_params": sampling, **where, **options}


def make_prompt(chance: random.Random, tokens: int) -> tuple[int, ...]:
    """Random tokens, none of them special."""
    return tuple(chance.randrange(300, 2000) for _ in range(tokens))


def make_questions(count: int, seed: int, prefix_tokens: Sequence[int] = (40, 90, 160)) -> list[Question]:
    """Prompts of 4 to 160 tokens, half of them after one of the prefixes in common; answers of 2 to 30 tokens."""
    chance = random.Random(seed)
    prefixes = [make_prompt(chance, length) for length in prefix_tokens]
    questions = []
    for _ in range(count):
        prefix = chance.choice(prefixes) if chance.random() < 0.5 else ()
        prompt = prefix + make_prompt(chance, int(4 * 40 ** chance.random()))
        questions.append(Question(prompt, chance.randrange(4, 60) // 2))
    return questions


def ask(endpoint: Endpoint, question: Question) -> list[int]:
    """The tokens of the answer, which must have its length."""
    answer: Json = endpoint.ask("/generate", question.body())
    tokens: list[int] = answer["output_ids"]
    assert len(tokens) == question.answer_tokens, answer["meta_info"]["finish_reason"]
    return tokens


def ask_all(endpoint: Endpoint, questions: Sequence[Question]) -> list[list[int]]:
    """The answers to all questions, asked at once: a batch of many takes hardly longer than one of few."""
    with ThreadPoolExecutor(min(len(questions), MOST_AT_ONCE)) as clients:
        return list(clients.map(lambda question: ask(endpoint, question), questions))
