"""What a soak says of KV that changes its home: whether it has come as far as it can, and whether the status is true.
The statuses are those of a coordinator whose replicas are scripted."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
from fake_deployment import FakeDeployment

from kunserve_sgl.args import Exchange
from kunserve_sgl.control.messages import Phase
from long_run.events import Event
from long_run.exchanges import (
    Course,
    Progress,
    contradictions,
    left_behind,
    progress_of,
    unreturned,
    wait_for_end,
    wait_for_progress,
)
from long_run.report import Bounds
from long_run.soak_report import Soak, failures, format_tables

PARTS = 8  # each of two replicas has dropped half of 8 layers
FRAMES = 4  # of one part
NEVER = Progress(False, 0, 0, 0, 0)
ENDED = Progress(False, PARTS, PARTS, 800, 0)


def merged() -> FakeDeployment:
    """Just merged, with an exchange under way."""
    deployment = FakeDeployment(exchange=Exchange.ON).start()
    deployment.order_drop((0, 1))
    while not deployment.answers:
        deployment.deliver_one()
    return deployment


def status_of(deployment: FakeDeployment, free: int = FRAMES) -> dict[str, Any]:
    """As the route gives it; each replica has `free` frames."""
    status: dict[str, Any] = json.loads(json.dumps(deployment.coordinator.status()))
    frames = {"free": free, "per_granule": 8}
    status["replicas"] = [{**member, "frames": frames} for member in status.pop("members")]
    return status


def test_an_exchange_is_waited_for_until_all_is_where_it_is_read() -> None:
    deployment = merged()
    before = progress_of(status_of(deployment))
    assert (before.running, before.parts, before.parts_done) == (True, PARTS, 0)
    assert len(left_behind(status_of(deployment))) == PARTS

    def ask() -> dict[str, Any]:
        deployment.deliver_one()
        return status_of(deployment)

    met = progress_of(wait_for_progress(ask, before, 0.5, 60.0))
    assert (met.running, met.parts_done) == (True, PARTS // 2)
    status, wrong = wait_for_end(ask, 60.0)
    assert wrong == []
    assert progress_of(status).parts_done == PARTS
    assert progress_of(wait_for_progress(lambda: status, before, 0.5, 0.0)) == progress_of(status), "it is over"


def test_kv_that_could_move_and_does_not_is_told() -> None:
    deployment = FakeDeployment().start()  # it exchanges nothing
    deployment.drop((0, 1))
    status, wrong = wait_for_end(lambda: status_of(deployment), 0.0)
    assert wrong[0] == f"the exchange has not ended within 0 s: 0 of {PARTS} parts"
    assert len(wrong) == 1 + PARTS
    assert f"has {FRAMES} free frames for {FRAMES}" in wrong[1]
    assert wait_for_end(lambda: status_of(deployment, FRAMES - 1), 0.0)[1] == []
    status["replicas"][1]["state"] = "restarting"
    assert left_behind(status) == [], "a group with somebody who takes no part"


def test_one_that_failed_has_not_ended() -> None:
    deployment = merged()
    deployment.script[Phase.LOAD, 1, 0] = "refuse"
    while not status_of(deployment)["exchange"]["last_failure"]:
        deployment.deliver_one()
    wrong = wait_for_end(lambda: status_of(deployment), 0.0)[1]
    assert "refused to load" in wrong[0]


@pytest.mark.parametrize("field", ["parts", "parts_done"])
def test_a_status_that_does_not_say_how_far_it_is_fails(field: str) -> None:
    deployment = merged()
    deployment.let_time_pass()
    status = status_of(deployment)
    assert contradictions(status) == []
    status["exchange"][field] -= 1
    assert contradictions(status) == [f"the status says of the exchange: {field} is {PARTS - 1}, and {PARTS} by homes"]
    status["exchange"][field] += 1
    status["exchange"]["replicas"]["0"]["away_layers"] = 1
    assert contradictions(status) == ["the status says of the exchange: away_layers of replica 0 is 1, and 4 by homes"]


def test_what_is_home_again_has_returned() -> None:
    home = replace(NEVER, moved_bytes=800, returned_bytes=800)
    assert unreturned(Course(NEVER, home)) == []
    wrong = unreturned(Course(NEVER, replace(home, returned_bytes=700)))
    assert wrong == ["all KV is at home; 800 bytes have moved, and 700 have returned"]
    assert unreturned(Course(NEVER, ENDED)) == [], "it is not at home"


@pytest.mark.parametrize(
    ("course", "counts"),
    [
        (Course(NEVER, ENDED), (1, 1, 0)),
        (Course(NEVER, NEVER), (0, 0, 0)),
        # Met in the middle by a restore, or a stall after which it goes on; over before anything came; by a death then.
        (Course(NEVER, replace(NEVER, moved_bytes=200), Progress(True, PARTS, 1, 100, 0)), (1, 0, 1)),
        (Course(NEVER, ENDED, Progress(True, PARTS, 1, 100, 0)), (2, 1, 1)),
        (Course(NEVER, ENDED, ENDED), (1, 1, 0)),
        (Course(NEVER, replace(NEVER, moved_bytes=800), ENDED), (1, 1, 0)),
    ],
)
def test_exchanges_are_counted(course: Course, counts: tuple[int, int, int]) -> None:
    assert (course.begun, course.ended, course.interrupted) == counts


def test_a_soak_in_which_nothing_was_exchanged_fails() -> None:
    done = ((200, ""),)
    idle = Event(1, "drop", "drop", 0.3, done, exchange=Course(NEVER, NEVER))
    soak = Soak({}, Bounds(1, 1), events=[idle])
    assert "no exchange has begun" in failures(soak)
    met = Course(NEVER, replace(NEVER, moved_bytes=200), Progress(True, PARTS, 1, 100, 0))
    soak.events += [
        Event(2, "drop", "drop", 0.3, done, exchange=Course(NEVER, ENDED)),
        Event(3, "restore in an exchange", "drop; restore", 0.3, done, exchange=met),
    ]
    assert "no exchange has begun" not in failures(soak)
    assert "exchanges: 2 begun, 1 ended, 1 interrupted" in format_tables(soak)
    soak.events = [replace(idle, exchange=None)]
    assert "no exchange has begun" not in failures(soak)
