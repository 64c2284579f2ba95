"""Tells the coordinator how much KV memory this replica's requests need, and keeps what that costs below a limit."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import chain, islice

from kunserve_sgl.policy.demand import ReplicaLoad
from kunserve_sgl.policy.output_lengths import OutputLengths, ends_at_limit_only
from kunserve_sgl.replica.engine import Engine, Request

LEAST_INTERVAL_S = 0.05
# A report that took long is followed by a longer wait, so that reports take this share of a replica's time at most.
MOST_COST = 0.01
REPEAT_S = 1.0


class LoadReporter:
    """Reports the load of a replica, at its rank 0. Called between batches, where requests, radix tree and allocator
    agree."""

    def __init__(
        self,
        engine: Engine,
        send: Callable[[ReplicaLoad], bool],
        clock: Callable[[], float],
        longest_interval_s: float = math.inf,
    ) -> None:
        """While batches run a report is due after `longest_interval_s` at the latest, whatever the last one took: who
        says nothing for long is taken for one that stands still."""
        self._engine = engine
        self._send = send
        self._clock = clock
        self._longest_interval_s = longest_interval_s
        self._lengths = OutputLengths()
        self._open: dict[str, tuple[Request, int]] = {}  # those that have not ended, and their tokens on arrival
        self._cached: dict[str, int] = {}  # tokens of waiting requests that were in the radix cache
        self._received_requests = 0
        self._arrived_tokens = 0
        self._finished_tokens = 0
        self._next_s = clock()
        self._sent: ReplicaLoad | None = None
        self._sent_s = -math.inf
        self._is_settled = False  # whether the last report said that there is nothing to do, and still does
        self._has_news = True  # requests have come, or memory has changed, since the last report
        self._batches_when_idle = -1  # batches that had run when the replica was last seen idle
        self.reports = 0
        self.seconds = 0.0

    def on_received(self, requests: int) -> None:
        """Counts requests that came from the controller, before anything is done with them: some are refused, some wait
        for their grammar, and a health check is dropped when there is work. The next report is about all of them."""
        if requests:
            self._on_news()
            self._received_requests += requests

    def on_queued(self, request: Request) -> None:
        """Takes note of a request that has come, or comes back after a retraction."""
        self._on_news()
        if request.rid not in self._open:
            tokens = len(request.origin_input_ids) + self._rest(request)
            self._open[request.rid] = request, tokens
            self._arrived_tokens += tokens

    def on_given_back(self, request: Request) -> None:
        """Takes note that a request has ended here and goes on elsewhere: how long its answer gets is seen there."""
        self._cached.pop(request.rid, None)
        if (known := self._open.pop(request.rid, None)) is not None:
            self._finished_tokens += known[1]

    def on_memory_changed(self) -> None:
        """Takes note that slots have come or gone, or layers have moved: the next report is sent, whatever the last one
        said."""
        self._on_news()
        self._sent = None

    def _on_news(self) -> None:
        self._is_settled = False
        self._has_news = True

    def at_boundary(self) -> None:
        """Reports where it is time to, between two batches."""
        if self._clock() >= self._next_s:
            self._report()

    def on_idle(self, is_waited_for: bool = False) -> None:
        """Reports that there is nothing to run: the last report must not stay as it was while there was. It is sent at
        once when that is new, and then as often as between batches: a request that waits for its grammar goes on
        waiting. Where others may wait for this replica it is sent again every second: their batch may be with another
        layer host, which stands still, and this one does not."""
        if is_waited_for and self._clock() - self._sent_s >= REPEAT_S:
            self.on_memory_changed()
        if self._is_settled:
            return
        batches = self._engine.batches
        if batches != self._batches_when_idle or self._has_news or self._clock() >= self._next_s:
            self._batches_when_idle = batches
            self._report()

    def _report(self) -> None:
        started_s = self._clock()
        self._has_news = False
        load = self._measure()
        is_known = load == self._sent
        is_sent = is_known or self._send(load)
        if is_sent and not is_known:
            self._sent_s = started_s
        if is_sent:
            self._sent = load
        self._is_settled = is_sent and not load.running_requests and not load.queued_requests
        ended_s = self._clock()
        self.reports += 1
        self.seconds += ended_s - started_s
        wait_s = max(LEAST_INTERVAL_S, (ended_s - started_s) / MOST_COST)
        self._next_s = ended_s + min(self._longest_interval_s, wait_s)

    def _measure(self) -> ReplicaLoad:
        allocator = self._engine.allocator
        now = self._engine.load_now()
        known = [*now.running, *now.waiting, *now.for_grammar]
        unfinished = {request.rid: request for request in known if not request.finished()}
        self._close(unfinished)
        running = [request for request in now.running if not request.finished()]
        growth = sum(map(self._rest, running)) + now.prefill_rest_tokens
        # Those behind wait for others to end, whatever memory there is.
        room = max(0, now.max_running_requests - len(running))
        queued = sum(map(self._queued_tokens, islice(now.waiting, room)))
        behind = sum(map(self._tokens_to_come, chain(islice(now.waiting, room, None), now.for_grammar)))
        return ReplicaLoad(
            capacity_tokens=allocator.size,
            used_tokens=max(0, allocator.size - allocator.available_size() - now.evictable_tokens),
            growth_tokens=max(0, growth),
            queued_tokens=queued,
            running_requests=len(running),
            queued_requests=len(now.waiting),
            arrived_tokens=self._arrived_tokens,
            finished_tokens=self._finished_tokens,
            longest_request_tokens=max(map(self._tokens_to_come, unfinished.values()), default=0),
            behind_tokens=behind,
            received_requests=self._received_requests,
            mean_answer_tokens=self._lengths.mean_tokens,
            batches=now.batches,
            is_paused=now.is_paused,
        )

    def _close(self, known: dict[str, Request]) -> None:
        """Takes those that have ended off the list."""
        for rid in [rid for rid in self._open if rid not in known]:
            request, counted = self._open.pop(rid)
            self._cached.pop(rid, None)
            self._finished_tokens += counted
            reason = request.finished_reason
            if reason is not None and reason.to_json()["type"] != "abort":
                self._lengths.add(len(request.output_ids))

    def _rest(self, request: Request) -> int:
        """Estimates what a request's answer will still get: exact where its client wants so many tokens whatever they
        are, else what is expected. A limit that SGLang has filled in says nothing: it is all that the capacity
        leaves."""
        sampling = request.sampling_params
        so_far = len(request.output_ids)
        if ends_at_limit_only(sampling) and self._engine.limits.is_named(request):
            return max(0, int(sampling.max_new_tokens) - so_far)
        return self._lengths.expected_rest(so_far, sampling.max_new_tokens)

    def _queued_tokens(self, request: Request) -> int:
        if request.rid not in self._cached:
            self._cached[request.rid] = self._engine.cached_tokens(request)
        prompt = len(request.origin_input_ids) + len(request.output_ids)
        return max(1, prompt - self._cached[request.rid]) + self._rest(request)

    def _tokens_to_come(self, request: Request) -> int:
        return len(request.origin_input_ids) + len(request.output_ids) + self._rest(request)
