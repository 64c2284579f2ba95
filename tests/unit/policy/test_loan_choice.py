"""Who lends to whom, and when the automatic mode lends rather than drops."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import pytest

from kunserve_sgl.policy.automatic import decide
from kunserve_sgl.policy.decision import Act, Decision, DeploymentView, Experience, PastDecisions, Thresholds, view_of
from kunserve_sgl.policy.demand import Forecast
from kunserve_sgl.policy.lending import LendWish, lend_plan
from kunserve_sgl.policy.links import Links
from kunserve_sgl.policy.loan_choice import Memory
from kunserve_sgl.policy.plan import normal_plan
from unit.policy.plan_worlds import make_facts

LIMITS = Thresholds(drop_at=0.9, restore_at=0.5, horizon_s=2.0, min_stay_s=5.0, cool_down_s=10.0, largest_group=4)
EXPERIENCE = Experience(0.2, 0.0)
MINE = Memory(granule_tokens=50, base_tokens=1000, capacity_tokens=1000, least_tokens=50, room_tokens=10_000)
NOW_S = 100.0


def needing(tokens: int, capacity: int = 1000, longest: int = 0, finish_per_s: float = 0.0) -> Forecast:
    return Forecast(tokens, tokens, capacity, finish_per_s, longest)


def view(*memory: Memory, **more: object) -> DeploymentView:
    groups = tuple((replica,) for replica in range(len(memory)))
    made = DeploymentView(groups, dict.fromkeys(groups, 0), 4000, {}, memory=dict(enumerate(memory)))
    return replace(made, **more)  # type: ignore[arg-type]


def decided(
    seen: DeploymentView,
    *forecasts: Forecast,
    past: PastDecisions | None = None,
    may_lend: bool = True,
    now_s: float = NOW_S,
) -> tuple[Decision, PastDecisions]:
    needs = dict(enumerate(forecasts))
    return decide(seen, needs, LIMITS, EXPERIENCE, past or PastDecisions(), now_s, may_lend)


def test_an_idle_replica_frees_frames_and_lends_them() -> None:
    decision, past = decided(view(MINE, MINE), needing(1200), needing(0))
    # Short of 300. Idle, replica 1 keeps an eighth, and frees the rest at once, in granules of 50.
    assert (decision.act, decision.groups, decision.tokens) == (Act.FREE, ((1,),), 850)
    assert past.base_tokens == {1: 1000}
    freed = replace(MINE, base_tokens=600, capacity_tokens=600, free_tokens=400)
    decision, past = decided(view(MINE, freed), needing(1200), needing(0), past=past)
    assert (decision.act, decision.groups, decision.lends) == (Act.LEND, ((0, 1),), LendWish(1, 0, 300))
    assert "replica 0 needs 1200 tokens now and 1200 in 2 s, has 1000; replica 1 needs 0 of its own" in decision.reason


def test_frames_that_are_free_are_lent_at_once() -> None:
    decision, past = decided(view(MINE, replace(MINE, free_tokens=300)), needing(1200), needing(0))
    assert decision.lends == LendWish(1, 0, 300)
    assert past.base_tokens == {}


@pytest.mark.parametrize(
    ("lender", "busy"),
    [
        (MINE, needing(950)),  # short itself
        (MINE, needing(400)),  # 400 are half of the 800 that it keeps, so it has 200 to spare
        (replace(MINE, least_tokens=1000), needing(0)),  # its slots cannot become free frames
        (replace(MINE, borrows=True, free_tokens=500), needing(0)),
    ],
)
def test_otherwise_a_drop(lender: Memory, busy: Forecast) -> None:
    assert decided(view(MINE, lender), needing(1200), busy)[0].act is Act.DROP


def test_where_loans_have_failed_a_drop_is_not_kept_away() -> None:
    assert decided(view(MINE, MINE), needing(1200), needing(0), may_lend=False)[0].act is Act.DROP


def test_several_lend_where_one_has_not_enough() -> None:
    decision, _ = decided(view(MINE, MINE, MINE), needing(2000), needing(0), needing(0))
    assert (decision.act, decision.tokens) == (Act.FREE, 850)
    freed = replace(MINE, base_tokens=150, capacity_tokens=150, free_tokens=850)
    decision, _ = decided(view(MINE, freed, MINE), needing(2000), needing(0), needing(0))
    assert decision.lends == LendWish(1, 0, 850)
    assert decided(view(MINE, MINE, MINE), needing(3000), needing(0), needing(0))[0].act is Act.DROP, "not enough"
    apart = view(MINE, MINE, MINE, islands=(frozenset({0, 1}), frozenset({2})))
    assert decided(apart, needing(2000), needing(0), needing(0))[0].act is Act.DROP, "replica 2 cannot lend to it"


def test_a_wait_that_is_shorter_than_a_transition_is_no_reason_unless_a_request_never_fits() -> None:
    quick = needing(1200, finish_per_s=3000.0)
    assert decided(view(MINE, MINE), quick, needing(0))[0].act is Act.WAIT
    never = replace(quick, longest_request_tokens=1100)
    assert decided(view(MINE, MINE), never, needing(0))[0].act is Act.FREE


LENT = view(
    replace(MINE, capacity_tokens=1400, borrows=True),
    replace(MINE, base_tokens=600, capacity_tokens=600, lends=True),
    groups=((0, 1),),
    reserve_tokens={(0, 1): 4000},
    before={(0, 1): {0: 1000}},
)
HALF = PastDecisions(base_tokens={1: 1000}, freed_at_s=NOW_S - 100, needed_at_s={(0, 1): NOW_S - 6})


def test_a_loan_is_taken_back_when_the_need_has_gone_and_then_the_slots_come_back() -> None:
    calm = needing(400, 1400), needing(0, 600)
    decision, past = decided(LENT, *calm, past=HALF)
    assert (decision.act, decision.groups) == (Act.RESTORE, ((0, 1),))
    still = replace(HALF, needed_at_s={(0, 1): NOW_S - 4})
    assert decided(LENT, *calm, past=still)[0].act is Act.NOTHING
    assert decided(LENT, needing(700, 1400), needing(0, 600), past=HALF)[0].act is Act.NOTHING
    assert decided(LENT, needing(400, 1400, longest=1000), needing(0, 600), past=HALF)[0].act is Act.NOTHING
    freed = replace(MINE, base_tokens=600, capacity_tokens=600, free_tokens=450)
    decision, past = decided(view(MINE, freed), *calm, past=past)
    assert (decision.act, decision.groups, decision.tokens) == (Act.REUSE, ((1,),), 400), "450 were free before"
    assert decided(view(MINE, MINE), *calm, past=past)[1].base_tokens == {}


def test_what_the_lender_needs_of_its_slots_does_not_keep_a_loan() -> None:
    assert decided(LENT, needing(400, 1400), needing(500, 600), past=HALF)[0].act is Act.RESTORE


def test_a_lender_that_is_short_gets_its_memory_back_at_once() -> None:
    past = replace(HALF, needed_at_s={})
    short = needing(700, 600)
    assert decided(LENT, needing(850, 1400), short, past=past)[0].act is Act.RESTORE
    assert decided(LENT, needing(1100, 1400), short, past=past)[0].act is Act.DROP, "the other one needs it too"
    freed = replace(MINE, base_tokens=600, capacity_tokens=600, free_tokens=400)
    soon = replace(past, freed_at_s=NOW_S)
    assert decided(view(MINE, freed), needing(850), short, past=soon)[0].act is Act.REUSE
    assert decided(view(MINE, freed), needing(850), needing(0, 600), past=soon)[0].act is Act.NOTHING, "not at once"


def test_frames_that_were_not_freed_after_all_are_not_looked_for() -> None:
    assert decided(view(MINE, MINE), needing(0), needing(0), past=HALF)[1].base_tokens == {}


def test_a_report_from_before_a_loan_is_no_reason_for_more() -> None:
    lent = replace(LENT, capacity_tokens={0: 1400, 1: 600})
    assert decided(lent, needing(1200, 1000), needing(0, 1000))[0].act is Act.NOTHING
    assert decided(LENT, needing(1200, 1000), needing(0, 600))[0].act is Act.DROP, "where nobody says so"


def test_the_view_of_a_plan_says_who_lends_and_borrows() -> None:
    facts = make_facts(3, 4, granule=2, base=4, room=20, free=[0, 40, 80])  # 16 slots per granule, of 8 frames
    before = normal_plan(facts)
    new = lend_plan(before, facts, LendWish(1, 0, 70))
    seen = view_of(new, facts, [(frozenset({0, 1}), before)], frozenset())
    assert seen.before == {(0, 1): {0: 64}}
    assert seen.capacity_tokens == {0: 144, 1: 64, 2: 64}
    memory: Mapping[int, Memory] = seen.memory
    assert memory[0] == Memory(16, 64, 144, 16, 0, 11 * 16, borrows=True)
    assert memory[1] == Memory(16, 64, 64, 16, 80, 16 * 16, lends=True, lent_tokens=80)
    assert memory[2] == Memory(16, 64, 64, 16, 160, 16 * 16)


def test_of_those_that_have_enough_the_one_with_the_fastest_link_lends() -> None:
    free = replace(MINE, free_tokens=300)
    seen = view(
        MINE, replace(free, free_tokens=400), free, free, links=Links(speeds={(0, 1): 1e8, (0, 2): 2e8, (0, 3): 9e8})
    )
    assert decided(seen, needing(1200), needing(0), needing(0), needing(0))[0].lends == LendWish(3, 0, 300)
    # Of those with links that are alike the one that has most, also where some have not been measured.
    for alike in ({(0, 1): 1e8}, {(0, 1): 1e8, (0, 2): 1.03e8, (0, 3): 3e8}, {(0, 1): 1e8, (0, 2): 4e8, (0, 3): 3e8}):
        seen = replace(seen, links=Links(speeds=alike))
        assert decided(seen, needing(1200), needing(0), needing(0), needing(0))[0].lends == LendWish(1, 0, 300)
    seen = replace(seen, links=Links({0: "a", 1: "b", 2: "b", 3: "a"}))
    assert decided(seen, needing(1200), needing(0), needing(0), needing(0))[0].lends == LendWish(3, 0, 300)
    # Who has not enough comes after who has, however fast.
    small = replace(MINE, base_tokens=100, capacity_tokens=100, least_tokens=100, free_tokens=100)
    seen = view(MINE, free, small, links=Links(speeds={(0, 1): 1e8, (0, 2): 3e8}))
    assert decided(seen, needing(1200), needing(0), needing(0, 100))[0].lends == LendWish(1, 0, 300)


def at_once(demand: int, capacity: int = 1000) -> Forecast:
    """Requests that have just come, all at once: as many are expected again."""
    return Forecast(demand, 2 * demand, capacity, 0.0, 0, trend_tokens_per_s=demand / LIMITS.horizon_s)


FREED = replace(MINE, base_tokens=150, capacity_tokens=150, free_tokens=850)


def test_requests_that_come_at_once_and_fit_into_both_memories_are_lent_all_that_there_is() -> None:
    decision, _ = decided(view(MINE, MINE), at_once(1500), needing(0))
    assert (decision.act, decision.tokens) == (Act.FREE, 850)
    assert decided(view(MINE, FREED), at_once(1500), needing(0, 150))[0].lends == LendWish(1, 0, 850)
    # They have not all come yet.
    assert decided(view(MINE, FREED), at_once(800), needing(0, 150))[0].lends == LendWish(1, 0, 850)


def test_requests_that_do_not_fit_into_both_memories_are_a_drop() -> None:
    # 900 + 850 is what there would be.
    assert decided(view(MINE, MINE), at_once(1751), needing(0))[0].act is Act.DROP
    assert decided(view(MINE, MINE), at_once(1750), needing(0))[0].act is Act.FREE
    assert decided(view(MINE, MINE), at_once(1500), needing(70))[0].act is Act.DROP, "the other one is not idle"


LENDER = replace(MINE, base_tokens=150, lends=True, lent_tokens=850)
SHARED = (replace(MINE, capacity_tokens=1850, borrows=True), LENDER)


def test_where_idle_ones_have_lent_a_forecast_alone_is_no_reason_to_drop() -> None:
    group = (0, 1)
    shared = view(*SHARED, groups=(group,), reserve_tokens={group: 4000}, capacity_tokens={0: 1850, 1: 150})
    assert decided(shared, at_once(1500), needing(0))[0].act is Act.NOTHING
    assert decided(shared, at_once(1700), needing(0))[0].act is Act.DROP, "it is short now"
    assert decided(shared, at_once(1500), needing(30))[0].act is Act.NOTHING, "it lent with that need, too"
    assert decided(shared, at_once(1500), needing(70))[0].act is Act.DROP, "who lends is not idle any more"
