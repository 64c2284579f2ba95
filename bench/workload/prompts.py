"""Prompts as token ids: exact length, reproducible, plain vocabulary, prefixes shared as in the trace."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt

from workload.traces import TraceError, TraceRequest

# Keys of independent random streams; the numbers are part of what makes prompts reproducible.
_STREAM_OWN, _STREAM_BLOCK = 0, 1
_BLOCKS_CACHED = 16384


def plain_token_ids(tokenizer: Any) -> list[int]:
    """Ascending ids of the tokenizer's vocabulary without special and added tokens.

    Special tokens would end, split or reroute a request (end of sequence, image placeholders, tool calls).

    Raises:
        TraceError: fewer than two ids are left.
    """
    added = set(tokenizer.added_tokens_decoder) | set(tokenizer.all_special_ids)
    ids = sorted(set(tokenizer.get_vocab().values()) - added)
    if len(ids) < 2:
        raise TraceError(f"the tokenizer has {len(ids)} plain tokens; prompts need at least 2 different ones")
    return ids


class PromptBuilder:
    """Makes each request's prompt from (seed, line, copy), or from (seed, copy, hash id) per shared block.

    Copies of an arrival share nothing with each other; within one copy the recorded sharing is kept. The
    block length is a float: scaled blocks keep the shared prefix's share of the prompt.
    """

    def __init__(self, token_ids: Sequence[int], seed: int, *, hash_block_tokens: float) -> None:
        # An object array: taking from it shares the int objects, 8 bytes a token where new ints take 36.
        self._token_ids: npt.NDArray[np.object_] = np.array(token_ids, dtype=object)
        self._seed = seed
        self._block_tokens = hash_block_tokens
        self._block = lru_cache(maxsize=_BLOCKS_CACHED)(self._make_block)

    def build(self, request: TraceRequest) -> list[int]:
        """Token ids, exactly `request.prompt_tokens` of them."""
        prompt: list[int] = []
        for index, hash_id in enumerate(request.hash_ids):
            if len(prompt) >= request.prompt_tokens:
                break
            # Borders depend on the index alone: equal leading ids give equal leading tokens at any scale.
            length = round((index + 1) * self._block_tokens) - round(index * self._block_tokens)
            prompt += self._block(request.copy, hash_id, length)
        missing = request.prompt_tokens - len(prompt)
        if missing > 0:
            prompt += self._draw([self._seed, _STREAM_OWN, request.line, request.copy], missing)
        return prompt[: request.prompt_tokens]

    def _make_block(self, copy: int, hash_id: int, length: int) -> list[int]:
        return self._draw([self._seed, _STREAM_BLOCK, copy, hash_id], length)

    def _draw(self, key: list[int], length: int) -> list[int]:
        rng = np.random.default_rng(key)
        chosen: list[int] = self._token_ids[rng.integers(0, len(self._token_ids), size=length)].tolist()
        return chosen
