"""Prompts for the comparisons: seeded, of lengths from one token to several hundred, without a common prefix."""

from __future__ import annotations

import random
import string
from collections.abc import Mapping
from typing import Any

_WORDS = (
    "time people water sound place year good sentence great help through line right mean old boy follow want show "
    "small large big even such turn here why land different home move try kind hand picture again change play spell "
    "air animal house point page letter mother answer city story short write please once upon there was"
).split()
# In words. The longest is several times the tokens that the tiny model's attention settles on.
_LENGTHS = (1, 2, 5, 12, 40, 120, 300)


def words(count: int, seed: int) -> str:
    """`count` words; different seeds up to 25 give texts that differ in the first character."""
    chosen = random.Random(seed).choices(_WORDS, k=count)
    chosen[0] = string.ascii_uppercase[seed] + chosen[0]
    return " ".join(chosen)


def greedy(
    text: str | list[str], new_tokens: int = 16, *, sampling: Mapping[str, Any] | None = None, **fields: Any
) -> dict[str, Any]:
    """What POST /generate takes for greedy decoding, with further sampling parameters, and `fields` beside them."""
    parameters = {"temperature": 0, "max_new_tokens": new_tokens, **(sampling or {})}
    return {"text": text, "sampling_params": parameters, **fields}


PROMPTS = tuple(words(count, seed) for seed, count in enumerate(_LENGTHS))
LONG_PROMPT = PROMPTS[-1]
ODD_PROMPTS = (
    "naïve café → 日本語 中文 Привет мир €",
    '{"name": "value", "items": [1, 2, 3]}\n\n\tdef main(self): return None\n',
    " ",
)
