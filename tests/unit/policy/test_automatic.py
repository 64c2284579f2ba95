"""Decisions from forecasts: how much a drop is to gain, and what it is weighed against."""

from __future__ import annotations

import pytest

from kunserve_sgl.policy.automatic import decide
from kunserve_sgl.policy.decision import Act, Decision, DeploymentView, Experience, PastDecisions, Thresholds
from kunserve_sgl.policy.demand import SLOW_DOWN_S, Forecast, LoadHistory, ReplicaLoad
from kunserve_sgl.policy.links import Links

LIMITS = Thresholds(drop_at=0.9, restore_at=0.5, horizon_s=2.0, min_stay_s=5.0, cool_down_s=10.0, largest_group=4)
FOUR = DeploymentView(((0,), (1,), (2,), (3,)), {(n,): 0 for n in range(4)}, 4000, {})
CALM = Forecast(100, 100, 1000, 0.0, 0)


def growing(demand: int, per_second: float, capacity: int = 1000, finish_per_s: float = 0.0) -> Forecast:
    return Forecast(demand, round(demand + 2 * per_second), capacity, finish_per_s, 0, trend_tokens_per_s=per_second)


def decided(*forecasts: Forecast, transition_s: float = 1.0, slow_down: float = 0.0) -> Decision:
    view = DeploymentView(FOUR.groups[: len(forecasts)], FOUR.reserve_tokens, FOUR.copy_tokens, {})
    experience = Experience(transition_s, slow_down)
    return decide(view, dict(enumerate(forecasts)), LIMITS, experience, PastDecisions(), 50.0)[0]


def test_a_drop_gains_what_is_needed_while_the_group_stays_merged() -> None:
    decision = decided(growing(700, 300), growing(500, 100))
    assert decision.act is Act.DROP
    # In 2 s only replica 0 is short, by 400. In 1 + 5 s it misses 700 + 1800 - 900, and the other one 500 + 600 - 900;
    # nobody gets less than half of that together.
    assert decision.needs == {0: 1600, 1: 900}
    assert decided(growing(700, 300), growing(500, 100), transition_s=3.0).needs == {0: 2200, 1: 1300}


def test_what_grows_slower_than_the_horizon_says_is_still_gained() -> None:
    """A trend that has turned does not make the need smaller than it is now."""
    assert decided(growing(1300, -200), CALM).needs == {0: 400, 1: 200}


def test_a_member_whose_need_grows_more_gets_more_although_another_one_is_short_first() -> None:
    needs = decided(growing(1000, 0), growing(300, 400)).needs
    assert needs == {0: 950, 1: 1800}


def test_how_many_are_merged_follows_from_the_horizon() -> None:
    """One copy of the parameters, room for 4,000 tokens, is not enough for what may come within the stay."""
    decision = decided(growing(700, 1200), growing(100, 0), growing(100, 0), growing(100, 0))
    assert [len(group) for group in decision.groups] == [2]
    assert decision.needs[0] == 700 + 6 * 1200 - 900


def test_replicas_that_have_not_reported_get_their_share() -> None:
    view = DeploymentView(((0,), (1,)), {(0,): 0, (1,): 0}, 4000, {})
    experience = Experience(1.0, 0.0)
    decision, _ = decide(view, {0: growing(1500, 0)}, LIMITS, experience, PastDecisions(), 50.0)
    assert decision.needs == {0: 600, 1: 300}


@pytest.mark.parametrize(("slow_down", "act"), [(0.0, Act.DROP), (0.1, Act.DROP), (0.3, Act.WAIT)])
def test_waiting_is_weighed_against_what_merging_has_cost(slow_down: float, act: Act) -> None:
    """Waiting takes 2 s; a drop costs a transition of 1 s, and what batches take longer within the stay of 5 s."""
    decision = decided(growing(1100, 0, finish_per_s=100.0), CALM, slow_down=slow_down)
    assert decision.act is act
    assert f"waiting would take 2.00 s, the pipeline costs {1 + 5 * slow_down:.2f} s" in decision.reason


