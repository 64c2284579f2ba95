"""How much KV memory the requests of a replica need, now and in a moment, from what the replica reports."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

# Of the time that merged batches would have taken at home: what is longer ago counts less and less. It is time of
# batches, not of the clock, as the horizon is: nothing is measured while nobody is merged, and by the horizon it would
# be forgotten before the next drop is weighed.
SLOW_DOWN_S = 60.0


@dataclass(frozen=True, slots=True)
class AttentionTime:
    """Says what attention by messages to KV at `home` has taken a layer host since the start: `orders` were sent, and
    its batches took `spent_ms` for dividing, asking, waiting and merging, beside attention to what it has itself.
    Attention at the home took `attending_ms` of a processor, which the layer host would need itself if it had the KV.
    """

    home: int
    orders: int
    spent_ms: int
    attending_ms: int


@dataclass(frozen=True, slots=True)
class ReplicaLoad:
    """Says what a replica reports of its load. Tokens that the radix cache keeps and could evict are in none of these
    numbers.

    `used_tokens` are held by running requests, which are expected to grow by `growth_tokens`. `queued_tokens` is what
    the requests that wait, as many as may run at once, would take: prompt less cached prefix, and expected answer;
    `behind_tokens` is the same for those behind them, and for those that wait for their grammar, cached or not.
    `arrived_tokens` and `finished_tokens` count from the start, and so does `received_requests`: everything that was
    sent to this replica as a request, in the order in which it was sent, and `batches`, those that have run. The
    longest request may have `longest_request_tokens` when it ends. Answers have `mean_answer_tokens`, 0 while too few
    have ended. `is_paused` says that requests stand because somebody has asked for it. Own batches that had layers
    elsewhere have taken `merged_ms` since the start, and would have taken `home_ms` by what layers have taken here.
    `attention` has an entry for each home of KV that is attended to by messages.
    """

    capacity_tokens: int
    used_tokens: int = 0
    growth_tokens: int = 0
    queued_tokens: int = 0
    running_requests: int = 0
    queued_requests: int = 0
    arrived_tokens: int = 0
    finished_tokens: int = 0
    longest_request_tokens: int = 0
    behind_tokens: int = 0
    received_requests: int = 0
    mean_answer_tokens: int = 0
    batches: int = 0
    is_paused: bool = False
    merged_ms: int = 0
    home_ms: int = 0
    attention: tuple[AttentionTime, ...] = ()

    @property
    def demand_tokens(self) -> int:
        """Counts what the requests that run, and those that may run with them, need together."""
        return self.used_tokens + self.growth_tokens + self.queued_tokens


class Rate:
    """Follows how fast a counter grows, per second: recent seconds count more, by a time constant. Time comes in as
    data."""

    def __init__(self, time_constant_s: float) -> None:
        self.per_second = 0.0
        self._time_constant_s = time_constant_s
        self._last: tuple[float, int] | None = None

    def update(self, now_s: float, count: int) -> None:
        """Takes in the counter's value at `now_s`; an earlier time than the last one is ignored."""
        if self._last is not None:
            passed_s, counted = now_s - self._last[0], count - self._last[1]
            if passed_s <= 0:
                return
            weight = 1 - math.exp(-passed_s / self._time_constant_s)
            self.per_second += weight * (counted / passed_s - self.per_second)
        self._last = now_s, count

    def fade(self, now_s: float) -> None:
        """Takes in that the counter has not grown until `now_s`, as far as is known."""
        if self._last is not None:
            self.update(now_s, self._last[1])


