"""One fault at one place: a process is killed or stopped in a phase of a transition or of a recovery, under load, and
what has to come of it, as docs/faults.md describes it."""

from __future__ import annotations

import enum
import json
import os
import signal
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass

import psutil
import requests
from _deployments import FAULTS_DRAIN_TIMEOUT_S, FAULTS_PHASE_TIMEOUT_S
from _drop import Clients, Served
from _http import CALL_DEADLINE_S, Endpoint, Json
from _questions import Question, ask_all
from _sabotage import FAULT_IN_PHASE, REFUSAL_IN_PHASE, order_fault
from _servers import START_DEADLINE_S, TITLE_OF_CONTROLLER, RunningServer

from kunserve_sgl.control.phased import REPLY_GRACE_S
from long_run.soak_report import NAMED_ENDS
from waiting import wait_until

CLIENTS = 5
# What a busy machine may take for all else than waiting; less than what SGLang waits for dumps of a GPU.
_WORK_S = 50.0


class Way(enum.Enum):
    """What leads into the phase."""

    DROP = "drop"
    PARTIAL_DROP = "partial-drop"
    RESTORE = "restore"
    PARTIAL_RESTORE = "partial-restore"
    BACK_FROM_DROP = "back-from-drop"  # which another member has refused to switch to
    BACK_FROM_RESTORE = "back-from-restore"  # which another member has refused to load for
    RECOVERY = "recovery"


class Role(enum.Enum):
    """Whom it happens to. The owner has layers with the layer host; where all is dropped, each is both."""

    OWNER = "owner"
    HOST = "host"
    CONTROLLER = "controller"


class Fault(enum.Enum):
    """What happens."""

    KILL = "kill"
    STOP = "stop"


_DROP_PHASES = ("prepare", "switch", "release", "resume")
_RESTORE_PHASES = ("prepare", "load", "switch", "release", "resume")
_BACK = ("revert", "undo", "reopen")
PHASES = {
    Way.DROP: _DROP_PHASES,
    Way.PARTIAL_DROP: _DROP_PHASES,
    Way.RESTORE: _RESTORE_PHASES,
    Way.PARTIAL_RESTORE: _RESTORE_PHASES,
    Way.BACK_FROM_DROP: _BACK,
    Way.BACK_FROM_RESTORE: _BACK,
    Way.RECOVERY: ("abandon", "reload", "revive"),
}
_OWNER, _HOST = 1, 0


@dataclass(frozen=True)
class Case:
    """A fault at a place. `moment` is when the order of the phase comes, or when it has been carried out."""

    way: Way
    phase: str
    role: Role
    fault: Fault
    moment: str = "begin"

    def __str__(self) -> str:
        return f"{self.way.value}-{self.phase}-{self.moment}-{self.role.value}-{self.fault.value}"

    @property
    def victim(self) -> int | None:
        """The replica that it happens to; None for the controller."""
        return {Role.OWNER: _OWNER, Role.HOST: _HOST}.get(self.role)

    @property
    def other(self) -> int:
        """The member that the way back or the recovery is because of."""
        return _OWNER if self.role is Role.HOST else _HOST

    @property
    def is_merged_before(self) -> bool:
        """Whether members depend on each other when it begins."""
        return self.way not in (Way.DROP, Way.PARTIAL_DROP, Way.BACK_FROM_DROP)

    @property
    def nobody_depends(self) -> bool:
        """Whether the others can go on without the victim, so that the transition is taken back."""
        return self.way in (Way.DROP, Way.PARTIAL_DROP) and self.phase == "prepare"

    @property
    def longest_s(self) -> float:
        """Until the order is answered or the others have recovered: the deadlines that may pass one after the other."""
        phase_s = FAULTS_PHASE_TIMEOUT_S + REPLY_GRACE_S
        if self.role is Role.CONTROLLER:
            return STOPPED_S + 2 * phase_s + _WORK_S
        if self.fault is Fault.KILL:
            return _WORK_S
        first_s = FAULTS_DRAIN_TIMEOUT_S + REPLY_GRACE_S if self.phase in ("prepare", "reload") else phase_s
        # The way back, and the phase of the recovery in which it is ended.
        return first_s + 2 * phase_s + _WORK_S


STOPPED_S = FAULTS_PHASE_TIMEOUT_S + 3.0  # the controller, so that the phase's deadline has passed when it wakes


def ask_or_named_end(endpoint: Endpoint, question: Question) -> list[int] | None:
    """The tokens; None where the request ended as docs/faults.md says that it may."""
    answer = endpoint.post("/generate", question.body())
    if answer.status_code == requests.codes.service_unavailable and any(end in answer.text for end in NAMED_ENDS):
        return None
    assert answer.status_code == requests.codes.ok, f"{answer.status_code} {answer.text[:500]}"
    tokens: list[int] = answer.json()["output_ids"]
    return tokens


def members_of(server: RunningServer) -> list[int]:
    return [replica["id"] for replica in server.at_start]


