"""The data-parallel controller without processes: how it treats a replica that has ended."""

from __future__ import annotations

import dataclasses
from array import array
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
from sglang.srt.managers import data_parallel_controller as upstream

from kunserve_sgl.control.messages import LoadReport
from kunserve_sgl.errors import TransientError
from kunserve_sgl.integration import controller as ours
from kunserve_sgl.integration.controller import KunserveDataParallelController, SurvivorBudget
from kunserve_sgl.integration.dispatch import RequestDispatch
from kunserve_sgl.integration.messages import ReplicaEnded
from kunserve_sgl.integration.open_requests import NotingWorkers, OpenRequests
from kunserve_sgl.policy.demand import ReplicaLoad
from kunserve_sgl.policy.output_lengths import PRIOR_TOKENS


@dataclasses.dataclass
class Load:
    dp_rank: int
    timestamp: float
    num_running_reqs: int = 0
    num_waiting_reqs: int = 0
    num_total_tokens: int = 0


@dataclasses.dataclass
class Process:
    pid: int
    exitcode: int | None = None
    killed: bool = False

    def is_alive(self) -> bool:
        return self.exitcode is None

    def join(self, timeout: float) -> None: ...

    def kill(self) -> None:
        self.killed = True


def controller(replicas: int = 3, ranks: int = 2) -> Any:
    """One whose processes have pid 10 * replica + rank."""
    made = KunserveDataParallelController.__new__(KunserveDataParallelController)
    made.workers = NotingWorkers(f"worker {replica}" for replica in range(replicas))
    made.status = [True] * replicas
    made.dp_active = [True] * replicas
    made._active_workers = list(range(replicas))
    made.round_robin_counter = replicas - 1
    made.dp_budget = SurvivorBudget(replicas)
    made._by_need = None
    made._open = OpenRequests(replicas)
    made._send_to_tokenizer = "tokenizer"
    made._autopilot = SimpleNamespace(on_load=lambda replica, load: None)
    made._metrics = None
    made.scheduler_procs = [Process(10 * replica + rank) for replica in range(replicas) for rank in range(ranks)]
    made._link = SimpleNamespace(rank_of=lambda pid: divmod(pid, 10) if pid < 100 else None)
    lost: dict[int, tuple[int, str]] = {}
    groups: dict[int, tuple[int, ...]] = {}
    made._coordinator = SimpleNamespace(
        on_member_lost=lambda replica, rank, how: lost.update({replica: (rank, how)}),
        is_lost=lost.__contains__,
        dependent_on=lambda replica: groups.get(replica, (replica,)),
        lost=lost,
        groups=groups,
        plan=None,
        moving=(),
    )
    return made


def noting(names: list[Any]) -> Callable[[Any, Any], None]:
    """In place of `sock_send`. Another test looks at what the HTTP server is told of losses."""
    return lambda worker, message: None if isinstance(message, ReplicaEnded) else names.append(worker)


@pytest.fixture(autouse=True)
def nothing_is_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    """Unless a test wants to know."""
    monkeypatch.setattr(ours, "sock_send", noting([]))


def end(made: Any, pid: int) -> None:
    process = next(process for process in made.scheduler_procs if process.pid == pid)
    process.exitcode = -9
    made._on_process_ended(process)


