"""When a replica is started again, and when no more."""

from __future__ import annotations

import pytest

from kunserve_sgl.policy.restarts import CALM_S, RestartHistory


def test_the_pause_doubles_up_to_a_limit() -> None:
    history = RestartHistory(most_tries=9, longest_pause_s=60.0)
    pauses = [history.on_ended("it failed", 100.0) for _ in range(9)]
    assert pauses == [100.0 + pause for pause in (1, 2, 4, 8, 16, 32, *[60] * 3)]


def test_the_longest_pause_may_be_shorter_than_the_first() -> None:
    history = RestartHistory(most_tries=5000, longest_pause_s=0.5)
    assert {history.on_ended("it failed", 100.0) for _ in range(5000)} == {100.5}


def test_who_keeps_ending_is_given_up_with_the_last_reason() -> None:
    history = RestartHistory(most_tries=2, longest_pause_s=60.0)
    assert history.on_ended("the first", 100.0) == 101.0
    history.on_serving(110.0)
    assert history.on_ended("the second", 120.0) == 122.0
    assert history.on_ended("the third", 142.4) is None
    assert history.why_given_up(142.4) == "given up: ended 3 times in 42 s; the last one: the third"


@pytest.mark.parametrize(("served_s", "ends"), [(CALM_S, 1), (CALM_S - 1, 2)])
def test_who_has_served_for_long_begins_anew(served_s: float, ends: int) -> None:
    history = RestartHistory(most_tries=5, longest_pause_s=60.0)
    history.on_ended("once", 100.0)
    history.on_serving(200.0)
    history.on_ended("again", 200.0 + served_s)
    assert history.ends == ends


def test_time_without_service_is_not_calm() -> None:
    """However long a start takes."""
    history = RestartHistory(most_tries=2, longest_pause_s=60.0)
    for number in range(2):
        assert history.on_ended("it was not ready", 1e4 * number) is not None
    assert history.on_ended("it was not ready", 3e4) is None


def test_a_start_that_loses_its_node_counts_for_nothing() -> None:
    history = RestartHistory(most_tries=1, longest_pause_s=60.0)
    assert history.on_ended("it failed", 100.0) == 101.0
    for number in range(5):
        assert history.on_node_lost("its node ended", 110.0 + number) == 111.0 + number
    assert (history.ends, history.last) == (1, "its node ended")
    assert history.on_ended("it failed again", 200.0) is None
    assert RestartHistory(most_tries=1, longest_pause_s=0.5).on_node_lost("its node ended", 100.0) == 100.5
