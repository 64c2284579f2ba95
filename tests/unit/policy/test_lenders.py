"""Who lends parameters to whom, beside the way from plan to plan."""

from __future__ import annotations

from kunserve_sgl.policy.lenders import spread_loans
from kunserve_sgl.policy.plan import ParameterLoan


def anybody(owner: int, borrower: int, layer: int) -> bool:
    return True


def test_layers_are_spread_over_those_who_keep_them() -> None:
    loans = spread_loans({0: range(6)}, [{1: range(6), 2: range(6), 3: (5,)}], anybody)
    assert loans == (ParameterLoan(1, 0, (0, 2, 4)), ParameterLoan(2, 0, (1, 3)), ParameterLoan(3, 0, (5,)))


def test_others_are_asked_for_what_the_first_do_not_have() -> None:
    loans = spread_loans({0: (0, 1), 1: (2,)}, [{0: (2,), 1: (0, 1)}, {2: (0, 1, 2, 3)}], anybody)
    assert loans == (ParameterLoan(0, 1, (2,)), ParameterLoan(1, 0, (0, 1)))
    loans = spread_loans({0: (0, 1), 1: (2,)}, [{0: (), 1: (0,)}, {2: (0, 1, 2, 3)}], anybody)
    assert loans == (ParameterLoan(1, 0, (0,)), ParameterLoan(2, 0, (1,)), ParameterLoan(2, 1, (2,)))


def test_what_nobody_may_lend_is_left_out() -> None:
    def may_lend(owner: int, borrower: int, layer: int) -> bool:
        return owner != 1 and layer != 2

    keepers = [{0: range(4), 1: range(4)}, {2: range(4)}]
    assert spread_loans({0: range(3)}, keepers, may_lend) == (ParameterLoan(2, 0, (0, 1)),)
    assert spread_loans({0: range(3)}, [{0: range(4)}], anybody) == ()
    assert spread_loans({0: ()}, keepers, may_lend) == ()
