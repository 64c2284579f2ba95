"""A replica's load reports: what they say, when they are sent, and what they may cost."""

from __future__ import annotations

from array import array
from types import SimpleNamespace
from typing import Any

import pytest
from fake_engine import FakeEngine

from kunserve_sgl.policy.demand import ReplicaLoad
from kunserve_sgl.replica.load_report import LEAST_INTERVAL_S, MOST_COST, REPEAT_S, LoadReporter

LONGEST_INTERVAL_S = 10.0


class Request:
    """A request as `replica.engine.Request` says it."""

    def __init__(self, rid: str, prompt: int, limit: int, ignore_eos: bool = False) -> None:
        self.rid = rid
        self.origin_input_ids = array("q", range(prompt))
        self.output_ids: list[int] = []
        self.extra_key = None
        self.finished_reason: Any = None
        self.sampling_params = SimpleNamespace(
            max_new_tokens=limit, ignore_eos=ignore_eos, stop_strs=None, stop_token_ids=None
        )

    def finished(self) -> bool:
        return self.finished_reason is not None

    def end(self, tokens: int, kind: str = "length") -> None:
        self.output_ids = [0] * tokens
        self.finished_reason = SimpleNamespace(to_json=lambda: {"type": kind})


class Allocator:
    """Of 1000 slots, as many used as the world says."""

    size = 1000

    def __init__(self, world: World) -> None:
        self._world = world

    def available_size(self) -> int:
        return self.size - self._world.used - self._world.engine.cached


class World:
    """An engine with lists that the test fills, and a clock that moves by `cost_s` when it is asked."""

    def __init__(self) -> None:
        self.now_s = 10.0
        self.cost_s = 0.0
        self.sent: list[ReplicaLoad] = []
        self.takes = True
        self.used = 0
        self.engine = FakeEngine(Allocator(self), None, None)
        self.reporter = LoadReporter(self.engine, self.send, self.clock, LONGEST_INTERVAL_S)

    def clock(self) -> float:
        self.now_s += self.cost_s / 2
        return self.now_s

    def send(self, load: ReplicaLoad) -> bool:
        if self.takes:
            self.sent.append(load)
        return self.takes

    def queue(self, *requests: Request) -> None:
        for request in requests:
            self.engine.waiting.append(request)
            self.reporter.on_queued(request)

    def start(self, *requests: Request) -> None:
        for request in requests:
            self.engine.waiting.remove(request)
            self.engine.running.append(request)

    def boundary(self) -> ReplicaLoad:
        self.now_s += LEAST_INTERVAL_S
        self.reporter.at_boundary()
        return self.sent[-1]


def test_what_a_report_says() -> None:
    world = World()
    exact, short = Request("a", 100, 60, ignore_eos=True), Request("b", 50, 20)
    waiting = [Request(f"w{number}", 30, 10) for number in range(5)]
    world.queue(exact, short, *waiting)
    world.start(exact, short)
    exact.output_ids = [1] * 10
    world.used, world.engine.cached = 160, 300
    load = world.boundary()
    assert load == ReplicaLoad(
        capacity_tokens=1000,
        used_tokens=160,
        growth_tokens=50 + 20,
        queued_tokens=2 * (30 + 10),  # two more may run at once
        running_requests=2,
        queued_requests=5,
        arrived_tokens=160 + 70 + 5 * 40,
        finished_tokens=0,
        longest_request_tokens=160,
        behind_tokens=3 * (30 + 10),
    )


def test_what_was_received_is_counted_before_it_is_queued() -> None:
    world = World()
    world.reporter.on_received(2)
    assert world.boundary().received_requests == 2
    world.engine.for_grammar.append(Request("waits for its grammar", 30, 10))
    world.reporter.on_received(1)
    load = world.boundary()
    assert (load.received_requests, load.behind_tokens, load.queued_tokens) == (3, 40, 0)


def test_refused_request_is_reported_while_idle() -> None:
    world = World()
    world.reporter.on_idle()
    world.reporter.on_received(0)
    reports = world.reporter.reports
    world.reporter.on_idle()
    assert world.reporter.reports == reports
    world.reporter.on_received(1)
    world.reporter.on_idle()
    assert world.sent[-1].received_requests == 1


def test_prompt_in_the_middle_of_its_prefill_counts_with_its_rest() -> None:
    world = World()
    request = Request("a", 500, 10)
    world.queue(request)
    world.start(request)
    world.engine.prefill_rest_tokens = 300
    assert world.boundary().growth_tokens == 300 + 10


def test_lengths_are_learnt_from_answers_that_ended_by_themselves() -> None:
    world = World()
    for number in range(20):
        request = Request(f"r{number}", 10, 1000)
        world.queue(request)
        world.start(request)
        request.end(40 if number < 10 else 1, "length" if number < 10 else "abort")
        world.engine.running.clear()
    gone = Request("aborted while it waited", 10, 1000)
    world.queue(gone)
    world.engine.waiting.clear()
    load = world.boundary()
    assert load.finished_tokens == load.arrived_tokens > 0
    running = Request("running", 10, 1000)
    world.queue(running)
    world.start(running)
    assert world.boundary().growth_tokens == 40
    assert load.mean_answer_tokens == 40


def test_nothing_is_learnt_from_an_answer_that_goes_on_elsewhere() -> None:
    world = World()
    world.queue(*(requests := [Request(f"r{number}", 10, 100) for number in range(8)]))
    world.start(*requests)
    for request in requests:
        request.end(5)
        world.reporter.on_given_back(request)
    world.engine.running.clear()
    load = world.boundary()
    assert load.finished_tokens == load.arrived_tokens > 0
    assert load.mean_answer_tokens == 0


