"""What automatic mode lends and takes back. A loan costs no pipeline, so it comes before a drop."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from functools import partial

from kunserve_sgl.policy.decision import (
    Act,
    Decision,
    DeploymentView,
    Experience,
    PastDecisions,
    Thresholds,
    fits,
    missing_of,
    shortage_of,
)
from kunserve_sgl.policy.demand import Forecast
from kunserve_sgl.policy.lending import LendWish
from kunserve_sgl.policy.loan_choice import LoanChoice, choose_loan


def still_freed(view: DeploymentView, base_tokens: Mapping[int, int]) -> dict[int, int]:
    """Leaves out who has its slots again, or has been started anew with them."""
    return {
        replica: tokens
        for replica, tokens in base_tokens.items()
        if replica not in view.memory or view.memory[replica].base_tokens < tokens
    }


def reuse(view: DeploymentView, past: PastDecisions, of: Collection[int]) -> Decision | None:
    """Lets a replica out of `of` use frames again that it was to lend, where nobody has them any more."""
    for replica in sorted(past.base_tokens.keys() & set(of)):
        memory = view.memory.get(replica)
        if memory is None or memory.shares or replica in view.unavailable:
            continue
        tokens = min(past.base_tokens[replica] - memory.base_tokens, memory.free_tokens)
        if tokens > 0:
            reason = f"replica {replica} has {memory.base_tokens} tokens, and lends none of the {tokens} that it freed"
            return Decision(Act.REUSE, reason, ((replica,),), tokens=tokens)
    return None


def lend(
    view: DeploymentView,
    forecasts: Mapping[int, Forecast],
    shortages: Mapping[int, int],
    limits: Thresholds,
    experience: Experience,
) -> Decision:
    """Lends to the one that is most short and can get all that it is short of, or frees frames for that. It costs no
    pipeline, so less than a drop. Where nobody can get all that is forecast, and others are idle, what is needed now is
    enough: requests that have come at once look as if as many would go on coming, and a drop can follow."""
    worth = {
        replica: missing
        for replica, missing in shortages.items()
        if forecasts[replica].wait_s(missing) > experience.transition_s
    }
    stay_s = experience.transition_s + limits.min_stay_s
    wanted = {
        replica: max(
            missing,
            forecasts[replica].most_tokens_within(stay_s) - round(limits.drop_at * forecasts[replica].capacity_tokens),
        )
        for replica, missing in worth.items()
    }
    # Who lends keeps room for one like any that a replica takes now, too.
    longest = max((each.longest_request_tokens for each in forecasts.values() if not each.never_fits), default=0)
    own = _kept_for(forecasts, limits)
    needs = {replica: max(longest, tokens) for replica, tokens in own.items()}
    may_lend = view.memory.keys() - shortages.keys() - view.unavailable
    idle = {one for one in may_lend if view.memory[one].is_idle(own.get(one, 0))}
    now = {
        replica: max(1, missing_of(forecasts[replica].demand_tokens, forecasts[replica], limits)) for replica in worth
    }
    for least, lenders in ((worth, may_lend), (now, idle)):
        loan = choose_loan(
            view.memory,
            least,
            wanted,
            needs,
            partial(_partners, view, lenders),
            view.group_of,
            limits.largest_group,
            view.links.slowness,
        )
        if loan is not None:
            return _as_decision(loan, forecasts, limits)
    return Decision(Act.NOTHING, "nobody can lend")


def borrows_of_idle(view: DeploymentView, forecasts: Mapping[int, Forecast], limits: Thresholds, replica: int) -> bool:
    """Tells whether a replica has been lent memory by others, who need next to none."""
    memory, needs = view.memory, _kept_for(forecasts, limits)
    others = [other for other in view.group_of(replica) if other != replica]
    return replica in memory and memory[replica].borrows and all(memory[o].is_idle(needs.get(o, 0)) for o in others)


def _kept_for(forecasts: Mapping[int, Forecast], limits: Thresholds) -> dict[int, int]:
    """Says what who lends keeps for its requests, so that it is far from being short itself."""
    return {replica: math.ceil(forecast.peak_tokens / limits.restore_at) for replica, forecast in forecasts.items()}


def _partners(view: DeploymentView, lenders: Collection[int], replica: int) -> set[int]:
    island = view.island_of((replica,))
    return {other for other in lenders if other != replica and view.island_of((other,)) == island}


def _as_decision(loan: LoanChoice, forecasts: Mapping[int, Forecast], limits: Thresholds) -> Decision:
    idle = forecasts.get(loan.lender)
    reason = (
        f"{shortage_of(loan.borrower, forecasts, limits)}; replica {loan.lender} needs "
        f"{0 if idle is None else idle.peak_tokens} of its own"
    )
    if loan.frees_tokens:
        return Decision(Act.FREE, reason, ((loan.lender,),), tokens=loan.frees_tokens)
    group = tuple(sorted((loan.lender, loan.borrower)))
    reason = f"{loan.tokens} tokens from replica {loan.lender} to {loan.borrower}: {reason}"
    return Decision(Act.LEND, reason, (group,), lends=LendWish(loan.lender, loan.borrower, loan.tokens))


def take_back(
    view: DeploymentView, forecasts: Mapping[int, Forecast], shortages: Mapping[int, int], limits: Thresholds
) -> Decision | None:
    """Takes back at once what was lent last in a group in which a lender is short, where the others can do without."""
    for replica in sorted(shortages):
        group = view.group_of(replica)
        memory = view.memory.get(replica)
        if memory is None or not memory.lends or group not in view.before or view.unavailable & set(group):
            continue
        if fits(forecasts, view.before[group], limits.drop_at):
            reason = f"{shortage_of(replica, forecasts, limits)}; what it lends is not needed"
            return Decision(Act.RESTORE, reason, (group,))
    return None
