"""The controller while replicas are away that come back: it starts them again, keeps what would be lost meanwhile, and
takes them up. When and how often is in `restarts.py`, how in `replica_start.py`."""

from __future__ import annotations

import contextlib
import logging
from typing import Any

from sglang.srt.managers import data_parallel_controller
from sglang.srt.managers.data_parallel_controller import DataParallelController
from sglang.srt.managers.io_struct import AbortReq, sock_send
from sglang.srt.managers.utils import is_health_check_generate_req
from typing_extensions import override

from kunserve_sgl.control.addresses import remove_files
from kunserve_sgl.control.autopilot import Autopilot
from kunserve_sgl.control.coordinator import Coordinator
from kunserve_sgl.control.coordinator_link import CoordinatorLink
from kunserve_sgl.control.group_store import GroupStore
from kunserve_sgl.control.message_check import MessageCheck
from kunserve_sgl.errors import TransientError
from kunserve_sgl.integration.attach import forked_process
from kunserve_sgl.integration.controller.actor_process import ActorProcess, actors_of, clean_up
from kunserve_sgl.integration.controller.dispatch import RequestDispatch
from kunserve_sgl.integration.controller.held_requests import HeldRequests
from kunserve_sgl.integration.controller.lasting_orders import LastingOrders
from kunserve_sgl.integration.controller.long_requests import LongRequests
from kunserve_sgl.integration.controller.metrics import Metrics
from kunserve_sgl.integration.controller.ray_cluster import RayCluster
from kunserve_sgl.integration.controller.refusals import refusal
from kunserve_sgl.integration.controller.replica_start import ReplicaStart, start_replica
from kunserve_sgl.integration.controller.restarts import Restarts
from kunserve_sgl.integration.controller.serving_clock import ServingClock
from kunserve_sgl.integration.messages import ReplicasAlive
from kunserve_sgl.policy.stalls import StallWatch
from kunserve_sgl.wire.curve import Curve

logger = logging.getLogger(__name__)


