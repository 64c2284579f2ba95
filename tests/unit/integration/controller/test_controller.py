"""The data-parallel controller without processes: how it treats a replica that has ended."""

from __future__ import annotations

import dataclasses
import multiprocessing
import threading
import time
from array import array
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
from sglang.srt.constants import HEALTH_CHECK_RID_PREFIX
from sglang.srt.managers import data_parallel_controller as upstream
from sglang.srt.managers import io_struct
from sglang.srt.managers.io_struct import TokenizedGenerateReqInput
from sglang.srt.sampling.sampling_params import SamplingParams

from kunserve_sgl.args import KunserveOptions
from kunserve_sgl.control.addresses import begun_requests_path
from kunserve_sgl.control.begun_requests import BegunRequests
from kunserve_sgl.control.coordinator import Coordinator
from kunserve_sgl.control.messages import LoadReport, OrderReply, Phase, Result, Waiting, Wanting
from kunserve_sgl.control.transition import Timeouts
from kunserve_sgl.errors import ConfigurationError, InvariantError, TransientError
from kunserve_sgl.integration.attach import last_words
from kunserve_sgl.integration.controller import coming_back as coming_back_module
from kunserve_sgl.integration.controller import controller as ours
from kunserve_sgl.integration.controller import held_requests, losses, waits_for_room
from kunserve_sgl.integration.controller.commands import drop_wish
from kunserve_sgl.integration.controller.controller import KunserveDataParallelController
from kunserve_sgl.integration.controller.dispatch import RequestDispatch
from kunserve_sgl.integration.controller.held_requests import HeldRequests
from kunserve_sgl.integration.controller.lasting_orders import LastingOrders
from kunserve_sgl.integration.controller.long_requests import LongRequests
from kunserve_sgl.integration.controller.open_requests import NotingWorkers, OpenRequests
from kunserve_sgl.integration.controller.restarts import Restarts
from kunserve_sgl.integration.controller.survivor_budget import SurvivorBudget
from kunserve_sgl.integration.launcher.server_args import KunserveServerArgs
from kunserve_sgl.integration.messages import (
    Command,
    ContinuedGenerateReqInput,
    CoordinatorCall,
    ReplicasAlive,
    RequestsEnded,
    RequestsLost,
    RequestWaited,
)
from kunserve_sgl.integration.placement import gpu_count
from kunserve_sgl.policy.demand import ReplicaLoad
from kunserve_sgl.policy.drop_plan import DropWish
from kunserve_sgl.policy.output_lengths import PRIOR_TOKENS
from kunserve_sgl.policy.stalls import StallWatch


@dataclasses.dataclass
class Load:
    dp_rank: int
    timestamp: float
    num_running_reqs: int = 0
    num_waiting_reqs: int = 0
    num_total_tokens: int = 0


@dataclasses.dataclass(eq=False)
class Process:
    pid: int
    exitcode: int | None = None
    killed: bool = False

    def is_alive(self) -> bool:
        return self.exitcode is None

    def kill(self) -> None:
        self.killed = True
        self.exitcode = -9


def controller(replicas: int = 3, ranks: int = 2, tries: int = 0) -> Any:
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
    made._ends = []
    made._why_ended, made._seen_ended = {}, []
    made._clock = lambda: time.monotonic()  # tests let it jump
    made._stalls = StallWatch(replicas, 10.0)
    made._stalled, made._blocked = set(), set()
    made.server_args = SimpleNamespace(kunserve_directory="/missing")
    made._send_to_tokenizer = "tokenizer"
    made._metrics = None
    made._autopilot = SimpleNamespace(on_load=lambda replica, load: None, on_lost=lambda replica: None, orders=False)
    made._ended = set()
    made._restarts = Restarts(made, replicas, tries, 60.0, 1.0, time.monotonic)
    made._held, made._lasting = HeldRequests(60.0), LastingOrders()
    made._long = LongRequests(60.0)
    made._check = SimpleNamespace(expect=lambda replica, incarnation: None)
    made.scheduler_procs = [Process(10 * replica + rank) for replica in range(replicas) for rank in range(ranks)]
    made._link = SimpleNamespace(rank_of=lambda pid: divmod(pid, 10) if pid < 100 else None)
    lost: dict[int, tuple[int, str]] = {}
    groups: dict[int, tuple[int, ...]] = {}
    made._coordinator = SimpleNamespace(
        on_member_lost=lambda replica, rank, how: lost.update({replica: (rank, how)}),
        is_lost=lost.__contains__,
        dependent_on=lambda replica: groups.get(replica, (replica,)),
        set_stalled=lambda stalled, notes: None,
        lost=lost,
        groups=groups,
        plan=None,
        on_load=lambda replica, load: None,
        moving=(),
        maps=(),
    )
    return made


def noting(names: list[Any]) -> Callable[[Any, Any], None]:
    """In place of `sock_send`. Another test looks at what the HTTP server is told of losses."""
    return lambda worker, message: None if isinstance(message, ReplicasAlive) else names.append(worker)


@pytest.fixture(autouse=True)
def nothing_is_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    """Unless a test wants to know."""
    for module in (ours, losses, coming_back_module, waits_for_room):
        monkeypatch.setattr(module, "sock_send", noting([]))


class Launched:
    """A scheduler process that says where it was put, and that it is ready."""

    def __init__(self, target: Any, args: tuple[Any, ...]) -> None:
        self.gpu, self.rank, self.replica, self.ready = args[2], args[3], args[8], args[9]
        assert target == "run"

    def start(self) -> None:
        self.ready.send({"max_total_num_tokens": 1, "max_req_input_len": 1, "startup_time": None})


@pytest.mark.parametrize(
    ("values", "places"),
    [
        ({}, {(0, 0): 0, (1, 0): 1, (2, 0): 2, (3, 0): 3}),
        ({"kunserve_replicas_per_gpu": 2}, {(0, 0): 0, (1, 0): 0, (2, 0): 1, (3, 0): 1}),
        ({"kunserve_replicas_per_gpu": 4, "base_gpu_id": 1}, {(0, 0): 1, (1, 0): 1, (2, 0): 1, (3, 0): 1}),
        (
            {"kunserve_replicas_per_gpu": 2, "tp_size": 2, "gpu_id_step": 2},
            {(0, 0): 0, (0, 1): 2, (1, 0): 0, (1, 1): 2, (2, 0): 4, (2, 1): 6, (3, 0): 4, (3, 1): 6},
        ),
    ],
)
def test_replicas_are_put_on_gpus(
    monkeypatch: pytest.MonkeyPatch, values: dict[str, int], places: dict[tuple[int, int], int]
) -> None:
    """As SGLang's own loop places them, and so many in turn on the same GPUs as the flag says."""
    server_args = KunserveServerArgs(model_path="none", dp_size=4, kunserve="auto", load_format="dummy", **values)
    monkeypatch.setattr(upstream, "mp", SimpleNamespace(Pipe=multiprocessing.Pipe, Process=Launched))
    made = controller(replicas=4)
    made.run_scheduler_process_func, made.env_lock, made.scheduler_procs = "run", threading.Lock(), []
    offset = 0
    for replica in range(4):  # what `launch_dp_schedulers` does in threads
        made.launch_tensor_parallel_group(server_args, None, offset, replica)
        offset += server_args.tp_size * server_args.pp_size * server_args.gpu_id_step
    assert {(each.replica, each.rank): each.gpu for each in made.scheduler_procs} == places
    assert gpu_count(server_args) == 1 + max(places.values())