@dataclass(frozen=True, slots=True)
class Forecast:
    """Says what one replica needs and has, in tokens: `ahead_tokens` is the need at the horizon,
    `trend_tokens_per_s` by what it grows. `is_one_request` says that a single request is there."""

    demand_tokens: int
    ahead_tokens: int
    capacity_tokens: int
    finish_tokens_per_s: float
    longest_request_tokens: int
    is_one_request: bool = False
    trend_tokens_per_s: float = 0.0

    @property
    def peak_tokens(self) -> int:
        """Gives the greater need, now or at the horizon."""
        return max(self.demand_tokens, self.ahead_tokens)

    @property
    def never_fits(self) -> bool:
        """Tells whether there is a request that has no room in the capacity, whatever ends."""
        return self.longest_request_tokens > self.capacity_tokens

    def with_waiting(self, tokens: int) -> Forecast:
        """Adds a request of so many tokens, which waits elsewhere until the replica has room for it."""
        return replace(
            self,
            demand_tokens=self.demand_tokens + tokens,
            ahead_tokens=self.ahead_tokens + tokens,
            longest_request_tokens=max(self.longest_request_tokens, tokens),
            is_one_request=self.demand_tokens == 0,
        )

    def wait_s(self, missing_tokens: int) -> float:
        """Returns how long it would take until requests that end have left so many tokens."""
        if self.never_fits or self.finish_tokens_per_s <= 0:
            return float("inf")
        return missing_tokens / self.finish_tokens_per_s

    def most_tokens_within(self, seconds: float) -> int:
        """Returns the greatest need within the time, or within the horizon where that is longer."""
        return max(self.peak_tokens, round(self.demand_tokens + seconds * self.trend_tokens_per_s))


@dataclass(slots=True)
class _Trend:
    arrived: Rate
    finished: Rate


@dataclass(slots=True)
class LoadHistory:
    """Keeps the latest report of every replica, and the rates at which tokens come and go there."""

    horizon_s: float
    loads: dict[int, ReplicaLoad] = field(default_factory=dict)
    _trends: dict[int, _Trend] = field(default_factory=dict)
    _merged_ms: float = 0.0  # what merged batches of all replicas have taken, and would have taken at home
    _home_ms: float = 0.0

    def add(self, replica: int, load: ReplicaLoad, now_s: float) -> None:
        """Takes in a replica's report of `now_s`, in place of the one before."""
        before = self.loads.get(replica)
        merged_ms, home_ms = (0, 0) if before is None else (before.merged_ms, before.home_ms)
        self._add_merged(load.merged_ms - merged_ms, load.home_ms - home_ms)
        self.loads[replica] = load
        if replica not in self._trends:
            self._trends[replica] = _Trend(Rate(self.horizon_s), Rate(self.horizon_s))
        self._update(replica, now_s)

    def forget(self, replica: int) -> None:
        """Forgets a replica that has ended: it needs nothing, and counts anew when it is back."""
        self.loads.pop(replica, None)
        self._trends.pop(replica, None)

    def forecasts(self, now_s: float) -> Mapping[int, Forecast]:
        """Forecasts the need of every replica that has reported. One that stays silent has nothing new: its rates
        fade."""
        found = {}
        for replica, load in self.loads.items():
            self._update(replica, now_s)
            trend = self._trends[replica]
            per_second = trend.arrived.per_second - trend.finished.per_second
            found[replica] = Forecast(
                demand_tokens=load.demand_tokens,
                ahead_tokens=max(0, round(load.demand_tokens + self.horizon_s * per_second)),
                capacity_tokens=load.capacity_tokens,
                finish_tokens_per_s=trend.finished.per_second,
                longest_request_tokens=load.longest_request_tokens,
                is_one_request=load.running_requests + load.queued_requests == 1,
                trend_tokens_per_s=per_second,
            )
        return found

    @property
    def slow_down(self) -> float:
        """Gives what a batch takes longer when replicas are merged, as a share of its time at home, by the batches that
        have run merged, the latest before all; 0 while there are none."""
        return max(0.0, self._merged_ms / self._home_ms - 1) if self._home_ms else 0.0

    def _add_merged(self, merged_ms: int, home_ms: int) -> None:
        """Takes in what merged batches have taken since the report before, evenly within that time."""
        kept, weight = 1.0, 1.0  # where it was less than a millisecond
        if home_ms > 0:
            passed = home_ms / (1000 * SLOW_DOWN_S)
            kept, weight = math.exp(-passed), -math.expm1(-passed) / passed
        self._merged_ms = kept * self._merged_ms + weight * merged_ms
        self._home_ms = kept * self._home_ms + weight * home_ms

    def _update(self, replica: int, now_s: float) -> None:
        load, trend = self.loads[replica], self._trends[replica]
        trend.arrived.update(now_s, load.arrived_tokens)
        trend.finished.update(now_s, load.finished_tokens)
