"""What a rank believes of where memory is used by messages: addresses that no rank can have are ignored with their
message, and end nobody."""

from __future__ import annotations

from functools import partial

import msgspec
import pytest
from fake_deployment import make_facts

from kunserve_sgl.args import KunserveOptions
from kunserve_sgl.control.addresses import is_memory_address
from kunserve_sgl.control.messages import LayerLoan, Lend, Welcome
from kunserve_sgl.control.order_check import OrderCheck
from kunserve_sgl.policy.plan import normal_plan
from kunserve_sgl.wire.rejections import COORDINATOR, BadMessageError

FACTS = [make_facts(replica) for replica in range(2)]
WELCOME = Welcome((("",), ("",)), (("",), ("",)), (0, 0), normal_plan(FACTS))
HERE, THERE = "tcp://127.0.0.1:4000", "tcp://127.0.0.1:4001"


def check_of(control: str, by: str) -> OrderCheck:
    """Of a rank that takes all other addresses for good ones."""
    options = KunserveOptions(kunserve_control=control, kunserve_directory="/here", kunserve_remote_attention=by)
    return OrderCheck(2, 1, FACTS[0], lambda *who: True, partial(is_memory_address, options))


def telling(welcome: Welcome, memory_addresses: tuple[tuple[str, ...], ...]) -> Welcome:
    return Welcome(
        welcome.inboxes,
        welcome.frame_addresses,
        welcome.incarnations,
        welcome.plan,
        memory_addresses=memory_addresses,
    )


@pytest.mark.parametrize(
    ("control", "by", "told", "is_believed"),
    [
        ("ipc", "map", ((), (("",), ("",))), True),
        ("ipc", "message", ((), (("",), ("",))), True),
        ("tcp", "map", ((), (("",), ("",))), True),
        ("tcp", "map", (((HERE,), (THERE,)),), False),
        ("tcp", "message", (((HERE,), (THERE,)),), True),
        ("tcp", "message", ((), ((HERE,), ("",)), ((HERE,), ("tcp://10.0.0.1:4001",)), ((HERE,), ("ipc://x",))), False),
        ("network", "auto", (((HERE,), ("tcp://10.0.0.1:4001",)),), True),
        ("network", "auto", (((HERE,), ("",)), ((HERE,), ("tcp://0.0.0.0:4001",))), False),
    ],
)
def test_where_memory_is_in_a_welcome(
    control: str, by: str, told: tuple[tuple[tuple[str, ...], ...], ...], is_believed: bool
) -> None:
    check = check_of(control, by)
    for addresses in told:
        welcome = telling(WELCOME, addresses)
        if is_believed:
            check.check(welcome, COORDINATOR, None)
        else:
            with pytest.raises(BadMessageError, match=r"memory of replica [01] rank 0 at '"):
                check.check(welcome, COORDINATOR, None)


@pytest.mark.parametrize(("maps", "is_believed"), [((), True), ((True, False), True), ((True,), False)])
def test_whose_memory_is_mapped_is_said_of_all_or_none(maps: tuple[bool, ...], is_believed: bool) -> None:
    check, welcome = check_of("ipc", "auto"), msgspec.structs.replace(WELCOME, maps=maps)
    if is_believed:
        check.check(welcome, COORDINATOR, None)
    else:
        with pytest.raises(BadMessageError, match="1 peers whose memory is mapped or not"):
            check.check(welcome, COORDINATOR, None)


def test_where_the_memory_of_a_borrower_is() -> None:
    check = check_of("tcp", "message")
    loan = LayerLoan(1, 0, (2,), (THERE,))
    check.check(Lend(1, (loan,)), COORDINATOR, None)
    check.check(Lend(1, (LayerLoan(1, 0, (2,)),)), COORDINATOR, None)
    with pytest.raises(BadMessageError, match="memory of replica 1 rank 0 at ''"):
        check.check(Lend(1, (LayerLoan(1, 0, (2,), ("",)),)), COORDINATOR, None)
