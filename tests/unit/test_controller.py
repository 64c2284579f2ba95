"""The data-parallel controller without processes: how it treats a replica that has ended."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace
from typing import Any

import pytest
from sglang.srt.managers import data_parallel_controller as upstream

from kunserve_sgl.errors import TransientError
from kunserve_sgl.integration import controller as ours
from kunserve_sgl.integration.controller import KunserveDataParallelController, SurvivorBudget


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
    made.workers = [f"worker {replica}" for replica in range(replicas)]
    made.status = [True] * replicas
    made.dp_active = [True] * replicas
    made._active_workers = list(range(replicas))
    made.round_robin_counter = replicas - 1
    made.dp_budget = SurvivorBudget(replicas)
    made.scheduler_procs = [Process(10 * replica + rank) for replica in range(replicas) for rank in range(ranks)]
    made._link = SimpleNamespace(rank_of=lambda pid: divmod(pid, 10) if pid < 100 else None)
    lost: dict[int, tuple[int, str]] = {}
    made._coordinator = SimpleNamespace(
        on_member_lost=lambda replica, rank, how: lost.update({replica: (rank, how)}),
        is_lost=lost.__contains__,
        lost=lost,
    )
    return made


def end(made: Any, pid: int) -> None:
    process = next(process for process in made.scheduler_procs if process.pid == pid)
    process.exitcode = -9
    made._on_process_ended(process)


@pytest.mark.parametrize("method", ["round_robin", "total_requests", "total_tokens"])
def test_requests_go_to_the_others(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    made = controller()
    end(made, 11)
    taken: list[Any] = []
    monkeypatch.setattr(upstream, "sock_send", lambda worker, _: taken.append(worker))
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
