"""Expected lengths, rates and forecasts."""

from __future__ import annotations

import random

import pytest

from kunserve_sgl.policy.demand import LoadHistory, Rate, ReplicaLoad
from kunserve_sgl.policy.output_lengths import PRIOR_TOKENS, OutputLengths


def seen(lengths: list[int]) -> OutputLengths:
    histogram = OutputLengths()
    for length in lengths:
        histogram.add(length)
    return histogram


def test_before_there_is_data() -> None:
    lengths = OutputLengths()
    assert lengths.expected_rest(0, 40) == 40
    assert lengths.expected_rest(0, 4000) == PRIOR_TOKENS
    assert lengths.expected_rest(PRIOR_TOKENS + 5, 4000) == 1
    assert lengths.expected_rest(40, 40) == 0


@pytest.mark.parametrize("seed", range(5))
def test_expected_rest_is_that_of_the_answers_seen(seed: int) -> None:
    chance = random.Random(seed)
    past = [int(chance.lognormvariate(5, 0.8)) + 1 for _ in range(1500)]
    lengths = seen(past)
    for tokens in (0, 3, 20, 100, 300):
        longer = [length for length in past if length > tokens]
        exact = sum(longer) / len(longer) - tokens
        # the bucket that `tokens` is in, an eighth of its value wide at most, is left out
        assert lengths.expected_rest(tokens, 10**6) == pytest.approx(exact, rel=0.15, abs=2 + tokens / 8)


def test_mean_is_that_of_the_answers_seen() -> None:
    assert seen([10] * 4).mean_tokens == 0
    assert seen([10] * 50 + [100] * 50).mean_tokens == 55
    assert seen([0] * 20).mean_tokens == 1


def test_limits_hold() -> None:
    lengths = seen([100] * 20)
    assert lengths.expected_rest(0, 10**6) == 100
    assert lengths.expected_rest(0, 30) == 30
    assert lengths.expected_rest(60, 10**6) == 40
    assert lengths.expected_rest(400, 10**6) == 200  # longer than any before
    assert lengths.expected_rest(400, 410) == 10


def test_the_past_is_forgotten() -> None:
    lengths = seen([10] * 5000 + [1000] * 5000)
    assert lengths.expected_rest(0, 10**6) > 700
    assert lengths.expected_rest(10**9, 2**31) > 0


def test_rate_follows_by_its_time_constant_whatever_the_interval() -> None:
    for interval_s in (0.01, 0.1, 0.5):
        rate, now_s = Rate(2.0), 0.0
        while now_s < 2.0:
            rate.update(now_s, round(1000 * now_s))
            now_s += interval_s
        assert rate.per_second == pytest.approx(1000 * (1 - 2.718281828**-1), rel=0.2)
        rate.update(now_s + 20.0, round(1000 * (now_s - interval_s)))
        assert rate.per_second == pytest.approx(0, abs=1)


def test_same_moment_twice_changes_nothing() -> None:
    rate = Rate(1.0)
    rate.update(0.0, 0)
    rate.update(0.0, 100)
    assert rate.per_second == 0


def test_forecast() -> None:
    history = LoadHistory(horizon_s=2.0)
    for tick in range(60):
        load = ReplicaLoad(1000, 200, 50, 30, arrived_tokens=50 * tick, finished_tokens=20 * tick)
        history.add(0, load, tick * 0.1)
    forecast = history.forecasts(5.9)[0]
    assert forecast.demand_tokens == 280
    assert forecast.finish_tokens_per_s == pytest.approx(200, rel=0.1)
    assert forecast.ahead_tokens == pytest.approx(280 + 2.0 * 300, rel=0.1)
    # nothing new for long: nothing comes, and nothing goes
    later = history.forecasts(60.0)[0]
    assert later.ahead_tokens == pytest.approx(280, abs=2)
    assert later.peak_tokens >= 280