def test_retracted_request_has_come_once() -> None:
    world = World()
    request = Request("a", 10, 10)
    world.queue(request)
    world.reporter.on_queued(request)
    assert world.boundary().arrived_tokens == 20


def test_reports_are_an_interval_apart_and_only_when_something_is_new() -> None:
    world = World()
    world.queue(Request("a", 10, 10))
    world.boundary()
    world.reporter.at_boundary()
    assert len(world.sent) == 1
    world.boundary()
    assert len(world.sent) == 1, "nothing new"
    world.used = 5
    world.now_s += LEAST_INTERVAL_S / 2
    world.reporter.at_boundary()
    assert len(world.sent) == 1, "too early"
    world.boundary()
    assert len(world.sent) == 2


def test_idle_is_said_at_once_and_once() -> None:
    world = World()
    request = Request("a", 10, 10)
    world.queue(request)
    world.boundary()
    request.end(10)
    world.engine.waiting.clear()
    world.reporter.on_idle()
    assert world.sent[-1].queued_requests == 0
    reports = world.reporter.reports
    for _ in range(5):
        world.reporter.on_idle()
    assert world.reporter.reports == reports


def test_report_that_nobody_took_is_sent_again() -> None:
    world = World()
    world.takes = False
    world.reporter.on_idle()
    assert world.sent == []
    world.takes = True
    world.reporter.on_idle()
    assert world.sent == [], "too early"
    world.now_s += LEAST_INTERVAL_S
    world.reporter.on_idle()
    assert len(world.sent) == 1


def test_an_idle_replica_where_somebody_waits_reports_as_often_as_a_busy_one() -> None:
    world = World()
    world.queue(Request("has no room, or its grammar is being compiled", 10, 10))
    world.reporter.on_idle()
    reports = world.reporter.reports
    for _ in range(1000):
        world.now_s += LEAST_INTERVAL_S / 100
        world.reporter.on_idle()
    assert world.reporter.reports - reports <= 10
    world.engine.batches += 1
    world.reporter.on_idle()
    world.reporter.on_idle()
    assert world.reporter.reports - reports <= 11, "said at once that it is idle again, and once"


def test_a_limit_that_nobody_asked_for_is_no_need() -> None:
    """Also where the client wants the answer to go on to its limit."""
    world = World()
    for number in range(20):
        request = Request(f"r{number}", 10, 1000)
        world.queue(request)
        world.start(request)
        request.end(40)
        world.engine.running.clear()
    world.boundary()
    filled_in, named = (Request(rid, 10, 900, ignore_eos=True) for rid in ("filled in", "named"))
    world.engine.limits.unnamed.append(filled_in)
    world.queue(filled_in)
    world.start(filled_in)
    load = world.boundary()
    assert (load.growth_tokens, load.longest_request_tokens) == (40, 50)
    world.queue(named)
    world.start(named)
    load = world.boundary()
    assert (load.growth_tokens, load.longest_request_tokens) == (40 + 900, 910)


def test_a_report_that_took_long_does_not_make_a_replica_silent() -> None:
    """On a machine that is too busy it may take any time."""
    world = World()
    world.cost_s = 1.0
    world.boundary()
    world.cost_s = 0.0
    reported_s = world.now_s
    reports = world.reporter.reports
    while world.reporter.reports == reports:
        world.now_s += 0.05
        world.reporter.at_boundary()
    assert 0.9 * LONGEST_INTERVAL_S < world.now_s - reported_s < 1.1 * LONGEST_INTERVAL_S


@pytest.mark.parametrize("cost_s", [0.0001, 0.002, 0.05])
def test_cost_stays_below_its_share(cost_s: float) -> None:
    world = World()
    world.reporter.at_boundary()
    began_s, seconds = world.now_s, world.reporter.seconds
    world.cost_s = cost_s
    while world.now_s < began_s + 60.0:
        world.used = (world.used + 1) % 100
        world.now_s += 0.001
        world.reporter.at_boundary()
    assert world.reporter.reports > 5
    asked_for_time_s = world.reporter.seconds - seconds
    assert asked_for_time_s <= MOST_COST * (world.now_s - began_s) * 1.1 + 2 * cost_s


def test_what_a_transition_has_changed_is_reported_while_idle() -> None:
    """Layers may have come back without any other figure changing."""
    world = World()
    world.reporter.on_idle()
    world.reporter.on_idle()
    assert len(world.sent) == 1
    world.reporter.on_memory_changed()
    for _ in range(2):
        world.reporter.on_idle()
    assert len(world.sent) == 2
    world.boundary()
    assert len(world.sent) == 2


def test_an_idle_replica_that_others_wait_for_says_every_second_that_it_is_there() -> None:
    world = World()
    for _ in range(100):
        world.reporter.on_idle(is_waited_for=True)
        world.now_s += REPEAT_S / 10
    assert len(world.sent) == 10
    assert all(load == world.sent[0] for load in world.sent)


def test_batches_that_have_run_and_a_pause_are_reported() -> None:
    """So that others can tell a replica that stands still from one that works, and from one that was told to stand."""
    world = World()
    world.engine.batches = 7
    world.reporter.on_idle()
    world.engine.is_paused = True
    world.now_s += 1.0
    world.reporter.at_boundary()
    assert [(load.batches, load.is_paused) for load in world.sent] == [(7, False), (7, True)]
