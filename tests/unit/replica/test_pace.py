"""A pace lets the copying of parameters take its share of the time, whatever a bit of it takes."""

from __future__ import annotations

import random

import pytest

from kunserve_sgl.replica.pace import Pace


@pytest.mark.parametrize("bit_s", [0.0005, 0.003, 0.02])
@pytest.mark.parametrize("batch_s", [0.004, 0.05])
def test_it_takes_its_share(bit_s: float, batch_s: float) -> None:
    chance, now_s = random.Random(1), 100.0
    pace, taken_s, longest_s = Pace(0.04, 0.005, now_s), 0.0, 0.0
    while now_s < 200.0:
        credit_s, boundary_s = pace.credit_s(now_s), 0.0
        while credit_s >= 0 and boundary_s <= credit_s:
            boundary_s += bit_s
        pace.pay(boundary_s)
        taken_s, longest_s = taken_s + boundary_s, max(longest_s, boundary_s)
        now_s += boundary_s + batch_s * chance.uniform(0.5, 1.5)
    assert 0.02 < taken_s / 100 < 0.0405
    assert longest_s <= 0.005 + bit_s


def test_it_does_not_save_up() -> None:
    pace = Pace(0.04, 0.005, 0.0)
    assert pace.credit_s(1000.0) == 0.005
    pace.pay(0.012)
    assert pace.credit_s(1000.1) < 0
    assert pace.credit_s(1000.2) > 0
