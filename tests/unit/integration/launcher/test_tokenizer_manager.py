"""What is asked of all replicas ends when one of them does, instead of never."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from http import HTTPStatus
from types import SimpleNamespace
from typing import Any

import pytest
from fastapi import HTTPException
from sglang.srt.managers import io_struct
from sglang.srt.managers.tokenizer_manager import ServerStatus, TokenizerManager
from sglang.utils import TypeBasedDispatcher

from kunserve_sgl.integration.launcher.tokenizer_manager import KunserveTokenizerManager
from kunserve_sgl.integration.messages import ReplicasAlive

DEADLINE_S = 120.0


def manager(replicas: int) -> Any:
    made = KunserveTokenizerManager.__new__(KunserveTokenizerManager)
    made.server_args = SimpleNamespace(dp_size=replicas)
    made._alive = range(replicas)
    made.elastic_worker_count = made.model_update_expected_workers = replicas
    made.model_update_result, made.model_update_tmp = None, []
    made._dispatch_to_scheduler = lambda message: None
    made.calls = SimpleNamespace(ask_whether_writable=_nobody_refuses, on_alive=lambda alive: None)
    made._update_model_path_info = lambda *_: None
    made._result_dispatcher = TypeBasedDispatcher([])
    made.init_communicators(made.server_args)
    return made


async def _nobody_refuses(*_: Any) -> list[Any]:
    return []


async def _meanwhile(waiting: Any, *events: Callable[[], None]) -> Any:
    """What `waiting` returns once these have happened, one after the other."""
    task = asyncio.ensure_future(waiting)
    for event in events:
        await asyncio.sleep(0)
        assert not task.done()
        event()
    return await asyncio.wait_for(task, DEADLINE_S)


@pytest.mark.parametrize("name", ["flush_cache", "get_internal_state"])
def test_answers_of_those_who_are_left_are_enough(name: str) -> None:
    made = manager(3)
    communicator = getattr(made, f"{name}_communicator")

    def answer(value: str) -> Callable[[], None]:
        return lambda: communicator._communicator.handle_recv(value)

    def lose(alive: int) -> Callable[[], None]:
        return lambda: made._on_replicas_alive(ReplicasAlive(alive=list(range(alive))))

    async def run() -> None:
        assert await _meanwhile(communicator("?"), answer("a"), answer("b"), lose(2)) == ["a", "b"]
        assert await _meanwhile(communicator("?"), answer("c"), answer("d")) == ["c", "d"]
        assert await _meanwhile(communicator("?"), lose(1), answer("e")) == ["e"]

    asyncio.run(run())


@pytest.mark.parametrize("replicas", [1, 2, 3])
def test_new_weights_are_waited_for_from_those_who_are_left(replicas: int) -> None:
    made = manager(replicas)
    done = SimpleNamespace(success=True, message="done", num_paused_requests=0)

    def answer() -> None:
        made._handle_update_weights_from_disk_req_output(done)

    def lose() -> None:
        made._on_replicas_alive(ReplicasAlive(alive=list(range(replicas - 1))))

    def lose_all() -> None:
        made._on_replicas_alive(ReplicasAlive(alive=[]))

    async def run() -> None:
        order = SimpleNamespace(model_path="", load_format="", flush_cache=True)
        all_of_them = await _meanwhile(made._wait_for_model_update_from_disk(order), *[answer] * replicas)
        assert all_of_them[:2] == (True, " | ".join(["done"] * replicas))
        if replicas > 1:
            events = [*[answer] * (replicas - 1), lose]
            left = await _meanwhile(made._wait_for_model_update_from_disk(order), *events)
            assert left[:2] == (True, " | ".join(["done"] * (replicas - 1)))
        made._on_replicas_alive(ReplicasAlive(alive=[0]))
        with pytest.raises(HTTPException, match="all replicas that were asked have ended"):
            await _meanwhile(made._wait_for_model_update_from_disk(order), lose_all)

    asyncio.run(run())


def test_who_is_back_is_asked_from_then_on_and_nobody_while_nobody_is_there() -> None:
    made = manager(2)
    made.ending = SimpleNamespace(reason=None)
    del made._dispatch_to_scheduler
    communicator = made.flush_cache_communicator

    def alive(*replicas: int) -> Callable[[], None]:
        return lambda: made._on_replicas_alive(ReplicasAlive(alive=list(replicas)))

    def answer() -> None:
        communicator._communicator.handle_recv("an answer")

    async def run() -> None:
        alive(0)()
        assert await _meanwhile(communicator("?"), alive(0, 1), answer) == ["an answer"], "one was asked"
        assert await _meanwhile(communicator("?"), answer, answer) == ["an answer"] * 2
        alive(0, 1, 2)()
        gone_back_and_gone = [answer, alive(0, 1), alive(0, 1, 2), alive(0, 2)]  # 1 and 2 have not got it
        assert await _meanwhile(communicator("?"), *gone_back_and_gone) == ["an answer"]
        for events in ([alive()], [alive(0, 1, 2), alive(1, 2)]):
            alive(0)()
            with pytest.raises(HTTPException, match="all replicas that were asked have ended"):
                await _meanwhile(communicator("?"), *events)
        alive()()

    asyncio.run(run())
    made.server_status = ServerStatus.Up  # as /health says itself where an answer comes late
    assert made.server_status is ServerStatus.Starting, "nobody is there"
    with pytest.raises(HTTPException, match="no replica is there; one is being started again") as refused:
        made._dispatch_to_scheduler(io_struct.FlushCacheReqInput())
    assert refused.value.status_code == 503
    alive(1)()
    assert made.server_status is ServerStatus.Up


def test_loads_are_of_those_who_are_left() -> None:
    made = manager(3)
    said = {replica: SimpleNamespace(dp_rank=replica) for replica in range(3)}
    made.load_snapshot_reader = SimpleNamespace(read=said.get, read_all=lambda: list(said.values()))
    made.auto_create_handle_loop = lambda: None

    def told(**which: int) -> list[int]:
        return [load.dp_rank for load in asyncio.run(made.get_loads(**which))]

    assert told() == [0, 1, 2]
    made._on_replicas_alive(ReplicasAlive(alive=[0, 2]))
    assert told() == [0, 2]
    assert told(dp_rank=1) == []
    made._on_replicas_alive(ReplicasAlive(alive=[0, 1, 2]))
    assert told(dp_rank=1) == [1]


@pytest.mark.parametrize("ends_before", [False, True])
def test_a_part_of_a_batch_may_have_ended_before_it_is_waited_for(
    ends_before: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SGLang begins to wait when all of the batch has been sent, and forgets what has ended."""

    async def wait_one_response(self: Any, obj: Any, request: Any) -> Any:
        yield self.rid_to_state[obj.rid]

    monkeypatch.setattr(TokenizerManager, "_wait_one_response", wait_one_response)
    made = manager(2)
    made.rid_to_state = {"a": "the answer"}

    async def run() -> list[Any]:
        answers = made._wait_one_response(SimpleNamespace(rid="a"))
        if ends_before:
            del made.rid_to_state["a"]
        return [answer async for answer in answers]

    assert asyncio.run(run()) == ["the answer"]
    assert list(made.rid_to_state) == ([] if ends_before else ["a"])


@pytest.mark.parametrize("reason", [{"status_code": 503}, {"status_code": None}, {"status_code": 1}, {}])
def test_the_status_of_an_aborted_stream_is_of_the_type_that_routes_look_for(reason: dict[str, Any]) -> None:
    """Without it a chat that is streamed would end without the reason."""
    made = manager(2)
    made.rid_to_state, made.enable_lora = {}, False
    state = SimpleNamespace(obj=SimpleNamespace(rid="a"))
    finish_reason = {"type": "abort", "message": "no replica is left", **reason}
    asyncio.run(made._handle_abort_finish_reason({"meta_info": {"finish_reason": finish_reason}}, state, True))
    is_status = isinstance(finish_reason.get("status_code"), HTTPStatus)
    assert is_status == (reason.get("status_code") == 503)
    assert finish_reason.get("status_code") == reason.get("status_code")
