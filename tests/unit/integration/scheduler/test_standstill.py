"""A queue whose first request has no room although nothing runs: it is answered, and those behind it are looked at."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from kunserve_sgl.integration.scheduler.standstill import StandstillGuard


class Batch:
    def __init__(self, *requests: Any, batch_is_full: bool = False) -> None:
        self.reqs = list(requests)
        self.batch_is_full = batch_is_full

    def is_empty(self) -> bool:
        return not self.reqs


class World:
    """A scheduler whose first request needs more than there is, and which looks at its queue as SGLang does."""

    def __init__(self) -> None:
        self.sent: list[Any] = []
        self.scheduler: Any = SimpleNamespace(
            waiting_queue=[request("too long", 600), request("behind", 10)],
            running_batch=Batch(),
            last_batch=None,
            chunked_req=None,
            enable_overlap=True,
            result_queue=[],
            max_total_num_tokens=500,
            ipc_channels=SimpleNamespace(
                send_to_tokenizer=SimpleNamespace(send_output=lambda output, request: self.sent.append(output))
            ),
        )
        self.guard = StandstillGuard(self.scheduler)
        self.started: list[str] = []

    def round(self, is_memory_changing: bool = False) -> None:
        scheduler = self.scheduler
        if scheduler.waiting_queue and not scheduler.running_batch.batch_is_full:
            first = scheduler.waiting_queue[0]
            if len(first.origin_input_ids) < scheduler.max_total_num_tokens:
                self.started.append(first.rid)
                scheduler.waiting_queue.pop(0)
                return
            scheduler.running_batch.batch_is_full = True
        self.guard.look(is_memory_changing)


def request(rid: str, prompt: int) -> Any:
    return SimpleNamespace(
        rid=rid,
        origin_input_ids=range(prompt),
        output_ids=[],
        sampling_params=SimpleNamespace(max_new_tokens=7),
    )


def test_the_first_is_answered_and_the_next_one_runs() -> None:
    world = World()
    world.round()
    assert world.sent == [], "it is looked at once more"
    world.round()
    (answer,) = world.sent
    assert answer.rid == "too long"
    assert answer.finished_reason["type"] == "abort"
    assert answer.finished_reason["status_code"] == 500
    assert "600 tokens" in answer.finished_reason["message"]
    assert "500 tokens" in answer.finished_reason["message"]
    world.round()
    assert world.started == ["behind"]


def test_the_next_one_runs_when_the_first_has_left() -> None:
    """SGLang's own way looks at nobody before a request has ended, and none runs."""
    world = World()
    world.round()
    world.scheduler.waiting_queue.pop(0)
    world.round()
    world.round()
    assert (world.started, world.sent) == (["behind"], [])


def test_it_waits_for_memory_that_is_on_its_way() -> None:
    world = World()
    for _ in range(5):
        world.round(is_memory_changing=True)
    world.scheduler.max_total_num_tokens = 1000
    world.round()
    assert (world.started, world.sent) == (["too long"], [])


def test_it_is_answered_when_no_memory_has_come() -> None:
    world = World()
    for _ in range(5):
        world.round(is_memory_changing=True)
    world.round()
    assert [answer.rid for answer in world.sent] == ["too long"]


@pytest.mark.parametrize(
    "busy",
    [
        {"running_batch": Batch(request("r", 1), batch_is_full=True)},
        {"last_batch": Batch(request("r", 1))},
        {"chunked_req": request("r", 1)},
        {"result_queue": [(Batch(request("r", 1)), None)]},
    ],
    ids=["running", "last batch", "chunk", "result"],
)
def test_nobody_is_answered_while_something_holds_memory(busy: dict[str, Any]) -> None:
    world = World()
    vars(world.scheduler).update(busy)
    for _ in range(5):
        world.round()
    assert world.sent == []
