"""What a request may say: every value that would end a replica, refused before the request is sent to one.

SGLang's schedulers trust what reaches them: a token id that the embedding does not have ends the process, and with it
those it is merged with. `BadRequestError` is a ValueError, which every route answers with 400 in its own form.
Pure functions over plain values; `tokenizer_manager.py` calls them.
"""

from __future__ import annotations

import math
import re
from array import array
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from kunserve_sgl.integration.bad_request import BadRequestError
from kunserve_sgl.integration.launcher.request_bodies import shown

# Answers that one call may ask for. Each is a request of its own in the launcher's memory before any replica has it.
MAX_ANSWERS = 16384
MAX_TOP_K = 1 << 30  # SGLang's "all"; the sampler keeps it in 32 bits
INT64 = range(-(1 << 63), 1 << 63)
# Logits are divided by the penalty and by the temperature (1e-6 at least) in float32, where an overflow ends sampling.
SMALLEST_REPETITION_PENALTY = 1e-6
LARGEST_LOGIT_BIAS = 1e30
LARGEST_TEMPERATURE = 1e30


def check_prompt(ids: array[int] | None, vocab_size: int) -> None:
    """Checks the token ids of one prompt, as they are sent: int64."""
    if ids is None:
        return
    if not len(ids):
        raise BadRequestError("input_ids (prompt): a prompt is empty; at least one token is needed")
    values = np.frombuffer(ids, dtype=np.uint64)  # where a negative one is larger than all that are accepted
    if values.max() >= vocab_size:
        bad = int(np.argmax(values >= vocab_size))
        raise BadRequestError(
            f"input_ids (prompt): token id {ids[bad]} at position {bad} is out of range; "
            f"accepted are 0 to {vocab_size - 1}"
        )


def check_token_ids(field: str, ids: Iterable[Any], vocab_size: int) -> None:
    """Checks the token ids of a short list."""
    for token in ids:
        if type(token) is not int or not 0 <= token < vocab_size:
            raise BadRequestError(f"{field}: {shown(token)} is no token id; accepted are 0 to {vocab_size - 1}")


def check_embeddings(rows: Sequence[Sequence[float]], hidden_size: int) -> None:
    """Checks a prompt that is given as embeddings."""
    if not len(rows):
        raise BadRequestError("input_embeds: a prompt is empty; at least one token is needed")
    for position, row in enumerate(rows):
        if len(row) != hidden_size:
            raise BadRequestError(
                f"input_embeds: position {position} has {len(row)} numbers; accepted are {hidden_size}, "
                "the hidden size of the model"
            )


def check_logprob_options(
    *, top_logprobs_num: int, logprob_start_len: int, token_ids_logprob: Iterable[Any] | None, vocab_size: int
) -> None:
    """Checks what log-probabilities are asked for. That the start lies within the prompt is checked by the scheduler,
    which knows what a session puts before it."""
    if not 0 <= top_logprobs_num <= vocab_size:
        raise BadRequestError(
            f"top_logprobs_num (logprobs, top_logprobs): {top_logprobs_num} is out of range; "
            f"accepted are 0 to {vocab_size}"
        )
    if logprob_start_len < -1:
        raise BadRequestError(
            f"logprob_start_len: {logprob_start_len} is out of range; accepted are -1 (none of the prompt) "
            "to the length of the prompt"
        )
    check_token_ids("token_ids_logprob", token_ids_logprob or (), vocab_size)


def check_sampling(sampling: Any, *, vocab_size: int, context_tokens: int) -> None:
    """Checks SGLang's SamplingParams after its own `verify`, which leaves out what only float32 or int32 cannot
    hold."""
    check_token_ids("stop_token_ids", sampling.stop_token_ids or (), vocab_size)
    _check_range("top_k", sampling.top_k, 1, MAX_TOP_K, " (or -1: all)")
    _check_range("min_new_tokens", sampling.min_new_tokens, 0, context_tokens)
    _check_range("temperature", sampling.temperature, 0, LARGEST_TEMPERATURE)
    _check_range("repetition_penalty", sampling.repetition_penalty, SMALLEST_REPETITION_PENALTY, 2)
    if sampling.sampling_seed is not None and sampling.sampling_seed not in INT64:
        raise BadRequestError(f"sampling_seed (seed): {shown(sampling.sampling_seed)} is no integer of 64 bits")
    if sampling.stream_interval is not None:
        _check_range("stream_interval", sampling.stream_interval, 1, INT64[-1])
    for token, bias in (sampling.logit_bias or {}).items():
        if not abs(bias) <= LARGEST_LOGIT_BIAS:  # not a number fails too
            raise BadRequestError(
                f"logit_bias: {shown(bias)} for token {shown(token)} is out of range; "
                f"accepted are {-LARGEST_LOGIT_BIAS:g} to {LARGEST_LOGIT_BIAS:g}"
            )