@pytest.mark.parametrize("method", ["round_robin", "total_requests", "total_tokens"])
def test_requests_go_to_the_others(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    made = controller()
    taken: list[Any] = []
    for module in (upstream, ours):
        monkeypatch.setattr(module, "sock_send", noting(taken))
    end(made, 11)
    # its last report of no load at all is still to be read
    made.dp_budget.update_budget([Load(0, 1.0, 5, 5, 50), Load(1, 1.0), Load(2, 1.0, 5, 5, 50)])
    for _ in range(6):
        getattr(made, f"{method}_scheduler")(SimpleNamespace(routed_dp_rank=None, input_ids=[1, 2]))
    assert sorted(taken) == ["worker 0"] * 3 + ["worker 2"] * 3
    taken.clear()
    made.round_robin_scheduler(SimpleNamespace(routed_dp_rank=1, rid="asks for the one that has ended"))
    made.round_robin_scheduler(SimpleNamespace(routed_dp_rank=2, rid="asks for another"))
    assert taken[0] in ("worker 0", "worker 2")
    assert taken[1] == "worker 2"
    made.control_message_step = 1
    taken.clear()
    made.send_control_message("to all")
    assert taken == ["worker 0", "worker 2"]


def test_the_http_server_is_told_how_many_are_left(monkeypatch: pytest.MonkeyPatch) -> None:
    made = controller()
    sent: list[Any] = []
    monkeypatch.setattr(ours, "sock_send", lambda socket, message: sent.append((socket, message.alive)))
    end(made, 11)
    end(made, 10)  # the other rank of the same replica
    end(made, 20)
    assert sent == [("tokenizer", 2), ("tokenizer", 2), ("tokenizer", 1)]


def request(prompt: int, answer: int | None = 10, *, to: int | None = None, ignore_eos: bool = True) -> Any:
    sampling = SimpleNamespace(max_new_tokens=answer, ignore_eos=ignore_eos, stop_strs=[], stop_token_ids=None)
    return SimpleNamespace(rid="r", input_ids=array("q", range(prompt)), sampling_params=sampling, routed_dp_rank=to)


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Who was sent something, in order."""
    names: list[Any] = []
    for module in (upstream, ours):
        monkeypatch.setattr(module, "sock_send", noting(names))
    return names


def by_need(replicas: int = 3) -> Any:
    made = controller(replicas)
    made._by_need = RequestDispatch(replicas, made._coordinator)
    made.max_req_input_len = 500
    return made


def test_requests_go_where_less_was_sent_also_by_name(taken: list[Any]) -> None:
    made = by_need()
    made._dispatch_by_need(request(300, to=2))
    made._dispatch_by_need(request(200, to=0))
    for _ in range(3):
        made._dispatch_by_need(request(50))
    assert taken == ["worker 2", "worker 0"] + ["worker 1"] * 3
    report = ReplicaLoad(10_000, used_tokens=5, received_requests=1)
    made._autopilot = SimpleNamespace(on_load=lambda *_: None)
    made._metrics = None
    made._on_load_report(ours.LoadReport(2, report))
    made._dispatch_by_need(request(50))
    assert taken[-1] == "worker 2"
    assert made._by_need.status()[2] == {"work_tokens": 60, "requests_on_the_way": 1}


def test_requests_by_need_pass_over_who_has_ended(taken: list[Any]) -> None:
    made = by_need()
    end(made, 11)
    made._dispatch_by_need(request(10, to=1))
    for _ in range(3):
        made._dispatch_by_need(request(10))
    assert sorted(taken) == ["worker 0"] * 2 + ["worker 2"] * 2
    with pytest.raises(ValueError, match="DP rank 7 is not active"):  # as SGLang does it
        made._dispatch_by_need(request(10, to=7))


def test_what_a_request_is_expected_to_need() -> None:
    made = by_need()._by_need
    assert made.tokens_of(request(100, 60), 500) == 160
    assert made.tokens_of(request(100, 6000), 500) == 500
    assert made.tokens_of(request(100, None), 500) == 500
    assert made.tokens_of(request(100, 60, ignore_eos=False), 500) == 160
    assert made.tokens_of(request(100, 400, ignore_eos=False), 500) == 100 + PRIOR_TOKENS
    made.dispatcher.on_report(1, ReplicaLoad(1000, mean_answer_tokens=20))
    assert made.tokens_of(request(100, 400, ignore_eos=False), 500) == 120
    stops = request(100, 400)
    stops.sampling_params.stop_token_ids = {7}
    assert made.tokens_of(stops, 500) == 120
    assert made.tokens_of(request(600, 400), 500) == 600
    embeds = request(0, 0)
    embeds.input_ids = None
    assert made.tokens_of(embeds, 500) == 0


def test_groups_follow_the_plan_of_the_coordinator() -> None:
    made = by_need()
    seen: list[Any] = []
    made._by_need.dispatcher.set_groups = lambda *groups: seen.append(groups)
    made._by_need.follow_plan()
    made._coordinator.plan = SimpleNamespace(groups=((0, 1), (2,)))
    made._by_need.follow_plan()
    made._by_need.follow_plan()
    made._coordinator.moving = (0, 1)
    made._by_need.follow_plan()
    assert seen == [(((0, 1), (2,)), ()), (((0, 1), (2,)), (0, 1))]


def test_other_ranks_of_the_replica_are_killed_and_the_coordinator_knows() -> None:
    made = controller()
    end(made, 11)
    assert made._coordinator.lost == {1: (1, "ended with exit code -9")}
    assert [process.pid for process in made.scheduler_procs if process.killed] == [10]


def test_end_of_all_replicas_ends_the_controller() -> None:
    made = controller(replicas=2, ranks=1)
    end(made, 0)
    with pytest.raises(TransientError, match="all replicas have ended"):
        end(made, 10)


def test_end_of_a_process_that_never_reported_ends_the_controller() -> None:
    made = controller()
    with pytest.raises(TransientError, match="scheduler process 100 ended with exit code -9"):
        made._on_process_ended(Process(100, exitcode=-9))


def test_calls_become_wishes() -> None:
    call = ours.CoordinatorCall(call_id=1, command=ours.Command.DROP, groups=[[0, 1]], layers={1: [0, 0]})
    assert ours._wish(call) == ours.DropWish(((0, 1),), {1: (0, 0)}, None)
    call = ours.CoordinatorCall(call_id=1, command=ours.Command.DROP, groups=[[0, 1]], layers=[0, 1])
    assert ours._wish(call) == ours.DropWish(((0, 1),), (0, 1), None)


def test_those_merged_with_it_end_with_it() -> None:
    """They would wait for their batches in vain."""
    made = controller()
    made._coordinator.groups.update({0: (0, 2), 2: (0, 2)})
    end(made, 1)
    assert [process.pid for process in made.scheduler_procs if process.killed] == [0, 20, 21]


def test_the_open_requests_of_a_replica_that_ends_are_answered(monkeypatch: pytest.MonkeyPatch) -> None:
    """503, and only those: what has ended has been answered already."""
    made = controller()
    sent: list[tuple[Any, Any]] = []
    for module in (upstream, ours):
        monkeypatch.setattr(module, "sock_send", lambda socket, what: noting(sent)((socket, what), what))
    monkeypatch.setattr(
        upstream.DataParallelController, "dispatching_with_trace", lambda self, req, *_: self.dispatching(req)
    )
    made.dispatching = made.round_robin_scheduler
    for name in "abcdef":
        wanted = SimpleNamespace(routed_dp_rank=1, rid=name, input_ids=[1, 2])
        made.dispatching_with_trace(wanted)
    made.dispatching_with_trace(SimpleNamespace(routed_dp_rank=2, rid="other"))
    made._on_load_report(LoadReport(1, ReplicaLoad(100), ended=("b", "never sent")))
    sent.clear()
    end(made, 10)
    assert [(socket, answer.rid) for socket, answer in sent] == [("tokenizer", name) for name in "acdef"]
    for _, answer in sent:
        assert answer.finished_reason["status_code"] == 503
        assert "replica 1 has ended" in answer.finished_reason["message"]
    assert [made._open.count(replica) for replica in range(3)] == [0, 0, 1]
