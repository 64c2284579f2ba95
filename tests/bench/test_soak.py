"""The verdict of a soak: what must be told as a failure, and what may fail because a process was killed meanwhile.

The run itself is the command in bench/.
"""

from __future__ import annotations

from dataclasses import replace

import pytest

from long_run.answers import Outcome, Result
from long_run.events import Event
from long_run.report import Bounds
from long_run.soak_report import Rest, Soak, failures, format_tables
from long_run.watch import Holdings
from soak import build_parser, check_arguments

AT_START = {"state": "normal", "replica 0": {"capacity_tokens": 1024}}
MEBIBYTE = 1 << 20
DONE = (200, "")
DROP = Event(1, "drop", "drop {'groups': [[0, 1]]}", 0.3, (DONE,))
KILL = Event(2, "kill", "sglang::scheduler_DP1 was killed", 0.1, whole_s=12.0)


def a_rest(number: int, mebibytes: int = 100, descriptors: int = 40, mapped: int | None = None) -> Rest:
    held = Holdings(mebibytes * MEBIBYTE, descriptors, (500 if mapped is None else mapped) * MEBIBYTE)
    return Rest(number, AT_START, {"sglang::scheduler": held}, (DONE,))


def good_soak() -> Soak:
    results = [Result("chat", 0, "burst", 1.0, 0.5, Outcome.RIGHT)]
    return Soak(AT_START, Bounds(10 * MEBIBYTE, 2), results, [DROP, KILL], [a_rest(1), a_rest(2, 105, 42)])


def test_a_good_soak_has_no_failures() -> None:
    soak = good_soak()
    assert failures(soak) == []
    tables = format_tables(soak)
    assert "kill" in tables
    assert "12.0" in tables
    assert "1 of 1" in tables


@pytest.mark.parametrize(
    ("event", "expected"),
    [
        (replace(DROP, answers=((409, "busy"),)), ["event 1, drop: answered 409 busy"]),
        (replace(DROP, answers=((409, "tokens: 208 cannot be gained by groups [[0, 1]]; at most 128 now"),)), []),
        (replace(DROP, answers=((409, "no slots would be gained: replica 0 would have 2 free frames"),)), []),
        (replace(DROP, kind="resize", answers=((409, "900 tokens are in use, and 816 slots would stay"),)), []),
        (
            replace(
                DROP,
                kind="resize",
                answers=((409, "a request of 40 tokens may get 982 more, and 896 slots would leave room for 854"),),
            ),
            [],
        ),
        (replace(DROP, answers=((409, "groups [[0, 1]] are restoring: load"),), may_be_refused=True), []),
        (
            replace(DROP, answers=((503, "rolled back"),), may_be_refused=True),
            ["event 1, drop: answered 503 rolled back"],
        ),
        (replace(DROP, kind="kill in a drop", answers=((409, "rolled back"),), whole_s=9.0), []),
        (replace(DROP, kind="kill in a drop", answers=((503, "degraded"),), whole_s=9.0), []),
        (replace(DROP, kind="kill in a drop", answers=((500, "KeyError"),)), ["event 1, kill in a drop: answered 500"]),
        (replace(DROP, kind="stall in a drop", answers=((0, "refused"),)), ["event 1, stall in a drop: answered 0"]),
        (replace(KILL, differences=("replica 0: a slot leaks",)), ["event 2, kill: replica 0: a slot leaks"]),
    ],
)
def test_an_order_that_nothing_disturbs_must_succeed(event: Event, expected: list[str]) -> None:
    soak = good_soak()
    soak.events = [event]
    found = failures(soak)
    assert len(found) == len(expected)
    assert all(one.startswith(other) for one, other in zip(found, expected, strict=True))


@pytest.mark.parametrize("outcome", [Outcome.WRONG, Outcome.LOST, Outcome.LATE])
def test_a_request_that_does_not_end_right_is_a_failure(outcome: Outcome) -> None:
    soak = good_soak()
    soak.results.append(Result("tools", 0, "burst", 1.0, 0.5, outcome, "503"))
    assert failures(soak) == [f"1 of 2 requests are {outcome.value}:", "  tools, cycle 0, burst: 503"]