def check_patterns(field: str, patterns: str | Iterable[str] | None) -> None:
    """Checks that every pattern can be compiled. SGLang parses an expression to see how long a match may be; it is
    compiled in the scheduler only."""
    for pattern in [patterns] if isinstance(patterns, str) else patterns or ():
        try:
            re.compile(pattern)
        except (re.error, RecursionError, OverflowError) as error:
            raise BadRequestError(f"{field}: {shown(pattern)} is no regular expression: {error}") from None


def check_positions(field: str, positions: Iterable[int], prompt_tokens: int) -> None:
    """Raises BadRequestError for a position that is not in a prompt of `prompt_tokens`; `field` is named in the
    message."""
    for position in positions:
        if not 0 <= position < prompt_tokens:
            raise BadRequestError(f"{field}: position {shown(position)}; accepted are 0 to {prompt_tokens - 1}")


def check_labels(labels: Iterable[str], accepted: Collection[str]) -> None:
    """Checks names of metric labels: those that the metrics do not have end the loop that takes in answers, and the
    server with it."""
    for name in labels:
        if name not in accepted:
            known = ", ".join(sorted(accepted)) or "none (see --tokenizer-metrics-allowed-custom-labels)"
            raise BadRequestError(f"custom_labels: {shown(name)} is no label of the metrics; accepted are {known}")


def check_answer_count(sampling_params: Any, prompts: int) -> bool:
    """Checks `n`, before SGLang copies the call as often, and tells whether it is more than one."""
    several = sampling_params if isinstance(sampling_params, list) else [sampling_params]
    largest = max(1, MAX_ANSWERS // max(1, prompts))
    asks_for_several = False
    for each in several:
        count = each.get("n", 1) if isinstance(each, dict) else 1
        if count is None:
            each["n"] = 1  # as SGLang's SamplingParams reads it
        elif type(count) is not int or not 1 <= count <= largest:
            raise BadRequestError(
                f"n: {shown(count)} is out of range; accepted are 1 to {largest} for {prompts} "
                f"prompt{'s' if prompts != 1 else ''}"
            )
        else:
            asks_for_several |= count > 1
    return asks_for_several


def count_prompts(text: object, input_ids: object, input_embeds: object) -> int | None:
    """Counts the prompts of a call; None where it has one that is in no list. What gives no prompt at all is
    refused."""
    if isinstance(text, str):
        return None
    if text is not None:
        return _length("text", text)
    if input_ids is not None:
        return _nested("input_ids", input_ids, (int,))
    if input_embeds is not None:
        rows = _length("input_embeds", input_embeds)
        _nested("input_embeds", input_embeds[0], (int, float))  # type: ignore[index]
        return None if isinstance(input_embeds[0][0], (int, float)) else rows  # type: ignore[index]
    return None


def check_lists(fields: Mapping[str, object], prompts: int | None) -> None:
    """Checks fields that may have a value per prompt: they have as many as there are prompts, and none where there is
    one prompt that is in no list."""
    for field, value in fields.items():
        if not isinstance(value, list):
            continue
        if prompts is None:
            raise BadRequestError(f"{field}: a list, but there is one prompt that is in no list; accepted is one value")
        if len(value) != prompts:
            raise BadRequestError(f"{field}: a list of {len(value)}; accepted is one value, or {prompts} in a list")


def _check_range(field: str, value: Any, least: float, most: float, besides: str = "") -> None:
    if not least <= value <= most or not math.isfinite(value):
        raise BadRequestError(f"{field}: {shown(value)} is out of range; accepted are {least} to {most}{besides}")


def _length(field: str, value: object) -> int:
    if not isinstance(value, Collection) or isinstance(value, (str, bytes, Mapping)):
        raise BadRequestError(f"{field}: {shown(value)} is no list")
    if not len(value):
        raise BadRequestError(f"{field} cannot be empty.")  # in the words that SGLang has for input_ids
    return len(value)


def _nested(field: str, value: object, kinds: tuple[type, ...]) -> int | None:
    """Returns the length of a list of lists; None for a flat list."""
    length = _length(field, value)
    first = value[0]  # type: ignore[index]
    if isinstance(first, kinds):
        return None
    if not isinstance(first, list):
        raise BadRequestError(f"{field}: {shown(first)} is neither a number nor a list of numbers")
    return length
