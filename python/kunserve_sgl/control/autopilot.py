"""Drives transitions by the load: takes the replicas' reports, asks the policy, and orders what it decides."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any, Protocol

from kunserve_sgl.control.answers import CommandAnswer, Verdict
from kunserve_sgl.policy.automatic import decide
from kunserve_sgl.policy.back_off import back_off_s
from kunserve_sgl.policy.decision import Act, Decision, DeploymentView, Experience, PastDecisions, Thresholds
from kunserve_sgl.policy.demand import Forecast, LoadHistory, ReplicaLoad
from kunserve_sgl.policy.drop_plan import DropWish
from kunserve_sgl.policy.lending import LendWish
from kunserve_sgl.policy.partial_restore import RestoreWish

logger = logging.getLogger(__name__)

DECISION_INTERVAL_S = 0.1
# After a transition that failed, doubled with every further one.
_FIRST_BACK_OFF_S = 1.0
_LONGEST_BACK_OFF_S = 60.0
# What it takes until memory is there, of a drop or a loan, until there is experience.
_FIRST_TRANSITION_S = 0.2
_EXPERIENCE_WEIGHT = 0.3
# Between two lines of log that say that nothing is done about a shortage.
_SILENCE_S = 10.0


class Driver(Protocol):
    """Gives the autopilot what it needs of the coordinator."""

    def view(self) -> DeploymentView | None:
        """Returns what a decision has to know of the plan that holds; None while no transition may leave it."""

    def drop(self, wish: DropWish, done: Callable[[CommandAnswer], None]) -> None:
        """Orders a drop; `done` gets the answer, now or later."""

    def lend(self, wish: LendWish, done: Callable[[CommandAnswer], None]) -> None:
        """Orders a loan; `done` gets the answer, now or later."""

    def resize(self, replica: int, tokens: int, done: Callable[[CommandAnswer], None]) -> None:
        """Orders that a replica gets so many slots of its own more, or fewer; `done` gets the answer, now or later."""

    def restore(
        self, wish: RestoreWish, done: Callable[[CommandAnswer], None], *, only_last: bool, drain_s: float
    ) -> None:
        """Orders a restore; `done` gets the answer, now or later. `only_last` undoes just the merge of each
        that came last; slots have `drain_s` to become empty."""


class Autopilot:
    """Decides by the load when to lend, to drop and to restore. `orders` says whether it may act; without, it only
    keeps book of the load. `clock` is monotonic, in seconds."""

    def __init__(
        self, driver: Driver, limits: Thresholds, drain_s: float, clock: Callable[[], float], orders: bool
    ) -> None:
        self._driver = driver
        self._limits = limits
        self._drain_s = drain_s
        self._clock = clock
        self.orders = orders
        self._history = LoadHistory(limits.horizon_s)
        self._past = PastDecisions()
        self._next_s = float("-inf")
        # What has failed is not ordered again before that time; of what, and how often in a row.
        self._not_before_s: dict[Act, float] = {}
        self._failures: Counter[Act] = Counter()
        self._broken = 0  # merges in a row that ended otherwise than by a restore
        self._silent_until_s = float("-inf")
        self._transition_s = _FIRST_TRANSITION_S
        self._is_moving = False
        self._waiting: Mapping[int, int] = {}
        self.decisions: Counter[Act] = Counter()
        self.last = Decision(Act.NOTHING, "no report yet" if orders else "orders come over HTTP")

    def on_load(self, replica: int, load: ReplicaLoad) -> None:
        """Takes in a replica's report."""
        self._history.add(replica, load, self._clock())

    def on_lost(self, replica: int) -> None:
        """Takes note that a replica has ended."""
        self._history.forget(replica)

    def set_waiting(self, tokens: Mapping[int, int]) -> None:
        """Says for which replicas requests of so many tokens wait, until there is room for them."""
        self._waiting = tokens

    def on_broken(self) -> None:
        """Takes note that a merge has ended because a layer host could not execute the batches of another: it may fail
        again. The next drop waits as after one that failed, until a restore has ended a merge."""
        self._wait_with(Act.DROP, self._broken, "a merge has ended by a failure of its layer host")
        self._broken += 1

    def forecasts(self) -> dict[int, Forecast]:
        """Returns the last report of each replica that has sent one."""
        return dict(self._history.forecasts(self._clock()))

    def status(self) -> dict[str, Any]:
        """Returns what GET /kunserve/status says of the load and of the last decision."""
        return {
            "acts": self.orders,
            "decision": self.last.act.value,
            "reason": self.last.reason,
            "demand": {
                replica: {"tokens": forecast.demand_tokens, "ahead_tokens": forecast.ahead_tokens}
                for replica, forecast in self.forecasts().items()
            },
        }

    def next_deadline_s(self) -> float | None:
        """Says when `on_tick` has something to do, on the clock's scale; None until a report comes."""
        if not self.orders or not self._history.loads or self._is_moving:
            return None
        is_settled = not (self._past.needed_at_s or self._past.base_tokens or self._waiting)
        return None if self.last.act is Act.NOTHING and is_settled and self._is_quiet else self._next_s

    @property
    def _is_quiet(self) -> bool:
        return all(load.demand_tokens == 0 for load in self._history.loads.values())

    def on_tick(self) -> None:
        """Decides where it is time to. To be called at `next_deadline_s`, and at any other time."""
        now_s = self._clock()
        if not self.orders or self._is_moving or now_s < self._next_s:
            return
        self._next_s = now_s + DECISION_INTERVAL_S
        view = self._driver.view()
        if view is None or not self._history.loads:
            return
        forecasts = dict(self._history.forecasts(now_s))
        for replica, tokens in self._waiting.items():
            if replica in forecasts:
                forecasts[replica] = forecasts[replica].with_waiting(tokens)
        experience = Experience(self._transition_s, self._history.slow_down)
        may_lend = all(now_s >= self._not_before_s.get(act, now_s) for act in (Act.FREE, Act.LEND))
        decision, past = decide(view, forecasts, self._limits, experience, self._past, now_s, may_lend)
        if now_s < self._not_before_s.get(decision.act, now_s):
            # It is as if it had not been decided; but what has been seen of the need stays known.
            past = replace(self._past, needed_at_s=past.needed_at_s, base_tokens=past.base_tokens)
            decision = Decision(Act.WAIT, f"the last {decision.act.value} failed; {decision.reason}")
        self._past = past
        self.last = decision
        self.decisions[decision.act] += 1
        if decision.act is Act.WAIT and now_s >= self._silent_until_s:
            self._silent_until_s = now_s + _SILENCE_S
            logger.info("KunServe auto: wait: %s", decision.reason)
        if decision.act is Act.DROP:
            self._order(decision, lambda done: self._driver.drop(DropWish(decision.groups, needs=decision.needs), done))
        elif decision.lends is not None:
            self._order(decision, partial(self._driver.lend, decision.lends))
        elif decision.act in (Act.FREE, Act.REUSE):
            ((replica,),) = decision.groups
            tokens = -decision.tokens if decision.act is Act.FREE else decision.tokens
            self._order(decision, partial(self._driver.resize, replica, tokens))
        elif decision.act is Act.RESTORE:
            wish = RestoreWish(decision.groups)
            self._order(
                decision,
                lambda done: self._driver.restore(wish, done, only_last=True, drain_s=self._drain_s),
            )

    def _order(self, decision: Decision, order: Callable[[Callable[[CommandAnswer], None]], None]) -> None:
        logger.info("KunServe auto: %s %s: %s", decision.act.value, [list(g) for g in decision.groups], decision.reason)
        self._is_moving = True
        order(partial(self._on_done, decision.act))

    def _on_done(self, act: Act, answer: CommandAnswer) -> None:
        self._is_moving = False
        if answer.verdict is Verdict.DONE:
            if act in (Act.FREE, Act.REUSE):  # that says nothing of whether transitions fail
                del self._failures[act]
                return
            self._failures.clear()
            if act is Act.RESTORE:
                # It took as long as requests did to leave the slots that go, which costs nobody anything.
                self._broken = 0
                return
            self._transition_s += _EXPERIENCE_WEIGHT * (answer.seconds - self._transition_s)
            return
        self._wait_with(act, self._failures[act], answer.message)
        self._failures[act] += 1

    def _wait_with(self, act: Act, failures: int, reason: str) -> None:
        """Orders it no more for a while, because of a failure after so many others."""
        wait_s = back_off_s(_FIRST_BACK_OFF_S, _LONGEST_BACK_OFF_S, failures)
        self._not_before_s[act] = max(self._not_before_s.get(act, float("-inf")), self._clock() + wait_s)
        logger.warning("KunServe auto: next %s in %g s at the earliest: %s", act.value, wait_s, reason)