def bring_apart(server: RunningServer) -> None:
    """Until all replicas are there, by themselves; those that are merged still, or again, are restored."""

    def is_normal() -> bool:
        now = set(server.states())
        if now == {"merged"}:  # one that has just woken is left out for a moment
            server.endpoint.post("/kunserve/restore", {})
        return now == {"normal"}

    wait_until(is_normal, "all replicas are there", START_DEADLINE_S)


def drop_body(server: RunningServer, *, partial: bool) -> Json:
    """A merge of all. A partial one: the layer host keeps all of its layers, and executes some for each other one."""
    members = members_of(server)
    body: Json = {"groups": [members]}
    if partial:
        layers = len(server.status()["hosts"][0])
        few = layers // 2
        body["layers"] = {str(r): [_HOST] * few + [r] * (layers - few) for r in members if r != _HOST}
    return body


def is_stopped(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() == psutil.STATUS_STOPPED
    except psutil.NoSuchProcess:
        return False


def is_gone(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


class Scene:
    """One case on a server, from the order to its end."""

    def __init__(self, server: RunningServer, case: Case) -> None:
        self.server = server
        self.case = case
        ranks = server.spec.number("--tp-size", 1)
        self._ranks = ranks
        if case.victim is None:
            self.process, self.pid = "controller", server.pid_titled(TITLE_OF_CONTROLLER)
        else:
            # All ranks are hit in some case.
            rank = 0 if case.role is Role.HOST else ranks - 1
            self.process = f"{case.victim} {rank}"
            self.pid = server.scheduler_pid(case.victim, rank if ranks > 1 else None)
        self.before = server.restarts()

    @property
    def fault_is_there(self) -> bool:
        """Whether the signal has been sent."""
        return not (self.server.switches / FAULT_IN_PHASE).exists()

    def begin(self) -> None:
        """What is there before: merged members, if that is the way."""
        case, endpoint = self.case, self.server.endpoint
        if case.is_merged_before:
            endpoint.ask("/kunserve/drop", drop_body(self.server, partial=case.way is Way.PARTIAL_RESTORE))

    def arm(self) -> None:
        """Lets it happen when it comes to that."""
        case, switches = self.case, self.server.switches
        if case.way is Way.BACK_FROM_DROP:
            (switches / REFUSAL_IN_PHASE).write_text(f"{case.other} switch")
        elif case.way is Way.BACK_FROM_RESTORE:
            (switches / REFUSAL_IN_PHASE).write_text(f"{case.other} load")
        number = signal.SIGKILL if case.fault is Fault.KILL else signal.SIGSTOP
        order_fault(switches, self.process, case.phase, case.moment, number)

    def order(self) -> requests.Response | None:
        """What leads into the phase; the answer of an order."""
        case, endpoint = self.case, self.server.endpoint
        if case.way is Way.RECOVERY:
            os.kill(self.server.scheduler_pid(case.other, 0 if self._ranks > 1 else None), signal.SIGKILL)
            wait_until(lambda: self.fault_is_there, "the recovery has come to the phase")
            return None
        if case.way in (Way.RESTORE, Way.PARTIAL_RESTORE, Way.BACK_FROM_RESTORE):
            return endpoint.post("/kunserve/restore", {})
        return endpoint.post("/kunserve/drop", drop_body(self.server, partial=case.way is Way.PARTIAL_DROP))

    def disarm(self) -> None:
        for name in (FAULT_IN_PHASE, REFUSAL_IN_PHASE):
            (self.server.switches / name).unlink(missing_ok=True)

    def wait_for_fault(self, order: Future[requests.Response | None]) -> None:
        wait_until(
            lambda: self.fault_is_there or (order.done() and self.case.way is not Way.RECOVERY), "the phase begins"
        )
        assert self.fault_is_there, f"it has not come to the phase: {order.result()}"
        if self.case.fault is Fault.STOP:
            wait_until(lambda: is_stopped(self.pid) or is_gone(self.pid), "it is stopped")


@contextmanager
def scene(server: RunningServer, case: Case) -> Iterator[Scene]:
    """The server afterwards goes on, whatever happened."""
    one = Scene(server, case)
    try:
        yield one
    finally:
        one.disarm()
        if not is_gone(one.pid):
            os.kill(one.pid, signal.SIGCONT)


def run(server: RunningServer, case: Case, questions: Sequence[Question]) -> None:
    """A case of a replica, or of a controller that is stopped: each client has its answer, the order is answered or the
    others have recovered in time, nobody else has ended, and all is as at the start in the end."""
    served = Served(server, list(questions))
    with scene(server, case) as one:
        one.begin()
        is_up = not (case.way is Way.RECOVERY or case.role is Role.CONTROLLER or case.fault is Fault.STOP)
        with (
            Clients(served, CLIENTS, ask_or_named_end, watches_health=is_up) as clients,
            ThreadPoolExecutor(1) as thread,
        ):
            clients.wait_for_answers(3)
            one.arm()
            began_s = time.monotonic()
            order = thread.submit(one.order)
            one.wait_for_fault(order)
            if case.role is Role.CONTROLLER:
                time.sleep(STOPPED_S)  # nothing shows how long it has been stopped
                os.kill(one.pid, signal.SIGCONT)
            answer = order.result()
            if case.way is Way.RECOVERY and case.role is not Role.CONTROLLER:
                wait_until(lambda: is_gone(one.pid), "it is ended")
            seconds = time.monotonic() - began_s
            if not is_gone(one.pid):
                os.kill(one.pid, signal.SIGCONT)
            assert seconds < case.longest_s, f"{seconds:.1f} s, and {case.longest_s:.1f} are allowed"
            if answer is not None:
                _require_answer(case, answer)
            one.disarm()  # where members are still merged, the restore that follows is not to be refused
            bring_apart(server)
            clients.wait_for_answers(3)
    _require_nobody_else_ended(one)
    assert ask_all(server.endpoint, served.questions) == served.expected
    _require_clean(server)


def _require_answer(case: Case, answer: requests.Response) -> None:
    if case.role is Role.CONTROLLER:
        # Where the members had done what they were ordered, nothing has failed.
        assert answer.status_code in (requests.codes.ok, requests.codes.conflict, 503), answer.text
        return
    assert answer.status_code == requests.codes.service_unavailable, answer.text
    message = answer.json()["message"]
    if case.nobody_depends:
        assert message.startswith("rolled back: "), message
    elif case.fault is Fault.KILL:
        assert "serve by themselves again" in message, message
    else:  # the transition may have gone back before it was ended
        assert message.startswith("rolled back: ") or "serve by themselves again" in message, message
    if case.fault is Fault.KILL:
        assert f"replica {case.victim} rank " in message
        # Another rank may end because that one does not answer, and be seen to have ended before it.
        assert "ended with exit code -9" in message or "of this replica does not answer" in message, message


def _require_nobody_else_ended(one: Scene) -> None:
    case = one.case
    ended = {r for r, (was, now) in enumerate(zip(one.before, one.server.restarts(), strict=True)) if now > was}
    may = {case.other} if case.way is Way.RECOVERY else set()
    must = set(may)
    if case.victim is not None:
        may.add(case.victim)
        if case.fault is Fault.KILL or not case.nobody_depends:
            must.add(case.victim)
        else:
            may.discard(case.victim)
    if case.fault is Fault.STOP and case.way in (Way.RESTORE, Way.PARTIAL_RESTORE, Way.BACK_FROM_RESTORE):
        must.discard(case.victim if case.victim is not None else -1)  # it woke before anybody had waited for too long
    assert must <= ended <= may, f"replicas {sorted(ended)} have ended"


def _require_clean(server: RunningServer) -> None:
    checked = server.endpoint.ask("/kunserve/check", {})
    assert checked["ok"], checked
    assert [each["replica"] for each in checked["replicas"]] == members_of(server)
    assert "leak" not in server.log().lower()


def run_to_the_end(server: RunningServer, case: Case, questions: Sequence[Question]) -> None:
    """A case in which the controller is killed: each client has an answer, and the server ends."""
    served = Served(server, list(questions))

    def ask_until_the_end(endpoint: Endpoint, question: Question) -> list[int] | None:
        """As a stream, whose head says that the server knows of it. Where that came before the fault, it is answered;
        the server does not wait for those who ask while it ends."""
        was_known = False
        try:
            with requests.post(
                f"{endpoint.base_url}/generate", json=question.body(stream=True), timeout=CALL_DEADLINE_S, stream=True
            ) as answer:
                was_known = not one.fault_is_there
                if answer.status_code == requests.codes.service_unavailable:
                    return None
                assert answer.status_code == requests.codes.ok, answer.text
                *_, last, done = [line.removeprefix(b"data: ") for line in answer.iter_lines() if line]
        except requests.RequestException:
            assert one.fault_is_there
            assert not was_known
            return None
        assert done == b"[DONE]"
        said = json.loads(last)
        reason = said["meta_info"]["finish_reason"]
        if reason["type"] == "length":
            tokens: list[int] = said["output_ids"]
            return tokens
        assert (reason["type"], reason["status_code"]) == ("abort", requests.codes.service_unavailable), said
        return None

    with scene(server, case) as one:
        one.begin()
        with (
            Clients(served, CLIENTS, ask_until_the_end, watches_health=False) as clients,
            ThreadPoolExecutor(1) as thread,
        ):
            clients.wait_for_answers(3)
            one.arm()
            began_s = time.monotonic()
            order = thread.submit(one.order)
            wait_until(lambda: one.fault_is_there, "the phase begins")
            wait_until(lambda: not server.process.running, "the server ends")
            assert time.monotonic() - began_s < _WORK_S + FAULTS_PHASE_TIMEOUT_S
            try:
                answer = order.result()
            except requests.RequestException:
                answer = None
            assert answer is None or answer.status_code == requests.codes.service_unavailable, answer.text
    assert server.process.log_tail(1).endswith("ended with exit code -9")


def cases() -> list[Case]:
    """All of them."""
    found = [
        Case(way, phase, role, fault)
        for way, phases in PHASES.items()
        for phase in phases
        for role in Role
        for fault in Fault
    ]
    ends = [
        Case(case.way, case.phase, case.role, case.fault, "end")
        for case in found
        if case.fault is Fault.KILL and case.role is not Role.CONTROLLER
    ]
    return found + ends