def end(made: Any, pid: int) -> None:
    process = next(process for process in made.scheduler_procs if process.pid == pid)
    process.exitcode = -9
    made._on_processes_ended([process])


@pytest.mark.parametrize("method", ["round_robin", "total_requests", "total_tokens"])
def test_requests_go_to_the_others(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    made = controller()
    taken: list[Any] = []
    for module in (upstream, ours, losses, coming_back_module):
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


def test_the_http_server_is_told_who_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    made = controller()
    sent: list[Any] = []
    monkeypatch.setattr(losses, "sock_send", lambda socket, message: sent.append((socket, [*message.alive])))
    end(made, 11)
    end(made, 10)  # the other rank of the same replica
    end(made, 20)
    assert sent == [("tokenizer", [0, 2]), ("tokenizer", [0, 2]), ("tokenizer", [0])]


def request(prompt: int, answer: int | None = 10, *, to: int | None = None, ignore_eos: bool = True) -> Any:
    sampling = SimpleNamespace(max_new_tokens=answer, ignore_eos=ignore_eos, stop_strs=[], stop_token_ids=None)
    return SimpleNamespace(rid="r", input_ids=array("q", range(prompt)), sampling_params=sampling, routed_dp_rank=to)


def long_request(prompt: int, answer: int | None, name: str, to: int | None = None) -> Any:
    """One of SGLang's own, as only those wait for room."""
    sampling = SamplingParams(max_new_tokens=answer, ignore_eos=True)
    sampling.normalize(None)
    fields: dict[str, Any] = dict.fromkeys(("input_embeds", "mm_inputs"))
    numbers = {"return_logprob": False, "logprob_start_len": -1, "top_logprobs_num": 0, "token_ids_logprob": []}
    return TokenizedGenerateReqInput(
        rid=name,
        input_text="",
        input_ids=array("q", range(prompt)),
        token_type_ids=[],
        sampling_params=sampling,
        stream=False,
        routed_dp_rank=to,
        **fields,
        **numbers,
    )


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Who was sent something, in order."""
    names: list[Any] = []
    for module in (upstream, ours, losses, coming_back_module):
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
    made._on_load_report(LoadReport(2, report))
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
    assert made.tokens_of(request(100, None), 500) == 100 + PRIOR_TOKENS
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
    made._coordinator.plan = SimpleNamespace(pipelines=((0, 1), (2,)))
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


def test_end_of_all_replicas_ends_the_controller_with_the_reason_of_the_first(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Once the requests of the last one have been answered: nobody else would."""
    made = controller(replicas=2, ranks=1)
    made.server_args.kunserve_directory = str(tmp_path)
    monkeypatch.setattr(last_words, "_mine", None)
    last_words.sign_up(str(tmp_path), last_words.scheduler_name(1, 0))
    last_words.leave(RuntimeError("it is\nthe second"))
    for name in ("open", "waiting"):
        made._open.sent(1, SimpleNamespace(rid=name))
    notes = BegunRequests(begun_requests_path(made.server_args, 1, 0))
    notes.add(["open", "answered"])
    notes.close()
    sent: list[Any] = []
    monkeypatch.setattr(losses, "sock_send", lambda socket, message: sent.append(message))
    end(made, 0)
    with pytest.raises(
        TransientError, match=r"^all replicas have ended; the first one: replica 0 rank 0 ended with exit code -9$"
    ):
        end(made, 10)
    assert made._coordinator.lost[1] == (0, "ended with exit code -9: RuntimeError: it is the second")
    (lost,) = [message for message in sent if isinstance(message, RequestsLost)]
    assert (lost.names, lost.begun) == (["open", "waiting"], ["open"])
    assert (lost.can_go_on, lost.reason) == (False, "replica 1 has ended, the last one")


class _Socket(list[bytes]):
    """In place of the socket from the HTTP server."""

    def recv(self) -> bytes:
        return self.pop(0)


@pytest.fixture
def to_tokenizer(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What the HTTP server is sent."""
    sent: list[Any] = []
    for module in (ours, losses, coming_back_module):
        monkeypatch.setattr(
            module, "sock_send", lambda socket, message: sent.append(message) if socket == "tokenizer" else None
        )
    return sent


def dispatching(made: Any, error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: Any, request: Any, *_: Any) -> None:
        raise error

    monkeypatch.setattr(upstream.DataParallelController, "dispatching_with_trace", fail)


@pytest.mark.parametrize(
    ("error", "status", "text"),
    [
        (ValueError("DP rank 7 is not active."), 400, "DP rank 7 is not active."),
        (ConfigurationError("no"), 400, "no"),
        (TransientError("not now"), 503, "not now"),
        (TypeError("a mistake of ours"), 500, "TypeError: a mistake of ours"),
    ],
)
def test_request_that_cannot_be_dispatched_is_answered_and_nothing_else_ends(
    error: Exception, status: int, text: str, monkeypatch: pytest.MonkeyPatch, to_tokenizer: list[Any]
) -> None:
    made = controller()
    dispatching(made, error, monkeypatch)
    made.dispatching_with_trace(SimpleNamespace(rid="bad"))
    (answer,) = to_tokenizer
    assert (answer.rid, answer.finished_reason["status_code"]) == ("bad", status)
    assert answer.finished_reason["message"] == text
    assert [made._open.count(replica) for replica in range(3)] == [0, 0, 0]


def test_health_check_that_cannot_be_dispatched_gets_no_answer(
    monkeypatch: pytest.MonkeyPatch, to_tokenizer: list[Any]
) -> None:
    """SGLang takes any message that comes meanwhile for a sign of health."""
    made = controller()
    dispatching(made, TransientError("nobody is there"), monkeypatch)
    made.dispatching_with_trace(SimpleNamespace(rid="HEALTH_CHECK_1"))
    assert to_tokenizer == []


def test_contradiction_while_dispatching_ends_the_controller(monkeypatch: pytest.MonkeyPatch) -> None:
    made = controller()
    dispatching(made, InvariantError("two times two is five"), monkeypatch)
    with pytest.raises(InvariantError):
        made.dispatching_with_trace(SimpleNamespace(rid="bad"))


def test_message_that_cannot_be_read_is_answered_where_it_says_whose_it_is(
    to_tokenizer: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    made = controller()
    monkeypatch.setattr(io_struct, "_USE_PICKLE_IPC", False)
    taken: list[Any] = []
    made._request_dispatcher = taken.append
    made.recv_from_tokenizer = _Socket(
        [
            msgspec.msgpack.encode(["FlushCacheReqInput", "r1", None, "what is this?"]),
            b"\xc1",
            io_struct.msgpack_encode(io_struct.FlushCacheReqInput(rid="r2")),
        ]
    )
    for _ in range(3):
        made._take_request()
    (answer,) = to_tokenizer
    assert (answer.rid, answer.finished_reason["status_code"]) == ("r1", 400)
    assert [message.rid for message in taken] == ["r2"]


@pytest.mark.parametrize(("by", "is_needed"), [("message", True), ("map", False)])
def test_a_rank_says_where_its_memory_is_where_others_need_that(by: str, is_needed: bool) -> None:
    """One that does not is not believed: all others would be told that it is nowhere."""
    made = controller()
    made._cluster = None
    made.server_args = KunserveOptions(kunserve_control="tcp", kunserve_directory="/here", kunserve_remote_attention=by)
    for address, is_there in (("tcp://127.0.0.1:4000", True), ("", False)):
        assert made._is_address(Wanting(1, 0, memory_address=address)) is (is_there is is_needed)
    assert not made._is_address(Wanting(1, 0, memory_address="tcp://10.0.0.1:4000"))


def test_report_that_makes_no_sense_is_ignored() -> None:
    made = controller()
    made._on_message(LoadReport(99, ReplicaLoad(100)))

    def contradiction(replica: int, load: Any) -> None:
        raise InvariantError("it cannot be")

    made._autopilot.on_load = contradiction
    with pytest.raises(InvariantError):
        made._on_message(LoadReport(1, ReplicaLoad(100)))


@pytest.mark.parametrize(("error", "goes_on"), [(TransientError("too late"), True), (ValueError(3), False)])
def test_answer_in_a_transition_that_fails_half_way_ends_the_controller(error: Exception, goes_on: bool) -> None:
    made = controller()

    def on_message(message: Any) -> None:
        raise error

    made._coordinator.on_message = on_message
    reply = OrderReply(1, Phase.PREPARE, 0, 0, Result.APPLIED)
    if goes_on:
        made._on_message(reply)
    else:
        with pytest.raises(ValueError, match="3"):
            made._on_message(reply)


@pytest.mark.parametrize(
    ("error", "verdict"), [(TransientError("later"), "conflict"), (AssertionError("never"), "failed")]
)
def test_command_that_fails_is_answered(error: Exception, verdict: str, to_tokenizer: list[Any]) -> None:
    made = controller()

    def restore(groups: Any, done: Any) -> None:
        raise error

    made._coordinator.restore = restore
    call = CoordinatorCall(call_id=5, command=Command.RESTORE)
    if isinstance(error, TransientError):
        made._on_coordinator_call(call)
    else:
        with pytest.raises(AssertionError):
            made._on_coordinator_call(call)
    (answer,) = to_tokenizer
    assert (answer.call_id, answer.verdict.value) == (5, verdict)
    assert str(error) in answer.body["message"]


def test_exchanges_are_held_for_who_asks_for_it(to_tokenizer: list[Any]) -> None:
    made = controller()
    made._coordinator = Coordinator(2, 1, Timeouts(30.0, 300.0), lambda *message: None, lambda: 100.0)
    exchange = made._coordinator._exchange
    made._on_coordinator_call(CoordinatorCall(call_id=5, command=Command.HOLD_EXCHANGE, hold=4, hold_s=60.0))
    assert exchange.due_s() == 160.0
    made._on_coordinator_call(CoordinatorCall(call_id=6, command=Command.FREE_EXCHANGE, hold=4))
    assert exchange.due_s() < 100.0
    assert [(answer.call_id, answer.verdict.value) for answer in to_tokenizer] == [(5, "done"), (6, "done")]


def test_end_of_a_process_that_never_reported_ends_the_controller() -> None:
    made = controller()
    with pytest.raises(TransientError, match="scheduler process 100 ended with exit code -9"):
        made._on_processes_ended([Process(100, exitcode=-9)])


def test_calls_become_wishes() -> None:
    call = CoordinatorCall(call_id=1, command=Command.DROP, groups=[[0, 1]], layers={1: [0, 0]})
    assert drop_wish(call) == DropWish(((0, 1),), {1: (0, 0)}, None)
    call = CoordinatorCall(call_id=1, command=Command.DROP, groups=[[0, 1]], layers=[0, 1])
    assert drop_wish(call) == DropWish(((0, 1),), (0, 1), None)


def test_those_merged_with_it_live() -> None:
    """They recover, and not before the other rank of the replica is gone, which may write to their memory."""
    made = controller()
    made._coordinator.groups.update({0: (0, 2), 2: (0, 2)})
    alive: list[list[int]] = []
    made._coordinator.on_member_lost = lambda replica, rank, how: alive.append(
        [process.pid for process in made.scheduler_procs if process.is_alive()]
    )
    end(made, 1)
    assert alive == [[10, 11, 20, 21]]
    assert made._active_workers == [1, 2]


@pytest.mark.parametrize("ended", [None, 10])
def test_all_ranks_are_killed_before_one_is_waited_for_and_nobody_recovers_before_they_are_gone(
    monkeypatch: pytest.MonkeyPatch, ended: int | None
) -> None:
    made = controller(ranks=3)
    waits: list[list[tuple[int, bool]]] = []

    def never_gone(processes: list[Process]) -> list[Process]:
        waits.append([(each.pid, each.exitcode is not None) for each in processes])
        return processes[1:]

    monkeypatch.setattr(losses, "await_exits", never_gone)
    with pytest.raises(InvariantError, match=r"processes of replicas \[1\] are not gone within 30 s: 11, 12"):
        end(made, ended) if ended is not None else made._end_replicas({1: "it did not answer"})
    assert waits == [[(10, True), (11, True), (12, True)]]
    assert made._coordinator.lost == {}


def noting_waits(monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """The processes that the controller waits for, each time; they are gone at once."""
    waits: list[list[int]] = []

    def gone(processes: list[Process]) -> list[Process]:
        waits.append([each.pid for each in processes])
        return []

    monkeypatch.setattr(losses, "await_exits", gone)
    return waits


def test_replicas_of_which_processes_end_at_once_are_waited_for_together(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each may take as long to be gone as all of them, and nobody hears of the controller meanwhile."""
    made = controller()
    waits = noting_waits(monkeypatch)
    made._coordinator.on_member_lost = lambda replica, rank, how: waits.append([replica])
    ended = [process for process in made.scheduler_procs if process.pid in (1, 20)]
    for process in ended:
        process.exitcode = -9
    made._on_processes_ended(ended)
    assert waits == [[0, 1, 20, 21], [], [0], [2]]
    assert [process.pid for process in made.scheduler_procs if process.killed] == [0, 21]


def test_all_who_are_to_blame_are_ended_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    made = controller(ranks=1)
    made._coordinator.groups.update(dict.fromkeys(range(3), (0, 1, 2)))
    made._stalls = SimpleNamespace(
        stalled=lambda now_s: {}, notes=lambda now_s: {}, to_blame=lambda now_s: {0: "it hangs", 2: "it stands"}
    )
    waits = noting_waits(monkeypatch)
    made._follow_stalls()
    assert waits == [[0, 20]]
    assert made._why_ended == {
        0: "others depend on it, and it made no progress: it hangs",
        2: "others depend on it, and it made no progress: it stands",
    }


def test_a_start_that_ended_and_is_not_gone_in_time_ends_nobody_else(monkeypatch: pytest.MonkeyPatch) -> None:
    made = controller()
    ended: list[tuple[Any, str]] = []
    process = made.scheduler_procs[2]
    monkeypatch.setattr(losses, "await_exits", lambda processes: processes)
    monkeypatch.setattr(made._restarts, "rank_of", lambda _: (1, 0))
    monkeypatch.setattr(made._restarts, "on_start_ended", lambda *of: ended.append(of))
    made._on_processes_ended([process])
    ((who, why),) = ended
    assert (who, why.startswith("replica 1 rank 0 ")) == (process, True)
    assert made._coordinator.lost == {}


def test_a_replica_that_is_ended_says_why() -> None:
    made = controller()
    made._end_replicas({1: "it did not answer"})
    assert [process.pid for process in made.scheduler_procs if process.killed] == [10, 11]
    end(made, 11)
    assert made._coordinator.lost == {1: (1, "ended with exit code -9: it did not answer")}


def test_the_http_server_is_told_of_the_open_requests_of_a_replica_that_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    """And only of those: what has been answered is not among them, and nobody sends a health check again."""
    made = controller()
    sent: list[tuple[Any, Any]] = []
    for module in (upstream, ours, losses, coming_back_module):
        monkeypatch.setattr(module, "sock_send", lambda socket, what: noting(sent)((socket, what), what))
    monkeypatch.setattr(
        upstream.DataParallelController, "dispatching_with_trace", lambda self, req, *_: self.dispatching(req)
    )
    made.dispatching = made.round_robin_scheduler
    for name in "abcdef":
        wanted = SimpleNamespace(routed_dp_rank=1, rid=name, input_ids=[1, 2])
        made.dispatching_with_trace(wanted)
    made.dispatching_with_trace(SimpleNamespace(routed_dp_rank=2, rid="other"))
    made.dispatching_with_trace(SimpleNamespace(routed_dp_rank=1, rid=f"{HEALTH_CHECK_RID_PREFIX}_1"))
    made._on_load_report(LoadReport(1, ReplicaLoad(100)))  # it has nothing to do any more, but no answer has come
    made.init_dispatcher()
    made._request_dispatcher(RequestsEnded(names=["b", "never sent"]))
    sent.clear()
    end(made, 10)
    ((socket, lost),) = sent
    assert socket == "tokenizer"
    assert (lost.names, lost.reason, lost.can_go_on) == ([*"acdef"], "replica 1 has ended", True)
    assert [made._open.count(replica) for replica in range(3)] == [0, 0, 1]
    end(made, 11)
    assert len(sent) == 1  # the other rank of the replica


@pytest.mark.parametrize("first", [0, 1])
def test_what_a_replica_on_another_machine_had_begun_is_known_when_all_of_it_has_ended(
    first: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What rank 0 says of that is brought here before its end is seen, which may be after that of another rank."""
    made = controller()
    made.server_args.kunserve_directory = str(tmp_path)
    monkeypatch.setattr(losses, "is_far", lambda process: process.pid in (10, 11))
    for name in ("begun", "waits"):
        made._open.sent(1, SimpleNamespace(rid=name))
    sent: list[Any] = []
    monkeypatch.setattr(losses, "sock_send", lambda socket, what: noting(sent)(what, what))
    for rank in (first, 1 - first):
        assert sent == []
        if rank == 0:
            notes = BegunRequests(begun_requests_path(made.server_args, 1, 0))
            notes.add(["begun"])
            notes.close()
        end(made, 10 + rank)
    (lost,) = sent
    assert (lost.names, lost.begun) == (["begun", "waits"], ["begun"])


def test_a_replica_on_another_machine_that_is_ended_is_not_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may not be reached. But its requests go on when it is known with which it had begun."""
    made = controller()
    made.server_args.kunserve_directory = str(tmp_path)
    monkeypatch.setattr(losses, "is_far", lambda process: process.pid in (10, 11))
    made._open.sent(1, SimpleNamespace(rid="a"))
    sent: list[Any] = []
    monkeypatch.setattr(losses, "sock_send", lambda socket, what: sent.append(what))
    made._end_replicas({0: "it did not answer", 1: "nor did it"})
    made._follow_stalls()
    assert made._coordinator.lost == {1: (0, "is given up: nor did it")}
    assert made._active_workers == [0, 2]
    made._follow_stalls()
    assert [type(what) for what in sent] == [ReplicasAlive]
    for pid in (10, 11):
        end(made, pid)
    assert [what.names for what in sent if isinstance(what, RequestsLost)] == [["a"]]


def test_all_on_other_machines_that_are_ended_are_lost_once_each(monkeypatch: pytest.MonkeyPatch) -> None:
    made = controller()
    monkeypatch.setattr(losses, "is_far", lambda process: process.pid >= 10)
    made._end_replicas({1: "it did not answer", 2: "nor did it"})
    made._follow_stalls()
    assert made._ends == ["replica 1 rank 0 is given up: it did not answer", "replica 2 rank 0 is given up: nor did it"]
    assert made._active_workers == [0]


def sharing(*pairs: tuple[int, int]) -> list[list[bool]]:
    """Who maps whose memory, of three."""
    return [
        [one == other or {(one, other), (other, one)} & {*pairs} != set() for other in range(3)] for one in range(3)
    ]


@pytest.mark.parametrize("is_merged", [True, False])
def test_one_on_another_machine_that_shares_memory_there_is_lost_when_it_is_gone(
    is_merged: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whose memory it has mapped uses that again, by the plan or from before a recovery. But the controller does not
    stand meanwhile."""
    made = controller()
    monkeypatch.setattr(losses, "is_far", lambda process: process.pid >= 10)
    for process in made.scheduler_procs:
        monkeypatch.setattr(process, "kill", lambda: None)  # it takes its time
    made._coordinator.maps = sharing((1, 2))
    members = {"dependent_on": lambda replica: (1, 2)} if is_merged else {"moving": (1, 2)}
    vars(made._coordinator).update(members)
    assert made._end_replicas({1: "it did not answer"}) == []
    made._follow_stalls()
    assert made._coordinator.lost == {}
    assert made.status == [True, False, not is_merged]
    assert list(made._stalled) == [1]
    end(made, 11)
    assert made._coordinator.lost == {}
    assert made._active_workers == [0, 1, 2]
    assert made.status == [True, False, not is_merged]
    end(made, 10)
    assert made._coordinator.lost == {1: (0, "ended with exit code -9")}
    assert made._active_workers == [0, 2]


def test_who_has_lost_a_rank_and_is_waited_for_gets_no_requests(monkeypatch: pytest.MonkeyPatch) -> None:
    made = controller()
    monkeypatch.setattr(losses, "is_far", lambda process: process.pid >= 10)
    for process in made.scheduler_procs:
        monkeypatch.setattr(process, "kill", lambda: None)
    made._coordinator.maps = sharing((1, 2))
    made._coordinator.groups.update({1: (1, 2), 2: (1, 2)})
    end(made, 10)
    made._follow_stalls()
    assert (made._coordinator.lost, list(made._stalled)) == ({}, [1])
    assert made.status == [True, False, False]
    end(made, 11)
    made._follow_stalls()
    assert list(made._coordinator.lost) == [1]
    assert made.status == [True, False, True]


@pytest.mark.parametrize(
    ("pair", "group", "ended"), [((0, 2), (0, 1, 2), {1}), ((1, 2), (0, 1, 2), {1, 2}), ((1, 2), (0, 1), {1})]
)
def test_nobody_is_waited_for_who_shares_memory_with_nobody_who_lives(
    pair: tuple[int, int], group: tuple[int, ...], ended: set[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A machine that cannot be reached is done without, with all members who are there."""
    made = controller()
    monkeypatch.setattr(losses, "is_far", lambda process: process.pid >= 10)
    for process in made.scheduler_procs:
        monkeypatch.setattr(process, "kill", lambda: None)
    made._coordinator.maps = sharing(pair)
    made._coordinator.groups.update(dict.fromkeys(group, group))
    assert set(made._end_replicas(dict.fromkeys(ended, "it did not answer"))) == ended
    made._follow_stalls()
    assert made._coordinator.lost.keys() == ended


def test_requests_come_back_when_nobody_dispatches_there_any_more(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of a replica that it is merged with stay there."""
    made = controller()
    made._coordinator.groups.update({0: (0, 1), 1: (0, 1)})
    for replica in range(3):
        made._open.sent(replica, SimpleNamespace(rid=f"at {replica}"))
    sent: list[Any] = []
    monkeypatch.setattr(losses, "sock_send", lambda socket, what: sent.append((what, list(made._active_workers))))
    end(made, 10)
    (ended, _), (lost, active) = sent
    assert (ended.alive, active) == ([0, 2], [0, 2])
    assert lost.names == ["at 1"]
    sent.clear()
    end(made, 11)
    assert [type(what) for what, _ in sent] == [ReplicasAlive]


@pytest.fixture
def now_s(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The controller's clock."""
    clock = [1000.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    return clock


def dispatched(made: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        upstream.DataParallelController, "dispatching_with_trace", lambda self, req, *_: self.dispatching(req)
    )
    made.told = {}
    made._coordinator.set_stalled = lambda stalled, notes: made.told.update(stalled=stalled, notes=notes)


@pytest.mark.parametrize("method", ["round_robin", "total_requests", "total_tokens", "by_need"])
def test_stalled_replicas_get_no_requests_until_they_make_progress(
    method: str, taken: list[Any], now_s: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    made = by_need() if method == "by_need" else controller()
    made.dispatching = made._dispatch_by_need if method == "by_need" else getattr(made, f"{method}_scheduler")
    dispatched(made, monkeypatch)
    made.dispatching_with_trace(request(10, to=1))
    now_s[0] += 11.0
    made._follow_stalls()
    assert list(made.told["stalled"]) == [1]
    taken.clear()
    for number in range(4):
        made.dispatching_with_trace(request(10, to=1 if number % 2 else None))
    assert set(taken) == {"worker 0", "worker 2"}
    taken.clear()
    made.control_message_step = 1
    made.send_control_message("abort")
    made.send_to_all_workers("profile")
    assert taken == ["worker 0", "worker 1", "worker 2"] * 2, "these are for all"
    for replica in (0, 2):
        made._on_load_report(LoadReport(replica, ReplicaLoad(1000, received_requests=4, growth_tokens=500)))
    made._on_load_report(LoadReport(1, ReplicaLoad(1000, received_requests=1, batches=1)))
    made.dp_budget.update_budget([Load(0, 2.0, 5, 5, 50), Load(1, 2.0), Load(2, 2.0, 5, 5, 50)])
    made._follow_stalls()
    assert made.told["stalled"] == {}
    taken.clear()
    for _ in range(3):
        made.dispatching_with_trace(request(10))
    assert "worker 1" in taken


def test_requests_are_refused_at_once_where_nobody_makes_progress(
    taken: list[Any], now_s: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Merged with the one that stands, the other would wait for it as well."""
    made = by_need(2)
    made.dispatching = made._dispatch_by_need
    dispatched(made, monkeypatch)
    made._coordinator.groups.update({0: (0, 1), 1: (0, 1)})
    dispatched(made, monkeypatch)
    made._on_message(Waiting(0, (1,), 11.0))
    made._follow_stalls()
    assert made.told["stalled"] == {1: "replica 0 has waited for it for 11 s"}
    assert [process.pid for process in made.scheduler_procs if process.killed] == [10, 11], "0 is to recover"
    sent: list[Any] = []
    monkeypatch.setattr(ours, "sock_send", lambda socket, message: sent.append(message))
    made.dispatching_with_trace(request(10))
    (answer,) = sent
    assert answer.finished_reason["status_code"] == 503
    assert answer.finished_reason["message"] == "no replica makes progress"
    made._on_message(LoadReport(0, ReplicaLoad(1000, batches=1)))
    made._follow_stalls()
    made.dispatching_with_trace(request(10))
    assert len(taken) + len(sent) == 2


def test_message_about_waiting_that_makes_no_sense_is_ignored() -> None:
    controller()._on_message(Waiting(99, (1,), 11.0))


# Replicas that come back


class Start:
    """In place of a start whose processes are ready."""

    def __init__(self, replica: int, incarnation: int = 1) -> None:
        self.replica, self.incarnation = replica, incarnation
        self.processes = [Process(200 + replica)]

    def hand_over(self) -> str:
        return f"worker {self.replica} again"


def coming_back(replicas: int = 3) -> Any:
    made = controller(replicas, ranks=1, tries=5)
    made.said = []
    made._coordinator.set_restarting = lambda replica, how: made.said.append((replica, how))
    made._coordinator.take_back = lambda replica: made._coordinator.lost.pop(replica, None) is not None
    made.control_message_step = 1
    return made


@pytest.mark.parametrize("method", ["round_robin", "total_requests", "total_tokens", "by_need"])
def test_a_replica_that_is_back_gets_requests_again(
    method: str, taken: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    made = coming_back()
    if method == "by_need":
        made._by_need, made.max_req_input_len = RequestDispatch(3, made._coordinator), 500
    made.dispatching = made._dispatch_by_need if method == "by_need" else getattr(made, f"{method}_scheduler")
    dispatched(made, monkeypatch)
    made.dispatching_with_trace(request(10, to=1))
    end(made, 10)
    assert made.said == [(1, "replica 1 rank 0 ended with exit code -9; it is started again in 1 s, try 1 of 5")]
    taken.clear()
    for _ in range(4):
        made.dispatching_with_trace(request(10))
    assert set(taken) == {"worker 0", "worker 2"}
    taken.clear()
    assert made.take_back(Start(1))
    for _ in range(3):
        made.dispatching_with_trace(request(10, to=1))
    assert taken == ["worker 1 again"] * 3
    assert [made._stalls.sent_requests(replica) for replica in range(3)] == [2, 3, 2]
    taken.clear()
    made.dp_budget.update_budget([Load(0, 2.0, 5, 5, 50), Load(1, 2.0), Load(2, 2.0, 5, 5, 50)])
    for replica in (0, 2):
        made._on_load_report(LoadReport(replica, ReplicaLoad(1000, received_requests=2, growth_tokens=500)))
    made._on_load_report(LoadReport(1, ReplicaLoad(1000, received_requests=3, batches=1)))
    for _ in range(3):
        made.dispatching_with_trace(request(10))
    assert "worker 1 again" in taken
    taken.clear()
    made.send_control_message("to all")
    assert taken == ["worker 0", "worker 1 again", "worker 2"]
    assert not made.take_back(Start(1)), "the coordinator has to take it up first"


def sending_in_turn(replicas: int, monkeypatch: pytest.MonkeyPatch) -> tuple[Any, list[tuple[Any, str]]]:
    """A controller that starts replicas again, and what it sends: to which worker, and which request."""
    made = coming_back(replicas=replicas)
    made._restarts._clock = time.monotonic
    made.dispatching = made.round_robin_scheduler
    dispatched(made, monkeypatch)
    sent: list[tuple[Any, str]] = []
    monkeypatch.setattr(upstream, "sock_send", lambda worker, message: sent.append((worker, message.rid)))
    return made, sent


def test_requests_are_held_while_nobody_is_there(
    to_tokenizer: list[Any], now_s: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    made, sent = sending_in_turn(1, monkeypatch)
    end(made, 0)
    made._require_somebody()
    names = ["early", "gone", "kept", "HEALTH_CHECK_1"]
    for name in names:
        made.dispatching_with_trace(SimpleNamespace(rid=name, routed_dp_rank=None))
        now_s[0] += 20.0
    assert made._time_to_wait_ms is not None
    assert len(made._held) == 3, "nobody is asked how it is"
    made._on_abort(io_struct.AbortReq(rid="gon"))
    made._follow_held()
    answers = {answer.rid: answer.finished_reason for answer in to_tokenizer if isinstance(answer, io_struct.AbortReq)}
    assert answers.keys() == {"gone", "early"}
    assert answers["early"]["status_code"] == 503
    assert answers["early"]["message"] == "no replica was back within 60 s"
    assert sent == []
    made.take_back(Start(0))
    made._follow_held()
    assert sent == [("worker 0 again", "kept")]
    assert len(made._held) == 0


@pytest.mark.parametrize("first", ["is back", "makes progress"])
def test_requests_are_held_while_nobody_makes_progress_and_another_is_started(
    first: str, to_tokenizer: list[Any], now_s: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    made, sent = sending_in_turn(2, monkeypatch)
    end(made, 0)
    made.dispatching_with_trace(SimpleNamespace(rid="stands", routed_dp_rank=None))
    now_s[0] += 11.0
    made._follow_stalls()
    assert list(made.told["stalled"]) == [1]
    made.dispatching_with_trace(SimpleNamespace(rid="held", routed_dp_rank=None))
    made._follow_held()
    assert len(made._held) == 1
    assert not [each for each in to_tokenizer if isinstance(each, io_struct.AbortReq)]
    if first == "is back":
        made.take_back(Start(0))
    else:
        made._on_load_report(LoadReport(1, ReplicaLoad(1000, received_requests=1, batches=1)))
        made._follow_stalls()
    made._follow_held()
    assert sent == [("worker 1", "stands"), ("worker 0 again" if first == "is back" else "worker 1", "held")]
    assert len(made._held) == 0


def test_more_requests_than_can_be_held_are_answered_at_once(
    to_tokenizer: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    made = coming_back(replicas=1)
    dispatched(made, monkeypatch)
    end(made, 0)
    monkeypatch.setattr(held_requests, "MOST_HELD", 1)
    for name in ("one", "two"):
        made.dispatching_with_trace(SimpleNamespace(rid=name))
    (answer,) = (each for each in to_tokenizer if isinstance(each, io_struct.AbortReq))
    assert (answer.rid, answer.finished_reason["status_code"]) == ("two", 503)


def test_the_server_ends_when_nobody_comes_back_any_more() -> None:
    made = coming_back(replicas=2)
    for replica in (0, 1):
        end(made, 10 * replica)
    made._require_somebody()
    for each in made._restarts._replicas:
        each.due_s = None  # as when it is given up
    with pytest.raises(TransientError, match="all replicas have ended; the first one: replica 0 rank 0 ended with"):
        made._require_somebody()


def test_a_replica_that_is_back_is_told_what_holds_for_all(taken: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    made = coming_back()
    end(made, 10)
    for order in (
        io_struct.SetInternalStateReq(server_args={"max_micro_batch_size": 3}),
        io_struct.PauseGenerationReqInput(mode="in_place"),
        io_struct.SlowDownReqInput(forward_sleep_time=1.0),
        io_struct.SetInternalStateReq(server_args={"pp_max_micro_batch_size": 2}),
        io_struct.ContinueGenerationReqInput(),
        io_struct.SlowDownReqInput(forward_sleep_time=0.5),
        io_struct.FlushCacheReqInput(),
        io_struct.ConfigureLoggingReq(log_level="debug"),
        io_struct.PauseGenerationReqInput(mode="retract"),
    ):
        made.send_control_message(order)
    told: list[Any] = []
    monkeypatch.setattr(coming_back_module, "sock_send", lambda socket, order: told.append((socket, order)))
    made.take_back(Start(1))
    assert [socket for socket, _ in told] == ["worker 1 again"] * 4 + ["tokenizer"]
    logs, state, slow_down, pause, alive = (order for _, order in told)
    assert state.server_args == {"max_micro_batch_size": 3, "pp_max_micro_batch_size": 2}
    assert logs.log_level == "debug"
    assert (slow_down.forward_sleep_time, pause.mode, alive.alive) == (0.5, "retract", [0, 1, 2])
    assert made._lasting.model == {}
    made.send_control_message(io_struct.UpdateWeightFromDiskReqInput(model_path="/new", load_format="auto"))
    assert made._lasting.model == {"model_path": "/new", "load_format": "auto"}


def with_room(monkeypatch: pytest.MonkeyPatch, capacities: tuple[int, ...], *, most: int, at_start: int) -> Any:
    """A controller in mode auto whose replicas have so many slots, `at_start` each when they began."""
    made = by_need(len(capacities))
    made.server_args.page_size = 1
    made.server_args.get_model_config = lambda: SimpleNamespace(context_len=4096)
    made._coordinator.capacities, made._coordinator.most_capacity = capacities, lambda: most
    made._coordinator.slots_at_start = lambda _replica: at_start
    made._autopilot.orders, made._autopilot.set_waiting = True, lambda _wanted: None
    made.dispatching = made._dispatch_by_need
    dispatched(made, monkeypatch)
    return made


def test_a_request_that_no_replica_has_room_for_waits_in_mode_auto(
    taken: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    made = with_room(monkeypatch, (100, 200, 100), most=600, at_start=100)
    waiting: list[Any] = []
    made._autopilot.set_waiting = waiting.append

    made.dispatching_with_trace(long_request(150, 10, "fits at replica 1"))
    made.dispatching_with_trace(long_request(700, 10, "fits nowhere, whoever lends"))
    assert taken.pop(0) == "worker 1"
    refuses = taken.pop(0)
    made.dispatching_with_trace(long_request(300, 10, "waits", to=2))
    made.dispatching_with_trace(long_request(400, 10, "waits for longer", to=2))
    made._follow_long()
    assert (taken, waiting[-1]) == ([], {2: 412})
    assert refuses.startswith("worker")
    made._coordinator.capacities = (100, 200, 320)
    made._follow_long()
    assert (taken, waiting[-1]) == (["worker 2"], {2: 412})
    end(made, 20)
    made._coordinator.capacities = (500, 200, 320)
    made._follow_long()
    assert (taken, waiting[-1]) == (["worker 2", "tokenizer", "worker 0"], {}), "and one went on with its replica's end"


def test_one_that_has_waited_for_room_in_vain_takes_what_there_is(
    taken: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    made = with_room(monkeypatch, (100, 200, 100), most=600, at_start=400)
    first = long_request(50, None, "r")
    fields = {name: getattr(first, name) for name in first.__struct_fields__}
    so_far = {"output_ids": array("q", [1]), "cached_tokens": 0, "cached_tokens_details": None}
    made.dispatching_with_trace(first)
    assert len(taken) == 1, "one without a limit may end before it is cut"
    returned = ContinuedGenerateReqInput(**fields, **so_far, was_returned=True)
    made.dispatching_with_trace(returned)
    made._follow_long()
    assert len(taken) == 1
    made._clock = lambda: 1e9
    made._follow_long()
    assert (taken[1:], returned.has_waited) == (["worker 1"], True)


@pytest.fixture
def sent(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, Any]]:
    """Who was sent which message, in order."""
    messages: list[tuple[Any, Any]] = []
    for module in (upstream, ours, losses, coming_back_module):
        monkeypatch.setattr(module, "sock_send", lambda *message: messages.append(message))
    return messages


@pytest.mark.parametrize("asked_for", [None, 2])
def test_one_with_a_limit_that_has_waited_in_vain_is_not_given_back_by_a_lender(
    asked_for: int | None, sent: list[tuple[Any, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would wait once more for as long."""
    made = with_room(monkeypatch, (100, 200, 100), most=600, at_start=400)
    made.dispatching_with_trace(request := long_request(50, 300, "r", to=asked_for))
    made._follow_long()
    assert sent == []
    made._clock = lambda: 1e9
    made._follow_long()
    ((worker, message),) = sent
    assert worker == f"worker {1 if asked_for is None else asked_for}"
    assert (type(message), message.has_waited, message.rid) == (ContinuedGenerateReqInput, True, "r")
    assert (message.input_ids, message.sampling_params) == (request.input_ids, request.sampling_params)
    assert (list(message.output_ids), message.cached_tokens, message.was_returned) == ([], 0, False)
    assert len(made._long) == 0
    # Where it comes here again, as after a while without any replica, it does not wait either.
    made.dispatching_with_trace(message)
    assert len(sent) == 2


def test_the_end_of_its_replica_lets_nobody_wait_for_room_anew(
    taken: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    made = with_room(monkeypatch, (100, 100, 100), most=600, at_start=400)
    now_s = [1000.0]
    made._clock = lambda: now_s[0]
    made.dispatching_with_trace(long_request(50, 300, "first", to=2))
    now_s[0] += 20
    made.dispatching_with_trace(long_request(50, 300, "second", to=1))
    now_s[0] += 20
    end(made, 20)
    taken.clear()
    made._follow_long()
    assert (taken, len(made._long), made._long.next_deadline_s) == ([], 2, 1060.0)
    now_s[0] = 1060.0
    made._follow_long()
    assert (len(taken), len(made._long), made._long.next_deadline_s) == (1, 1, 1080.0)


def test_what_has_waited_for_room_does_not_wait_as_long_again_after_a_loss(
    taken: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The HTTP server, which sends it again, is told for how long it has waited, and says so. It is the time of all
    waits together."""
    made = with_room(monkeypatch, (100, 100, 100), most=600, at_start=400)
    told: list[Any] = []
    monkeypatch.setattr(waits_for_room, "sock_send", lambda _socket, message: told.append(message))
    now_s = [1000.0]
    made._clock = lambda: now_s[0]
    made.dispatching_with_trace(long_request(50, 300, "r", to=2))
    now_s[0] += 20
    made._coordinator.capacities = (100, 100, 400)
    made._follow_long()
    assert (told, taken) == ([RequestWaited(name="r", waited_s=20.0)], ["worker 2"])
    now_s[0] += 1000
    made._coordinator.capacities = (100, 100, 100)
    again = ContinuedGenerateReqInput.of(long_request(50, 300, "r_2"), waited_s=20.0)
    made.dispatching_with_trace(again)
    assert made._long.next_deadline_s == now_s[0] + 40
    monkeypatch.setattr(Restarts, "is_any_coming_back", True)
    now_s[0], made._blocked = now_s[0] + 10, {0, 1, 2}
    made._follow_long()
    now_s[0], made._blocked = now_s[0] + 10, set()
    made._follow_held()
    assert made._long.next_deadline_s == now_s[0] + 20, "counted once"
    now_s[0] += 20
    made._follow_long()
    assert told[-1] == RequestWaited(name="r_2", waited_s=60.0)
    made.dispatching_with_trace(ContinuedGenerateReqInput.of(long_request(50, 300, "r_3"), waited_s=60.0))
    made._follow_long()
    assert (len(taken), len(made._long)) == (3, 0)


def test_time_without_any_replica_is_time_that_a_request_has_waited(
    taken: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    made = with_room(monkeypatch, (100, 100, 100), most=600, at_start=400)
    now_s = [1000.0]
    made._clock = lambda: now_s[0]
    made.dispatching_with_trace(long_request(50, 300, "r"))
    monkeypatch.setattr(Restarts, "is_any_coming_back", True)
    now_s[0], made._blocked = 1020.0, {0, 1, 2}
    made._follow_long()
    assert (len(made._long), made._held.next_deadline_s) == (0, 1060.0)
    now_s[0], made._blocked = 1040.0, set()
    made._follow_held()
    assert (len(made._held), made._long.next_deadline_s, taken) == (0, 1060.0, [])


def test_a_request_is_not_bound_to_a_replica_that_ended_while_it_waited_there(
    sent: list[tuple[Any, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    made = with_room(monkeypatch, (100, 100, 100), most=600, at_start=400)
    made.dispatching_with_trace(request := long_request(50, 300, "r"))
    (first,) = made._long.wanted
    end(made, made.scheduler_procs[first].pid)
    made._follow_long()
    (second,) = made._long.wanted
    assert (first != second, request.routed_dp_rank) == (True, None)
    sent.clear()
    # It is back, and lends; another one has more.
    made.dp_active[first] = made.status[first] = True
    made._refresh_active_workers()
    made._by_need.dispatcher.on_back(first)
    third = 3 - first - second
    made._coordinator.capacities = tuple({first: 60, second: 100, third: 340}[each] for each in range(3))
    made._clock = lambda: 1e9
    made._follow_long()
    assert [worker for worker, _ in sent] == [f"worker {third}"]


def test_nobody_waits_for_room_at_a_replica_that_gets_no_requests(
    sent: list[tuple[Any, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that makes no progress lends to another, which gets none either: to the dispatcher that one is alone."""
    made = with_room(monkeypatch, (100,) * 4, most=600, at_start=400)
    for replica in (0, 3):
        made._by_need.dispatcher.record(replica, 1000)
    made._by_need.dispatcher.set_stalled({2})
    made._blocked = {1, 2}
    made.dispatching_with_trace(long_request(50, 300, "r"))
    picks = []
    monkeypatch.setattr(made._by_need.dispatcher, "pick", lambda *_: picks.append(0))
    made._follow_long()
    assert (list(made._long.wanted), picks, sent) == ([0], [], [])


def by_round_robin(monkeypatch: pytest.MonkeyPatch, capacities: tuple[int, ...]) -> Any:
    made = with_room(monkeypatch, capacities, most=2000, at_start=500)
    made._by_need, made.dispatching = None, made.round_robin_scheduler
    return made


def test_with_a_method_of_sglang_what_a_lender_has_no_room_for_goes_to_who_has_fewest_requests(
    sent: list[tuple[Any, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not all to the largest: that one borrows, because it has more than its own memory has room for."""
    made = by_round_robin(monkeypatch, (900, 500, 100))
    for number in range(4):
        made.dispatching_with_trace(long_request(50, 100, f"long {number}"))
    assert [worker for worker, _ in sent] == ["worker 0", "worker 1"] * 2
    made._open.ended(["long 1", "long 3"])
    made.dispatching_with_trace(long_request(50, 100, "r"))
    assert sent[-1][0] == "worker 1"
    sent.clear()
    for _ in range(3):
        made.dispatching_with_trace(long_request(50, 10, "r"))
    assert sorted(worker for worker, _ in sent) == ["worker 0", "worker 1", "worker 2"], "what all have room for"


def test_with_a_method_of_sglang_a_request_waits_for_room_once_whoever_gives_it_back(
    sent: list[tuple[Any, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    made = by_round_robin(monkeypatch, (100, 900, 100))
    made.dispatching_with_trace(long_request(50, 1000, "r"))
    assert made._long.wanted == {1: 1052}, "at the largest, which lacks least"
    made._clock = lambda: 1e9
    made._follow_long()
    assert [(worker, message.has_waited) for worker, message in sent] == [("worker 1", True)]
    # One that replicas have given back too often goes to the largest at once.
    made._coordinator.capacities = (100, 400, 100)
    often = ContinuedGenerateReqInput.of(long_request(50, 300, "r"), was_returned=True, has_waited=True)
    made.dispatching_with_trace(often)
    assert (sent[-1], len(made._long)) == (("worker 1", often), 0)


def test_what_a_lender_has_no_room_for_goes_where_least_is_to_be_done(
    taken: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not to the largest: that one borrows, because it has more than its own memory has room for."""
    made = with_room(monkeypatch, (900, 500, 100), most=2000, at_start=500)
    made._by_need.dispatcher.on_report(0, ReplicaLoad(900, used_tokens=500, growth_tokens=300))
    made._by_need.dispatcher.on_report(1, ReplicaLoad(500, used_tokens=50))
    for _ in range(2):
        made.dispatching_with_trace(long_request(50, 100, "r"))
    assert taken == ["worker 1"] * 2


def test_whoever_waits_in_the_store_for_a_replica_that_has_ended_is_refused() -> None:
    made, told = controller(), []
    made._store = SimpleNamespace(expect=lambda *of: told.append(of))
    ended = made.scheduler_procs[2]
    ended.kill()
    made._on_processes_ended([ended])
    assert told == [(1, 1)]
