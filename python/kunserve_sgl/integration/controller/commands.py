"""What the HTTP server asks of the coordinator: calls become wishes, and wishes go to it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from kunserve_sgl.control.answers import CommandAnswer
from kunserve_sgl.control.coordinator import Coordinator
from kunserve_sgl.errors import ConfigurationError
from kunserve_sgl.integration.messages import Command, CoordinatorCall
from kunserve_sgl.policy.drop_plan import DropWish
from kunserve_sgl.policy.lending import LendWish
from kunserve_sgl.policy.partial_restore import RestoreWish


def carry_out(call: CoordinatorCall, coordinator: Coordinator, done: Callable[[CommandAnswer], None]) -> None:
    """Gives the coordinator a command, or lets it say what that would do; `done` gets the answer, now or later."""
    if call.command is Command.RESTORE:
        coordinator.restore(restore_wish(call), done)
    elif call.command is Command.DROP:
        coordinator.drop(drop_wish(call), done)
    elif call.command is Command.LEND:
        coordinator.lend(lend_wish(call), done)
    elif call.command is Command.HOLD_EXCHANGE:
        coordinator.hold_exchange(call.hold, call.hold_s, done)
    elif call.command is Command.FREE_EXCHANGE:
        coordinator.free_exchange(call.hold, done)
    elif call.command is Command.PLAN_LEND:
        done(coordinator.dry_run(lend_wish(call)))
    else:
        wish = restore_wish(call) if call.command is Command.PLAN_RESTORE else drop_wish(call)
        done(coordinator.dry_run(wish))


def drop_wish(call: CoordinatorCall) -> DropWish:
    """Returns what POST /kunserve/drop asks for."""
    layers: Any = call.layers
    if isinstance(layers, dict):
        layers = {replica: tuple(hosts) for replica, hosts in layers.items()}
    elif layers is not None:
        layers = tuple(layers)
    return DropWish(tuple(tuple(group) for group in call.groups or ()), layers, call.tokens)


def lend_wish(call: CoordinatorCall) -> LendWish:
    """Returns what POST /kunserve/lend asks for. Raises ConfigurationError where a part is missing."""
    lender, borrower, tokens = call.lender, call.borrower, call.tokens
    if lender is None or borrower is None or tokens is None:
        raise ConfigurationError("from, to or tokens is missing")
    return LendWish(lender, borrower, tokens)


def restore_wish(call: CoordinatorCall) -> RestoreWish:
    """Returns what POST /kunserve/restore asks for."""
    groups = None if call.groups is None else tuple(tuple(group) for group in call.groups)
    layers: Any = call.layers
    return RestoreWish(groups, layers, call.tokens, call.force)
