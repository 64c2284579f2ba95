"""What clients ask of all replicas at once: refused before anybody is told, and answered for each replica."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from sglang.srt.managers import io_struct

from kunserve_sgl.errors import TransientError
from kunserve_sgl.integration.launcher.control_requests import ControlRequests, RefusedError
from kunserve_sgl.integration.launcher.request_bodies import shown
from kunserve_sgl.integration.messages import Outcome

NAN, INFINITY = float("nan"), float("inf")


class Manager(ControlRequests):
    """Without a server: whatever is asked of the replicas is noted in `asked`, and answered by `answers`."""

    def __init__(self, replicas: int = 2, device: str = "cpu") -> None:
        self.server_args = SimpleNamespace(dp_size=replicas, device=device, kunserve_order_timeout=120.0)
        self._alive, self.elastic_worker_count = range(replicas), replicas
        self.asked: list[Any] = []
        self.answers: list[Any] = []
        for name in ("flush_cache", "get_weights_by_name", "profile", "slow_down", "set_internal_state"):
            setattr(self, f"{name}_communicator", self._ask)
        self.request_logger = SimpleNamespace(configure=lambda **_: None)

    async def _ask(self, request: Any) -> list[Any]:
        self.asked.append(request)
        return self.answers

    def auto_create_handle_loop(self) -> None: ...

    def _dispatch_to_scheduler(self, request: Any) -> None:
        self.asked.append(request)


def refusal(manager: Manager, method: str, *args: Any) -> str:
    """The reason; nobody was told anything."""

    async def call() -> None:
        await getattr(manager, method)(*args)

    with pytest.raises(RefusedError) as raised:
        asyncio.run(call())
    assert manager.asked == []
    assert raised.value.status_code == 400
    assert str(raised.value) == raised.value.detail
    return str(raised.value)


@pytest.mark.parametrize(
    ("method", "reason"),
    [
        ("release_memory_occupation", "KunServe manages the memory"),
        ("resume_memory_occupation", "there is none to resume"),
    ],
)
@pytest.mark.parametrize("replicas", [1, 2])
def test_memory_is_not_released(method: str, reason: str, replicas: int) -> None:
    assert reason in refusal(Manager(replicas), method, io_struct.ReleaseMemoryOccupationReqInput())


@pytest.mark.parametrize("what", ["start", "stop", "dump"])
def test_experts_are_not_recorded(what: str) -> None:
    assert "--expert-distribution-recorder-mode" in refusal(Manager(), f"{what}_expert_distribution_record")


@pytest.mark.parametrize("seconds", [NAN, INFINITY, 31.0, 1e300])
def test_sleeps_that_end_replicas_are_refused(seconds: float) -> None:
    assert "forward_sleep_time: " in refusal(
        Manager(), "slow_down", io_struct.SlowDownReqInput(forward_sleep_time=seconds)
    )


@pytest.mark.parametrize("seconds", [None, -1.0, 0.0, 0.5, 30.0])
def test_other_sleeps_are_passed_on(seconds: float | None) -> None:
    manager = Manager()
    asyncio.run(manager.slow_down(io_struct.SlowDownReqInput(forward_sleep_time=seconds)))
    assert [request.forward_sleep_time for request in manager.asked] == [seconds]


@pytest.mark.parametrize("value", [NAN, INFINITY, 4.5, 4.0])
def test_state_that_no_scheduler_can_use_is_refused(value: float) -> None:
    request = io_struct.SetInternalStateReq(server_args={"pp_max_micro_batch_size": value})
    assert "'pp_max_micro_batch_size'" in refusal(Manager(), "set_internal_state", request)


def test_other_state_is_passed_on() -> None:
    manager = Manager()
    manager.answers = [SimpleNamespace(updated=True)] * 2
    request = io_struct.SetInternalStateReq(
        server_args={"pp_max_micro_batch_size": 4, "speculative_accept_threshold_acc": 0.5}
    )
    assert asyncio.run(manager.set_internal_state(request)) == [True, True]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *(("log_level", "loud"), ("log_level", ""), ("log_requests_format", "xml"), ("log_requests_level", 4)),
        *(("log_requests_level", -1), ("dump_requests_threshold", 0)),
    ],
)
def test_logging_is_checked_before_anything_is_set(field: str, value: Any) -> None:
    manager = Manager()
    manager.request_logger = None  # it would fail there
    assert f"{field}: " in refusal(manager, "configure_logging", io_struct.ConfigureLoggingReq(**{field: value}))


PROFILES: list[tuple[dict[str, Any], str]] = [
    ({"num_steps": -1}, "num_steps: -1"),
    ({"num_steps": 10**30}, "num_steps: "),
    ({"start_step": -5}, "start_step: -5"),
    ({"profile_by_stage": True}, "num_steps: profile_by_stage needs it"),
    ({"profile_by_stage": True, "num_steps": 0}, "num_steps: profile_by_stage needs it"),
    ({"activities": []}, "activities: []; accepted on cpu: CPU, GPU"),
    ({"activities": ["CPU", "MEM"]}, "activities: ['CPU', 'MEM']; accepted on cpu: CPU, GPU"),
    ({"activities": ["CUDA_PROFILER"]}, "activities: "),
    ({"profile_id": "a/b"}, "profile_id: 'a/b'"),
    ({"profile_prefix": "../x"}, "profile_prefix: '../x'"),
    ({"profile_prefix": "x" * 1000}, "profile_prefix: 'xxx"),
    ({"profile_prefix": "a\0b"}, "profile_prefix: 'a\\x00b'"),
    ({"output_dir": "/proc/nowhere"}, "output_dir: '/proc/nowhere'"),
    ({"output_dir": "a\0b"}, "output_dir: 'a\\x00b'"),
    ({"output_dir": __file__}, "output_dir: "),
    ({"output_dir": "~nobody-of-this-name"}, "output_dir: "),
]


@pytest.mark.parametrize(("fields", "reason"), PROFILES, ids=lambda value: str(value)[:40])
def test_profiles_that_cannot_be_made_are_refused(fields: dict[str, Any], reason: str) -> None:
    text = refusal(Manager(), "start_profile", io_struct.ProfileReq(**fields))
    assert text.startswith(reason)
    assert len(text) < 500


def test_a_profile_that_fails_at_one_replica_is_told(tmp_path: Path) -> None:
    manager = Manager()
    request = io_struct.ProfileReq(output_dir=str(tmp_path / "new"), num_steps=1, activities=["CPU"])
    manager.answers = [
        io_struct.ProfileReqOutput(success=False, message="replica 1: no"),
        io_struct.ProfileReqOutput(success=True, message="replica 0: yes"),
    ]
    with pytest.raises(RefusedError, match="replica 0: yes; replica 1: no"):
        asyncio.run(manager.start_profile(request))
    manager.answers = [io_struct.ProfileReqOutput(success=True, message="")] * 2
    asyncio.run(manager.start_profile(request))
    assert (tmp_path / "new").is_dir()
    manager.answers = [io_struct.ProfileReqOutput(success=False, message="not in progress")]
    with pytest.raises(RefusedError, match="not in progress"):
        asyncio.run(manager.stop_profile())


def flushed(replica: int, success: bool) -> Any:
    return io_struct.FlushCacheReqOutput(success=success, message=f"replica {replica}: {success}")


def test_a_flush_says_what_it_did_at_each_replica() -> None:
    manager = Manager()
    manager.answers = [flushed(1, True), flushed(0, False)]
    answer = asyncio.run(manager.flush_cache())
    assert (answer.success, answer.message) == (False, "replica 0: False\nreplica 1: True\n")
    manager.answers = [flushed(1, True), flushed(0, True)]
    assert asyncio.run(manager.flush_cache(3.0)).success
    assert [request.timeout_s for request in manager.asked] == [None, 3.0]


def parameter(replica: int, value: Any) -> Any:
    return io_struct.GetWeightsByNameReqOutput(rid=str(replica), parameter=value)


@pytest.mark.parametrize(
    ("answers", "expected"),
    [
        ({1: [1.0], 0: [0.0]}, [[0.0], [1.0]]),
        ({0: None, 1: [1.0], 10: None}, [[1.0]] * 3),
        ({0: None, 1: None}, None),
        ({0: [], 1: [2.0]}, [[], [2.0]]),
    ],
)
def test_parameters_come_from_who_has_them(answers: dict[int, Any], expected: Any) -> None:
    manager = Manager()
    manager.answers = [parameter(*answer) for answer in answers.items()]
    assert asyncio.run(manager.get_weights_by_name(io_struct.GetWeightsByNameReqInput(name="w"))) == expected


def test_one_replica_answers_as_upstream() -> None:
    manager = Manager(replicas=1)
    manager.answers = [parameter(0, [1.0])]
    assert asyncio.run(manager.get_weights_by_name(io_struct.GetWeightsByNameReqInput(name="w"))) == [1.0]


@pytest.mark.parametrize(
    "method",
    [
        *("update_weights_from_tensor", "update_weights_from_distributed", "init_weights_update_group"),
        *("destroy_weights_update_group", "init_weights_send_group_for_remote_instance"),
        "send_weights_to_remote_instance",
    ],
)
def test_what_upstream_does_with_one_replica_only(method: str) -> None:
    manager = Manager()
    succeeded, message = asyncio.run(getattr(manager, method)(None))
    assert not succeeded
    assert message.startswith(f"{method}: SGLang does it with one replica only")
    assert manager.asked == []


def test_a_wrong_format_of_weights_is_refused() -> None:
    request = io_struct.UpdateWeightFromDiskReqInput(model_path="m", load_format="zip")
    assert "load_format: 'zip'; accepted: auto, " in refusal(Manager(), "update_weights_from_disk", request)


def why_unwritable(*rounds: Callable[[], list[Any]]) -> str | None:
    manager = Manager()
    left = list(rounds)

    async def ask(replicas: Any, flushes: bool) -> list[Any]:
        assert (list(replicas), flushes) == ([0, 1], True)
        return left.pop(0)()

    manager.calls = SimpleNamespace(ask_whether_writable=ask)  # type: ignore[assignment]
    reason = asyncio.run(manager._why_unwritable(True))
    assert not left
    return reason


def replies(*outcomes: Outcome) -> Callable[[], list[Any]]:
    return lambda: [SimpleNamespace(replica=r, outcome=o, message=o.value) for r, o in enumerate(outcomes)]


def test_all_replicas_are_asked_before_weights_are_replaced() -> None:
    done, busy, conflict = Outcome.DONE, Outcome.BUSY, Outcome.CONFLICT
    assert why_unwritable(replies(done, done)) is None
    assert why_unwritable(replies(done, busy), replies(busy, done), replies(done, done)) is None
    assert why_unwritable(replies(busy, conflict)) == "replica 0: busy; replica 1: conflict"

    def silence() -> list[Any]:
        raise TransientError("replicas [1] did not answer within 30 s")

    assert why_unwritable(silence) == "replicas [1] did not answer within 30 s"


def test_who_stays_busy_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kunserve_sgl.integration.launcher.control_requests._SETTLE_S", 0.0)
    assert why_unwritable(replies(Outcome.BUSY, Outcome.DONE)) == "replica 0: busy"


def test_what_is_shown_is_short() -> None:
    assert shown("é\ud800") == "'\\xe9\\ud800'"
    assert len(shown("x" * 10_000)) < 150
