"""Whether it pays to exchange KV: what that saves and takes, by what was measured."""

from __future__ import annotations

import pytest

from kunserve_sgl.policy.demand import AttentionTime
from kunserve_sgl.policy.exchange_worth import MARGIN, Asking, Moves, Worth, worth_of_asking, worth_of_reading

WINDOW_S = 5.0
LONG_S = 100  # of reports, until rates are what was reported


def asking(spent_ms: int, attending_ms: int, orders: int = 30) -> Asking:
    """So much in each second, for long."""
    followed = Asking(WINDOW_S)
    for second in range(LONG_S):
        followed.update(second, AttentionTime(1, second * orders, second * spent_ms, second * attending_ms))
    return followed


def test_what_is_copied_is_copied_there_and_back_with_two_pauses_for_each_part() -> None:
    assert Moves(3, 1000, 0.5, 10.0).cost_s(0.01) == pytest.approx(2 * (10 + 1.5))


def test_what_asking_saves_is_what_it_takes_beside_attention() -> None:
    worth = worth_of_asking(1e6, asking(400, 100), 1.0, Moves(2, 10**6, 0.25, 10.0))
    assert worth.saved_s == pytest.approx(3.0)
    assert worth.cost_s == pytest.approx(3.0)
    assert "sends 30 orders a second, which take 400 ms where it would attend for 100 ms" in worth.reason
    assert worth.reason.endswith("saves 3.000 s in 10 s, and takes 3.000 s")


def test_orders_for_kv_that_stays_are_still_sent() -> None:
    whole, half = (worth_of_asking(1e6, asking(400, 100), share, Moves(1, 1, 0.0, 10.0)) for share in (1.0, 0.5))
    assert half.saved_s == pytest.approx(whole.saved_s / 2)


def test_attention_in_two_places_may_be_faster_than_in_one() -> None:
    worth = worth_of_asking(1e6, asking(100, 400), 1.0, Moves(1, 1, 0.0, 10.0))
    assert worth.saved_s == 0
    assert not worth.pays(has_begun=True)


def test_what_asking_takes_fades_where_nothing_is_reported() -> None:
    followed = asking(400, 100)
    followed.fade(LONG_S + 10 * WINDOW_S)
    assert followed.spent_ms.per_second < 1
    followed.update(LONG_S + 10 * WINDOW_S, AttentionTime(1, 0, 0, 0))  # it has begun anew
    assert followed.spent_ms.per_second >= 0


def test_fewer_layers_send_fewer_orders() -> None:
    followed = asking(400, 100)
    followed.scale(0.25)
    assert (followed.spent_ms.per_second, followed.attending_ms.per_second) == pytest.approx((100, 25), rel=1e-3)


@pytest.mark.parametrize(("borrowed", "noise"), [(100.0, 0.0), (90.0, 0.06), (50.0, 0.34)])
def test_reading_no_slower_than_measurements_differ_saves_nothing(borrowed: float, noise: float) -> None:
    worth = worth_of_reading(100.0, borrowed, noise, 1e9, Moves(1, 1, 0.0, 1e9))
    assert worth.saved_s == 0
    assert "no slower than what measurements differ by" in worth.reason


def test_what_reading_saves_is_what_is_slower_for_sure() -> None:
    worth = worth_of_reading(100.0, 50.0, 0.1, 1000.0, Moves(1, 500, 1.0, 10.0))
    assert worth.saved_s == pytest.approx(1000 * 10 * (0.02 - 0.01 - 0.1 * 0.03))
    assert worth.cost_s == pytest.approx(2 * (500 * 0.03 + 1))


@pytest.mark.parametrize(("saved_s", "begins", "goes_on"), [(0.5, False, False), (1.5, False, True), (2.1, True, True)])
def test_kv_begins_to_move_for_more_than_it_goes_on_for(saved_s: float, begins: bool, goes_on: bool) -> None:
    worth = Worth(saved_s, 1.0, "")
    assert MARGIN > 1
    assert (worth.pays(has_begun=False), worth.pays(has_begun=True)) == (begins, goes_on)
