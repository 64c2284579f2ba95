"""The verdict of the endurance run: what is equal, what was dropped and restored, and what must be told as a failure.

The run itself is the command in bench/.
"""

from __future__ import annotations

import json
from dataclasses import replace
from random import Random
from typing import Any

import pytest

from endurance import build_parser, check_arguments
from long_run.answers import Answer, Choice, Outcome, Result, difference
from long_run.report import Bounds, Cycle, CycleLooks, Run, as_json, failures, format_tables
from long_run.requests import KINDS, Sizes
from long_run.watch import NORMAL, Holdings, Look, title_of

AT_START = {"state": NORMAL, "hosts": [[0, 0], [1, 1]], "replica 0": {"frames": {"total": 9, "free": 1}}}
MEBIBYTE = 1 << 20


def held(mebibytes: int = 100, descriptors: int = 30) -> dict[str, Holdings]:
    return {"sglang::scheduler": Holdings(mebibytes * MEBIBYTE, descriptors)}


def a_cycle(number: int, begins_s: float, **changes: Any) -> Cycle:
    """A burst of 10 s and a quiet time of 10 s."""
    return replace(Cycle(number, begins_s, begins_s + 10, begins_s + 20, AT_START, held()), **changes)


def looks(begins_s: float, epoch: int, *, drop_s: float = 2.0, restore_s: float = 14.0) -> list[Look]:
    """One a second: merged from `drop_s` to `restore_s` after the beginning of a cycle."""
    found = []
    for second in range(20):
        merged = drop_s <= second < restore_s
        transitions = (second >= drop_s) + (second >= restore_s)
        found.append(
            Look(begins_s + second, "merged" if merged else NORMAL, epoch + transitions, 4096 if merged else 2048)
        )
    return found


def right(kind: str = "chat", cycle: int = 1, phase: str = "burst") -> Result:
    return Result(kind, cycle, phase, 1.0, 0.5, Outcome.RIGHT)


def good_run() -> Run:
    cycles = [a_cycle(1, 0.0), a_cycle(2, 20.0)]
    seen = looks(0.0, 0) + looks(20.0, 2)
    return Run(AT_START, Bounds(10 * MEBIBYTE, 2), [right(), right("tools", 2, "quiet")], cycles, seen)


def test_a_good_run_has_no_failures() -> None:
    run = good_run()
    assert failures(run) == []
    seen = CycleLooks.of(run.cycles[0], run.looks)
    assert seen == CycleLooks(4096, 2.0, 4.0, 1, True)
    assert "all" in format_tables(run)
    assert json.loads(json.dumps(as_json(run, {"seed": "1"})))["failures"] == []


def test_a_burst_without_a_drop_is_a_failure() -> None:
    run = good_run()
    run.looks = looks(0.0, 0) + looks(20.0, 2, drop_s=99, restore_s=99)
    assert failures(run) == ["cycle 2: nothing was dropped in the burst"]


def test_a_drop_that_was_over_between_two_looks_is_seen_by_its_epoch() -> None:
    run = good_run()
    short = [Look(look.t_s, NORMAL, 4 if look.t_s > 25 else 2, 2048) for look in looks(20.0, 2)]
    run.looks = looks(0.0, 0) + short
    assert failures(run) == []


def test_a_quiet_time_without_a_restore_is_a_failure() -> None:
    run = good_run()
    run.looks = looks(0.0, 0) + looks(20.0, 2, restore_s=99)
    assert failures(run) == ["cycle 2: not restored within the 10 s of the quiet time"]
    assert "never" in format_tables(run)


def test_flapping_in_a_quiet_time_is_a_failure() -> None:
    run = good_run()
    end = run.looks[-1]
    run.looks[-1] = replace(end, epoch=end.epoch + 2)
    assert failures(run) == ["cycle 2: 3 transitions in the quiet time"]


def test_memory_that_did_not_come_back_is_a_failure() -> None:
    run = good_run()
    other = {**AT_START, "replica 0": {"frames": {"total": 9, "free": 0}}}
    run.cycles[1] = replace(run.cycles[1], memory=other)
    (failure,) = failures(run)
    assert failure.startswith("cycle 2: replica 0 is {'frames': {'total': 9, 'free': 0}}, and was")
    run.cycles[1] = replace(run.cycles[1], problem="/flush_cache: 400 busy")
    assert failures(run) == ["cycle 2: /flush_cache: 400 busy"]