class ComingBack(DataParallelController):  # type: ignore[misc]
    """Knows which replicas come back. The rest of what it uses is made by who inherits."""

    keys: Curve | None = None  # of the head, with sockets over TCP
    workers: Any
    scheduler_procs: list[Any]
    _active_workers: list[int]
    _autopilot: Autopilot
    _blocked: set[int]
    _by_need: RequestDispatch | None
    _check: MessageCheck
    _clock: ServingClock
    _coordinator: Coordinator
    _link: CoordinatorLink
    _metrics: Metrics | None
    _send_to_tokenizer: Any
    _stalls: StallWatch
    _store: GroupStore | None = None  # with --kunserve-control network
    _why_ended: dict[int, str]
    _cluster: RayCluster | None = None  # with --use-ray

    def _make_restarts(self, first_start_s: float) -> None:
        """Is to be called when all replicas have been started, which took so long."""
        options = self.server_args
        tries = options.kunserve_restart_tries if options.kunserve_restart == "on" else 0
        self._restarts = Restarts(
            self, options.dp_size, tries, options.kunserve_restart_pause, first_start_s, self._clock
        )
        self._held = HeldRequests(options.kunserve_hold_timeout)
        self._long = LongRequests(options.kunserve_hold_timeout)
        self._lasting = LastingOrders()
        self._ended: set[Any] = set()  # processes that served, and whose end has been seen
        self._ends: list[str] = []  # how replicas have ended, the first one first

    def starts(self) -> contextlib.AbstractContextManager[None]:
        """Lets SGLang's functions start schedulers in our way, as processes or actors, while the context lasts."""
        if self._cluster is not None:
            return actors_of(data_parallel_controller, self._cluster)
        return forked_process.starts_of(data_parallel_controller)

    def _expect(self, replica: int, incarnation: int) -> None:
        """Ignores what comes of earlier incarnations of a replica, or is for them."""
        self._check.expect(replica, incarnation)
        if self._store is not None:
            self._store.expect(replica, incarnation)

    def _require_somebody(self) -> None:
        """Raises TransientError, which ends the server, where no replica is left or coming back."""
        if not self._active_workers and not self._restarts.is_any_coming_back:
            raise TransientError(f"all replicas have ended; the first one: {self._ends[0]}")

    # Requests and orders meanwhile

    @property
    def _may_dispatch(self) -> bool:
        """Whether a replica is there that is not left out because it, or one it is merged with, makes no progress."""
        return not self._blocked.issuperset(self._active_workers)

    def _hold(self, req: Any, since_s: float | None = None) -> None:
        """Keeps a request until a replica is back, or makes progress again; it may have waited `since_s`. Nothing is
        kept of a health check: there is nobody to ask."""
        since_s = self._clock() if since_s is None else since_s
        if not is_health_check_generate_req(req) and not self._held.add(req, since_s):
            what = "makes progress" if self._active_workers else "is there"
            raise TransientError(f"no replica {what}, and {len(self._held)} requests wait for one to be started again")

    def _follow_held(self) -> None:
        """Dispatches what was held when somebody is there again who makes progress, and answers what has waited for
        too long."""
        if self._may_dispatch:
            for request, since_s in self._held.take_all():
                self.dispatching_with_trace(request, since_s=since_s)
        for request in self._held.take_overdue(self._clock()):
            waited = f"no replica was back within {self._held.longest_s:g} s"
            sock_send(self._send_to_tokenizer, refusal(request.rid, TransientError(waited)))

    def _on_abort(self, abort: AbortReq) -> None:
        for request in (*self._held.take_aborted(abort), *self._long.take_aborted(abort)):
            sock_send(self._send_to_tokenizer, AbortReq(rid=request.rid))
        self.send_control_message(abort)

    @override
    def send_control_message(self, obj: Any) -> None:
        """Sends `obj` to all replicas that are there. What holds until it is said again is kept for those that come
        later."""
        self._lasting.note(obj)
        super().send_control_message(obj)

    # Restarts; see `restarts.Home`

    def has_living(self, replica: int) -> bool:
        """Tells whether a process that served for `replica` has not ended yet."""
        return any(process not in self._ended for process in self._processes_of(replica))

    def _processes_of(self, replica: int) -> list[Any]:
        found = [(process, self._rank_of(process)) for process in self.scheduler_procs]
        return [process for process, who in found if who is not None and who[0] == replica]

    def _rank_of(self, process: Any) -> tuple[int, int] | None:
        """Returns (replica, rank) of a process that has reported for duty; None for others. Pids of several machines
        tell nothing."""
        if isinstance(process, ActorProcess):
            return process.who if self._link.knows(*process.who) else None
        return self._link.rank_of(process.pid)

    def start(self, replica: int, incarnation: int, from_others: bool) -> ReplicaStart:
        """Starts the processes of a replica, all of which have ended, and gives up what the last ones had here."""
        if (worker := self.workers[replica]) is not None:
            worker.close(linger=0)  # with what was not delivered
            self.workers[replica] = None
        for process in self._processes_of(replica):
            self.scheduler_procs.remove(process)
            self._ended.discard(process)
            clean_up(self.server_args.kunserve_directory, process)
        self._link.forget(replica)
        self._why_ended.pop(replica, None)
        remove_files(self.server_args, replica, incarnation - 1)
        self._expect(replica, incarnation)
        if self._metrics is not None:
            self._metrics.on_restart(replica)
        changes: dict[str, Any] = {
            "kunserve_incarnation": incarnation,
            "kunserve_base_slots": self._coordinator.slots_at_start(replica),
        }
        if from_others:
            changes["kunserve_checksums"] = self._coordinator.checksums_for(replica)
            changes["kunserve_lenders"] = bool(self._active_workers)
        if self._coordinator.has_new_parameters(replica):
            changes |= self._lasting.model  # the coordinator looks whether they are those that it had
        return start_replica(self, replica, incarnation, changes)

    def take_back(self, start: ReplicaStart) -> bool:
        """Lets requests go to a replica that has been started again, once the coordinator has taken it up. Returns
        False before that. Raises TransientError where it never will be."""
        replica = start.replica
        if not self._coordinator.take_back(replica):
            return False
        self.workers[replica] = start.hand_over()
        self.scheduler_procs += start.processes
        for order in self._lasting.orders():
            sock_send(self.workers[replica], order)
        self.status[replica] = self.dp_active[replica] = True
        self._refresh_active_workers()
        self.dp_budget.include(replica)
        self._stalls.on_back(replica)
        if self._by_need is not None:
            self._by_need.dispatcher.on_back(replica)
        sock_send(self._send_to_tokenizer, ReplicasAlive(alive=self._active_workers))
        logger.warning("KunServe: replica %d is back; requests go to replicas %s", replica, self._active_workers)
        return True

    def say(self, replica: int, what: str, is_for_good: bool) -> None:
        """Says in log and status how it stands with a replica that has ended."""
        if is_for_good:
            logger.error("KunServe: replica %d is not started again: %s", replica, what)
            self._coordinator.give_up(replica, what)
        else:
            logger.warning("KunServe: replica %d: %s", replica, what)
            self._coordinator.set_restarting(replica, what)
