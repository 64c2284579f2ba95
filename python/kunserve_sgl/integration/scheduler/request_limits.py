"""How many tokens each request of a replica may have when it ends, and which of them a smaller capacity has room for.

SGLang limits the answer of a request on arrival, by the capacity of that moment. Where the capacity changes later, the
limit has to follow, else the request could stand in the queue for ever, and everything behind it. So before slots are
taken away, every request that the replica knows must have room without them:

- one whose client named no limit has all that was left of the larger capacity. It is cut to what SGLang would have
  given it with the smaller one;
- one whose client named a limit is kept, and so are the slots, until it has ended, unless the slots are to go at
  once: then it is cut as well, and one that has no room at all is answered (`making_room.py`);
- from the moment in which slots are to go, requests that come are limited by what will be left, whoever named what, as
  they would be after that. So the first two kinds become fewer, and the slots can go.

Every tensor-parallel rank of a replica has the same requests, and does the same at the same batch boundary.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any
from weakref import WeakKeyDictionary

from kunserve_sgl.integration.scheduler.known_requests import known_requests


class RequestLimits:
    """Limits the answers of a replica's requests, at one of its ranks. `scheduler` is SGLang's."""

    def __init__(self, scheduler: Any) -> None:
        self._scheduler = scheduler
        self._asked: WeakKeyDictionary[Any, int | None] = WeakKeyDictionary()  # the limits that clients named
        self._expected_capacity: int | None = None

    def on_arrival(self, request: Any) -> None:
        """Notes which limit the client named, before SGLang sets it for the first time."""
        self._asked[request] = request.sampling_params.max_new_tokens

    def is_named(self, request: Any) -> bool:
        """Tells whether the request's client said how long the answer may be."""
        return self._asked.get(request, 0) is not None

    @property
    def capacity_for_new(self) -> int:
        """Gives the slots that requests are limited to when they arrive now."""
        capacity = int(self._scheduler.max_total_num_tokens)
        return capacity if self._expected_capacity is None else min(capacity, self._expected_capacity)

    def full_answer(self, request: Any, capacity: int) -> int:
        """Computes the limit that SGLang gives a request, which has arrived here, where there are so many slots."""
        most = self.most_new_tokens(capacity, len(request.origin_input_ids))
        for limit in (self._asked.get(request), self._scheduler.max_new_tokens_limit or None):
            most = most if limit is None else min(most, limit)
        return most

    def expect_capacity(self, tokens: int | None) -> None:
        """Takes note that slots are to go, and that so many will be left; None where slots have come instead. It stays
        so when they could not go after all: that is tried again, and must not find new requests that keep them."""
        self._expected_capacity = tokens

    def limit_to_expected(self, request: Any) -> None:
        """Cuts the limit that SGLang has set to what will be left, if the request has room there at all."""
        if self._expected_capacity is None:
            return
        most = self.most_new_tokens(self._expected_capacity, len(request.origin_input_ids))
        if most > 0:
            _cut(request, most)

    def refusal(self, capacity: int) -> str | None:
        """Says why not every request that is known would get to its end with so many slots; None if each would."""
        for request in known_requests(self._scheduler).all:
            if request.finished():
                continue
            prompt, answer = len(request.origin_input_ids), self._least_answer_tokens(request)
            if answer > (most := self.most_new_tokens(capacity, prompt)):
                return (
                    f"a request of {prompt} tokens may get {answer} more, and {capacity} slots would leave room for "
                    f"{max(0, most)}"
                )
        return None

    def cut_to(self, capacity: int) -> None:
        """Limits the requests whose clients named no limit to what SGLang would have given them with so many slots.
        There is no `refusal` of that capacity."""
        for request in known_requests(self._scheduler).all:
            if not self.is_named(request) and not request.finished():
                _cut(request, self.most_new_tokens(capacity, len(request.origin_input_ids)))

    def cut_where_possible(self, capacity: int) -> None:
        """Does so where slots have gone already, whoever needs them: an answer that is longer stays as it is. Its
        request waits for room, or is answered by the `StandstillGuard`."""
        for request in known_requests(self._scheduler).all:
            most = self.most_new_tokens(capacity, len(request.origin_input_ids))
            if not self.is_named(request) and not request.finished() and most >= self._least_answer_tokens(request):
                _cut(request, most)

    def force_to(self, capacity: int, running: Collection[int]) -> tuple[list[Any], list[Any]]:
        """Limits all requests to what fits into so many slots, also those whose clients named a limit. Returns those
        that have no room for another token: first those that end with the next one all the same, because they run and
        their answer has begun. `running` are the ids of those that run."""
        ending, without_room = [], []
        for request in known_requests(self._scheduler).all:
            if request.finished() or request.to_finish is not None:
                continue
            most, least = self.most_new_tokens(capacity, len(request.origin_input_ids)), len(request.output_ids) + 1
            if most >= least:
                _cut(request, most)
            elif id(request) in running and request.output_ids:
                _cut(request, least)
                ending.append(request)
            else:
                without_room.append(request)
        return ending, without_room

    def most_new_tokens(self, capacity: int, prompt_tokens: int) -> int:
        """Computes the longest answer that SGLang admits with so many slots; negative where the prompt itself has no
        room.

        See `Scheduler.init_req_max_new_tokens`, which says the same with the capacity of the moment: what it lets
        through can be scheduled when nothing else runs.
        """
        page_size = self._scheduler.page_size
        longest = min(self._scheduler.model_config.context_len - 1, capacity - 1)
        paged_prompt = -(-prompt_tokens // page_size) * page_size
        return int(min(longest - prompt_tokens - 1, capacity - paged_prompt - page_size - 1))

    def takes_prompt(self, capacity: int, prompt_tokens: int) -> bool:
        """Tells whether SGLang takes in so long a prompt where there are so many slots; see `max_req_input_len`."""
        return bool(prompt_tokens < min(self._scheduler.model_config.context_len - 1, capacity - 1) - 5)

    def _least_answer_tokens(self, request: Any) -> int:
        """Computes what a request's limit must not be cut below: an answer that is longer than its limit would lose
        tokens that its client has already."""
        most = int(request.sampling_params.max_new_tokens)
        return most if self.is_named(request) else min(most, len(request.output_ids) + 1)


def _cut(request: Any, most_new_tokens: int) -> None:
    sampling = request.sampling_params
    sampling.max_new_tokens = min(sampling.max_new_tokens, most_new_tokens)
    # A larger one would suppress the end of the answer to its very limit.
    sampling.min_new_tokens = min(sampling.min_new_tokens, sampling.max_new_tokens)