def test_the_slow_down_is_that_of_merged_batches_of_all_replicas() -> None:
    history = LoadHistory(horizon_s=2.0)
    assert history.slow_down == 0.0
    history.add(0, ReplicaLoad(1000), 1.0)
    assert history.slow_down == 0.0
    history.add(0, ReplicaLoad(1000, merged_ms=15, home_ms=10), 2.0)
    history.add(1, ReplicaLoad(1000, merged_ms=33, home_ms=30), 2.0)
    assert history.slow_down == pytest.approx(0.2, rel=1e-2)
    history.add(0, ReplicaLoad(1000, merged_ms=115, home_ms=1010), 3.0)
    assert history.slow_down == 0.0, "no gain is counted on"


def test_the_slow_down_follows_the_batches_of_late() -> None:
    """However many there were before, and of whom; a replica that has been started again counts from 0."""
    history = LoadHistory(horizon_s=2.0)
    hours_ms = 4 * 3600 * 1000
    history.add(0, ReplicaLoad(1000, merged_ms=2 * hours_ms, home_ms=hours_ms), 1.0)
    assert history.slow_down == pytest.approx(1.0)
    history.add(0, ReplicaLoad(1000, merged_ms=2 * hours_ms, home_ms=hours_ms), 1e6)
    assert history.slow_down == pytest.approx(1.0), "nothing has been measured since"
    history.forget(0)
    assert history.slow_down == pytest.approx(1.0), "of others it is as true"
    minute_ms = int(1000 * SLOW_DOWN_S)
    for minute in range(1, 6):
        history.add(1, ReplicaLoad(1000, merged_ms=minute * minute_ms, home_ms=minute * minute_ms), 1e6)
    assert history.slow_down < 0.01
    history.add(0, ReplicaLoad(1000, merged_ms=2 * minute_ms, home_ms=minute_ms), 1e6)
    assert history.slow_down > 0.5


