"""Requests that are longer than what any replica has room for: they wait in the controller until one has more."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from sglang.srt.managers.io_struct import TokenizedGenerateReqInput

from kunserve_sgl.integration.controller.held_requests import HeldRequests
from kunserve_sgl.integration.messages import ContinuedGenerateReqInput
from kunserve_sgl.policy.output_lengths import PRIOR_TOKENS, ends_at_limit_only

# SGLang admits no prompt that leaves room for fewer tokens.
_LEAST_LEFT = 7


@dataclass(frozen=True, slots=True)
class Room:
    """Says which capacity a request needs: with `least_tokens` or more a replica takes it in, and cuts no answer that
    is certain to be so long, or that a replica as it is at its start would not cut; `tokens` it had better get."""

    least_tokens: int
    tokens: int


def room_for(request: Any, context_tokens: int, page_size: int, base_tokens: int) -> Room | None:
    """Returns what SGLang's tokenized request needs, of replicas that have `base_tokens` slots at their start; None
    where that cannot be told here, or where the model takes no such prompt. See `RequestLimits.most_new_tokens`, and
    `ReturnedRequests` for what a replica does with a request that it would have to cut."""
    if not isinstance(request, TokenizedGenerateReqInput) or not request.input_ids or request.session_params:
        return None
    sampling = request.sampling_params
    prompt, most = len(request.input_ids), sampling.max_new_tokens
    if prompt + _LEAST_LEFT > context_tokens:
        return None
    goes_on = isinstance(request, ContinuedGenerateReqInput)
    so_far = len(request.output_ids) if goes_on else 0
    answer = min(PRIOR_TOKENS if most is None else most, context_tokens - prompt)
    paged = -(-(prompt + so_far) // page_size) * page_size

    def capacity(new_tokens: int) -> int:
        return max(paged + page_size + 1 + new_tokens, prompt + so_far + _LEAST_LEFT)

    is_certain = most is not None and ends_at_limit_only(sampling)
    rest = max(1, answer - so_far)
    least, tokens = capacity(rest if is_certain else 1), capacity(rest)
    if goes_on and request.was_returned:
        least = max(least, base_tokens)
        return Room(least, least)  # it waits for no more than it was given back for
    if most is not None:
        least = max(least, min(tokens, base_tokens))
    return Room(least, max(least, tokens))


class _Wish(NamedTuple):
    """Says which capacity a request waits for."""

    replica: int
    tokens: int


class LongRequests:
    """Keeps each until its replica has the capacity, for `longest_s` at most."""

    def __init__(self, longest_s: float) -> None:
        self.longest_s = longest_s
        self._held = HeldRequests(longest_s)
        self._wishes: dict[str, _Wish] = {}  # by the request's name

    def __len__(self) -> int:
        return len(self._held)

    @property
    def next_deadline_s(self) -> float | None:
        """Says when `take_overdue` has something to return; None while nothing is held."""
        return self._held.next_deadline_s

    @property
    def wanted(self) -> Mapping[int, int]:
        """Says by replica which capacity the longest of its requests waits for."""
        found: dict[int, int] = {}
        for wish in self._wishes.values():
            found[wish.replica] = max(wish.tokens, found.get(wish.replica, 0))
        return found

    def add(self, request: Any, replica: int, tokens: int, since_s: float) -> bool:
        """Keeps a request, which waits since `since_s`, until `replica` has a capacity of `tokens`. Returns False where
        there are too many."""
        is_kept = self._held.add(request, since_s)
        if is_kept:
            self._wishes[request.rid] = _Wish(replica, tokens)
        return is_kept

    def take_ready(self, is_there: Callable[[int, int], bool]) -> list[tuple[Any, int, float]]:
        """Returns the requests that `is_there(replica, tokens)` holds for, each with its replica, and since when it has
        waited."""

        ready = self._held.take_where(lambda request: is_there(*self._wishes[request.rid]))
        return [(request, self._wishes.pop(request.rid).replica, since_s) for request, since_s in ready]

    def take_overdue(self, now_s: float) -> list[Any]:
        """Returns those that have waited for too long."""
        return self._forget(self._held.take_overdue(now_s))

    def take_aborted(self, abort: Any) -> list[Any]:
        """Returns those that SGLang's AbortReq is about."""
        return self._forget(self._held.take_aborted(abort))

    def _forget(self, taken: list[Any]) -> list[Any]:
        for request in taken:
            del self._wishes[request.rid]
        return taken