@pytest.mark.parametrize("outcome", [Outcome.WRONG, Outcome.LOST, Outcome.LATE])
def test_each_request_that_did_not_end_as_it_should_is_a_failure(outcome: Outcome) -> None:
    run = good_run()
    run.results.append(Result("schema", 2, "burst", 21.0, 9.0, outcome, "what happened"))
    assert failures(run) == [
        f"1 of 3 requests are {outcome.value}:",
        "  schema, cycle 2, burst: what happened",
    ]


def test_growth_beyond_the_bounds_is_a_failure() -> None:
    run = good_run()
    run.cycles[1] = replace(run.cycles[1], held=held(110, 32))
    assert failures(run) == []
    run.cycles[1] = replace(run.cycles[1], held=held(111, 33))
    assert failures(run) == [
        "the processes hold 11.0 MiB more than after cycle 1, and 10 are allowed",
        "the processes have 3 more open files than after cycle 1, and 2 are allowed",
    ]


def test_growth_counts_from_when_the_first_cycles_have_filled_the_caches() -> None:
    run = good_run()
    run.cycles = [a_cycle(number, 20.0 * number, held=held(90 if number < 2 else 110)) for number in range(10)]
    run.looks = [look for number in range(10) for look in looks(20.0 * number, 2 * number)]
    assert run.settled == 2
    assert failures(run) == []


def test_what_the_log_and_the_watch_tell_is_a_failure() -> None:
    run = good_run()
    run.log = "fine\nTraceback (most recent call last):\ntoken_to_kv_pool memory leak detected\n"
    run.missed_looks = ["after 3 s: Timeout"]
    run.problems = ["the server ended in cycle 2"]
    assert failures(run) == [
        "the server ended in cycle 2",
        "1 times the status was not answered: after 3 s: Timeout",
        "2 lines of the log tell of errors:",
        "  Traceback (most recent call last):",
        "  token_to_kv_pool memory leak detected",
    ]
    assert failures(Run(AT_START, Bounds(1, 1))) == ["no cycle has come to its end"]


def answer(text: str, finish: str = "stop", tokens: int | None = 4) -> Answer:
    return Answer((Choice(text, finish),), tokens)


def test_answers_are_compared_in_every_field() -> None:
    assert difference(answer("a b"), answer("a b"), may_be_cut=False) == ""
    assert "'a c' (stop) instead of 'a b' (stop)" in difference(answer("a b"), answer("a c"), may_be_cut=True)
    assert "(length) instead of" in difference(answer("a b"), answer("a b", "length"), may_be_cut=False)
    assert difference(answer("a b"), answer("a b", tokens=5), may_be_cut=True) == "5 tokens instead of 4"
    assert difference(answer("a"), Answer((), 4), may_be_cut=True) == "0 answers instead of 1"
    one, other = (Answer((Choice("a", "stop", (tokens,)),)) for tokens in (1, 2))
    assert difference(one, other, may_be_cut=False)


def test_an_answer_without_a_limit_may_end_elsewhere_when_it_came_to_the_end_of_the_memory() -> None:
    long, short = answer("a b c d", "stop", 9), answer("a b", "length", 5)
    assert difference(long, short, may_be_cut=True) == ""
    assert difference(short, long, may_be_cut=True) == ""
    assert difference(long, short, may_be_cut=False)
    assert difference(long, answer("a x", "length"), may_be_cut=True), "it is not how the other one begins"
    assert difference(long, answer("a b", "stop"), may_be_cut=True), "it ended too early by itself"


def test_the_same_seed_makes_the_same_requests_of_all_kinds() -> None:
    for name, kind in KINDS.items():
        request = kind.make(Random("a seed"), Sizes(1024))
        assert request.kind == name
        assert kind.weight >= 1
        assert request.is_known or not kind.is_light, "in quiet times all answers are compared"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--clients", "0"], "--clients is 0; accepted is 1 or more"),
        (["--tokens", "100"], "--tokens is 100; accepted is 512 or more"),
        (["--burst", "30", "20"], "--burst is 30 20; accepted are two numbers above 0"),
        (["--minutes", "0"], "accepted are numbers above 0"),
    ],
)
def test_an_option_that_cannot_be_used_is_refused(
    options: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    parser = build_parser()
    with pytest.raises(SystemExit) as ended:
        check_arguments(parser, parser.parse_args(options))
    assert ended.value.code == 2
    assert message in capsys.readouterr().err


def test_titles_of_processes_are_short() -> None:
    assert title_of(["sglang::scheduler_DP0 rest"]) == "sglang::scheduler_DP0"
    assert title_of(["python", "-m", "kunserve_sgl.launch_server", "--port", "1"]) == "launch_server"
    assert title_of(["/usr/bin/python3", "-c", "pass"]) == "python3"
    assert title_of([]) == "?"