def test_the_slow_down_counts_batches_that_take_less_than_a_millisecond_at_home() -> None:
    history = LoadHistory(horizon_s=2.0)
    for report in range(1, 301):
        history.add(0, ReplicaLoad(1000, merged_ms=report, home_ms=report // 3), 1.0)
    assert history.slow_down == pytest.approx(2.0, rel=1e-2)


def on_nodes(
    nodes: str, *short: int, speeds: dict[tuple[int, int], float] | None = None, maps: bool = False
) -> list[tuple[int, ...]]:
    """Who is merged where each replica is on the node of its letter, these are short of 400 tokens, and links have been
    found to be so fast. `maps` says that those of a node map each other's memory."""
    everybody = range(len(nodes))
    groups = tuple((replica,) for replica in everybody)
    mapped = [[mine == other for other in nodes] for mine in nodes] if maps else []
    links = Links(dict(zip(everybody, nodes, strict=True)), speeds or {}, mapped)
    view = DeploymentView(groups, dict.fromkeys(groups, 0), 4000, {}, links=links)
    forecasts = {replica: growing(1300, 0) if replica in short else CALM for replica in everybody}
    return sorted(decide(view, forecasts, LIMITS, Experience(1.0, 0.0), PastDecisions(), 50.0)[0].groups)


def test_partners_are_on_one_node_where_that_is_enough() -> None:
    assert on_nodes("abab", 0) == [(0, 2)]
    assert on_nodes("abba", 0) == [(0, 3)]
    assert on_nodes("abba", 0, 1) == [(0, 3), (1, 2)]
    assert on_nodes("aaaa", 0) == [(0, 1)]


def test_partners_are_on_two_nodes_where_one_has_nobody_for_a_replica() -> None:
    assert on_nodes("abbb", 0) == [(0, 1)]
    assert on_nodes("ab", 0, 1) == [(0, 1)]
    assert on_nodes("abb", 0, 1) == [(0, 1)]


FAST, SLOW = 1e9, 1e8


def all_links(replicas: int, fast: set[tuple[int, int]]) -> dict[tuple[int, int], float]:
    pairs = [(one, other) for other in range(replicas) for one in range(other)]
    return {pair: FAST if pair in fast else SLOW for pair in pairs}


def test_the_partner_is_the_one_with_the_fastest_link() -> None:
    assert on_nodes("aaaa", 0, speeds=all_links(4, {(0, 3)})) == [(0, 3)]
    assert on_nodes("aaaa", 0, speeds=all_links(4, {(0, 2), (1, 3)})) == [(0, 2)]
    assert on_nodes("aaaa", 1, 2, speeds=all_links(4, {(0, 2), (1, 3)})) == [(0, 2), (1, 3)]
    assert on_nodes("aaaa", 0, speeds={**all_links(4, {(0, 1)}), (0, 2): 9 * FAST}) == [(0, 2)]


@pytest.mark.parametrize("times", [0.3, 0.7, 0.99, 1.0, 1.01, 1.4, 3.0])
@pytest.mark.parametrize("pair", [(0, 1), (0, 2), (0, 3)])
def test_what_is_nearly_as_fast_is_as_good(pair: tuple[int, int], times: float) -> None:
    """Measurements of one and the same link differ by as much."""
    assert on_nodes("aaaa", 0, speeds={**all_links(4, set()), pair: times * SLOW}) == [(0, 1)]
    assert on_nodes("aaaa", 0, 1, speeds={**all_links(4, set()), pair: times * SLOW}) == [(0, 1)]
    fast = {**all_links(4, {(0, 2), (0, 3)}), (0, 3): times * FAST}
    assert on_nodes("aaaa", 0, speeds=fast) == [(0, 2)]


def test_a_measurement_makes_no_link_worse_than_one_that_nobody_has_measured() -> None:
    assert on_nodes("aaaa", 0, speeds={(0, 1): SLOW}) == [(0, 1)]
    assert on_nodes("aaaa", 0, speeds={(0, 1): SLOW, (2, 3): FAST}) == [(0, 2)]


def test_what_was_measured_says_more_than_the_nodes() -> None:
    assert on_nodes("abab", 0, speeds=all_links(4, {(0, 1), (2, 3)})) == [(0, 1)]
    assert on_nodes("abab", 0, speeds=all_links(4, set())) == [(0, 1)], "all are alike"
    assert on_nodes("abab", 0, 1, speeds=all_links(4, set())) == [(0, 1)], "and one copy is enough for both"


def test_partners_map_each_others_memory_where_that_is_enough() -> None:
    """However fast the network is: what is mapped is read, and nobody is asked."""
    between = {(0, 1): FAST, (0, 3): FAST, (1, 2): FAST, (2, 3): FAST}
    assert on_nodes("abab", 0, speeds=between) == [(0, 1)]
    assert on_nodes("abab", 0, speeds=between, maps=True) == [(0, 2)]
    assert on_nodes("abab", 0, maps=True) == [(0, 2)]
    assert on_nodes("abab", 0, 1, speeds=between | {(0, 2): FAST, (1, 3): FAST}, maps=True) == [(0, 2), (1, 3)]
    assert on_nodes("abbb", 0, speeds=all_links(4, set()), maps=True) == [(0, 1)]


def test_a_link_that_has_not_been_measured_is_judged_by_the_nodes() -> None:
    assert on_nodes("abab", 0, speeds={(1, 2): FAST}) == [(0, 2)]
    assert on_nodes("abbb", 0, speeds={(0, 3): SLOW}) == [(0, 3)], "better than what nobody knows"
    assert on_nodes("abbb", 0, speeds={(1, 2): FAST}) == [(0, 1)]


def test_the_slowest_link_of_the_whole_group_counts() -> None:
    """Of three groups of two the first is short: with (2, 3) one link would be slow, with (4, 5) none."""
    pairs = ((0, 1), (2, 3), (4, 5))
    speeds = all_links(6, set(all_links(6, set())) - {(1, 2)})
    view = DeploymentView(pairs, dict.fromkeys(pairs, 0), 4000, {}, links=Links(speeds=speeds))
    forecasts = {replica: growing(1300, 0) if replica == 0 else CALM for replica in range(6)}
    decision = decide(view, forecasts, LIMITS, Experience(1.0, 0.0), PastDecisions(), 50.0)[0]
    assert decision.groups == ((0, 1, 4, 5),)


@pytest.mark.parametrize(("share", "groups"), [(0.3, [(0, 1)]), (0.2, [(0, 2), (1, 3)])])
def test_links_that_differ_little_do_not_keep_replicas_from_each_other(
    share: float, groups: list[tuple[int, ...]]
) -> None:
    """One copy is enough for replicas 0 and 1 together."""
    speeds = {pair: speed if speed == FAST else share * FAST for pair, speed in all_links(4, {(0, 2), (1, 3)}).items()}
    assert on_nodes("aaaa", 0, 1, speeds=speeds) == groups