def test_a_request_that_ends_as_the_documents_say_is_no_failure() -> None:
    soak = good_soak()
    detail = "503: replica 1 has ended; the request was at 2 replicas when they ended, and is not tried again"
    soak.results.append(Result("tools", 0, "burst", 1.0, 0.5, Outcome.LOST, detail))
    assert failures(soak) == []
    assert "1 requests ended as docs/faults.md says" in format_tables(soak)
    soak.results.append(Result("tools", 0, "burst", 1.0, 0.5, Outcome.WRONG, detail))
    assert len(failures(soak)) == 2


def test_at_rest_all_is_as_at_the_start() -> None:
    soak = good_soak()
    changed = {**AT_START, "replica 0": {"capacity_tokens": 1000}}
    soak.rests[1] = replace(soak.rests[1], memory=changed, answers=((409, "drains"),), differences=("a frame",))
    found = failures(soak)
    assert [each.split(": ", 1)[1] for each in found] == [
        "a frame",
        "answered 409 drains",
        "replica 0 is {'capacity_tokens': 1000}, and was {'capacity_tokens': 1024} at the start",
    ]
    soak.rests[1] = replace(soak.rests[1], problem="/flush_cache: 400")
    assert failures(soak)[1:] == ["at rest after event 2: /flush_cache: 400"]


def test_growth_and_an_early_end_are_failures() -> None:
    soak = good_soak()
    soak.rests[1] = a_rest(2, 150, 60, mapped=560)
    assert failures(soak) == [
        "memory grows by 50.0 MiB over the 1 events after event 1, and 10 are allowed",
        "open files grow by 20 over the 1 events after event 1, and 2 are allowed",
    ]
    soak.rests.clear()
    soak.problems.append("after 2 events: the server has ended")
    assert failures(soak) == ["after 2 events: the server has ended", "the server has never come to rest"]


@pytest.mark.parametrize(
    ("mebibytes", "fails"),
    [
        ([50, 80, 100, 100, 101, 100, 100, 99], False),  # the warm-up
        ([100, 100, 100, 140, 100, 101, 100, 100], False),  # a replica had just been started
        ([100, 100, 100, 100, 101, 100, 100, 140], False),
        ([100, 100, 102, 104, 106, 108, 110, 114], True),
    ],
)
def test_memory_is_flat_where_the_slope_after_the_warm_up_is(mebibytes: list[int], fails: bool) -> None:
    soak = good_soak()
    soak.rests = [a_rest(20 * (place + 1), held, mapped=2 * held) for place, held in enumerate(mebibytes)]
    found = failures(soak)
    assert found == (
        ["memory grows by 12.0 MiB over the 120 events after event 40, and 10 are allowed"] if fails else []
    )
    assert "per event" in format_tables(soak)


def test_pages_that_are_shared_no_more_are_no_growth() -> None:
    soak = good_soak()
    soak.rests = [a_rest(20 * place, 100 + 10 * place, mapped=700) for place in range(1, 8)]
    assert failures(soak) == []


def test_a_server_in_automatic_mode_must_drop_and_restore_by_itself() -> None:
    soak = good_soak()
    soak.log = "KunServe auto: drop [[0, 1]]: it needs more\nKunServe auto: wait: restore [[0, 1]] later\n"
    assert failures(soak) == ["nothing was restored by itself"]
    soak.log += "KunServe auto: restore [[0, 1]]: it needs less\n"
    assert failures(soak) == []
    assert "by itself: dropped 1 times, restored 1 times" in format_tables(soak)


def test_no_more_than_some_examples_are_told() -> None:
    soak = good_soak()
    soak.events = [replace(DROP, number=number, answers=((409, "busy"),)) for number in range(25)]
    assert len(failures(soak)) == 11
    assert failures(soak)[-1] == "and 15 more of these"


@pytest.mark.parametrize(
    "options", [["--events", "0"], ["--replicas", "1"], ["--kinds", "drop,fire"], ["--whole", "0"]]
)
def test_options_that_cannot_be_used_are_refused(options: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    parser = build_parser()
    with pytest.raises(SystemExit) as ended:
        check_arguments(parser, parser.parse_args(options))
    assert ended.value.code == 2
    assert "accepted" in capsys.readouterr().err


def test_kinds_are_chosen() -> None:
    assert build_parser().parse_args(["--kinds", "kill, restore,kill"]).kinds == ("kill", "restore")
