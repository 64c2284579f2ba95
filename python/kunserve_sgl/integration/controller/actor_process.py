"""A rank's process on Ray, for those who know it as one of `multiprocessing`: started, watched and killed alike.

Ray says that an actor has died when it has decided so, which may be before its process has ended. On this machine the
process itself is waited for: others map its memory, and use it again when it is gone. On another machine the agent of
its node waits for it, and what it has left there is brought here, so that whoever asks how it ended looks in one place.
"""

from __future__ import annotations

import contextlib
import copy
import logging
import multiprocessing
import os
import threading
import time
from collections.abc import Iterator
from multiprocessing.connection import Connection
from typing import Any

import psutil

from kunserve_sgl.control.addresses import begun_requests_path
from kunserve_sgl.control.begun_requests import leave_begun
from kunserve_sgl.errors import KunserveError, TransientError
from kunserve_sgl.integration.attach import last_words
from kunserve_sgl.integration.attach.last_words import FAILED
from kunserve_sgl.integration.attach.node_agent import Remains
from kunserve_sgl.integration.attach.reaper import clean_up_after, start_ticks
from kunserve_sgl.integration.controller.nodes import Node, NodeGoneError
from kunserve_sgl.integration.controller.ray_cluster import RayCluster

logger = logging.getLogger(__name__)

_MOST_CHARACTERS = 400
_ASK_AGAIN_S = 1.0
_SERVER_ARGS_ARGUMENT = 0  # positions among the arguments of SGLang's run_scheduler_process
_TP_RANK_ARGUMENT = 3
_DP_RANK_ARGUMENT = 8
_PIPE_ARGUMENT = 9
_END_DEADLINE_S = 30.0  # for Ray to say that an actor is dead that does not answer


class ActorProcess:
    """Is one actor. A thread makes it where Ray has a place, and follows it until its end, as nothing that a poller
    takes comes from Ray."""

    def __init__(self, cluster: RayCluster, args: tuple[Any, ...]) -> None:
        """`args` are those of SGLang's run_scheduler_process."""
        self._cluster = cluster
        self._args = args
        self._options: Any = args[_SERVER_ARGS_ARGUMENT]
        self.who: tuple[int, int] = args[_DP_RANK_ARGUMENT], args[_TP_RANK_ARGUMENT]
        self.pid: int | None = None  # once it is ready; a number of its node
        self.exitcode: int | None = None
        self.how_ended = ""  # as Ray says
        self.has_lost_node = False  # ended because its node had, as Ray knew by then
        self.waits_for: str | None = None  # why it has not been made yet, where somebody else has to do something
        self._actor: Any = None
        self._node: Node | None = None  # with a network, once it is made
        self._started = ""
        self._process: psutil.Process | None = None  # where it is on this machine
        self._killed = threading.Event()
        self._over = threading.Event()

    def start(self) -> None:
        """Asks Ray for the actor; does not wait for it."""
        self._writer = Connection(os.dup(self._args[_PIPE_ARGUMENT].fileno()), readable=False)
        self.sentinel, self._sentinel_writer = os.pipe()
        name = "kunserve-actor-{}-{}".format(*self.who)
        threading.Thread(target=self._follow, name=name, daemon=True).start()

    @property
    def is_far(self) -> bool:
        """Tells whether it is on a machine of its own: its pid means nothing here, and nothing of it can be mapped."""
        return self._node is not None and not self._node.is_shared

    def is_alive(self) -> bool:
        """Tells whether its end has not been seen."""
        return self.exitcode is None

    def kill(self) -> None:
        """Kills it, also where it is stopped; its end is seen later. Waits for nothing."""
        if self._killed.is_set():
            return
        self._killed.set()
        if self._process is not None:
            with contextlib.suppress(psutil.NoSuchProcess):
                self._process.kill()
        if self._actor is not None:
            threading.Thread(target=self._kill_by_ray, name="kunserve-actor-kill", daemon=True).start()

    def join(self, timeout: float | None = None) -> None:
        """Waits until its end has been seen."""
        self._over.wait(timeout)

    def close(self) -> None:
        """Gives up what this process has of it. Its end has been seen."""
        os.close(self.sentinel)

    def _follow(self) -> None:
        from ray.exceptions import RayError

        try:
            self.how_ended = self._run()
        except (RayError, KunserveError) as error:
            self.how_ended = _first_line(error)
            with contextlib.suppress(RayError):
                self.has_lost_node = self._cluster.has_lost_node(self.who[0])
        except Exception as error:
            logger.exception("KunServe: an actor cannot be followed")
            self.how_ended = _first_line(error)
        finally:
            self.waits_for = None
            self._writer.close()
            self._end()
            self.exitcode = FAILED
            self._over.set()
            os.close(self._sentinel_writer)

    def _run(self) -> str:
        """Makes the actor and waits until it is over. Says how it ended."""
        from kunserve_sgl.integration.attach.scheduler_actor import PROCESS_KEY

        self._node = self._cluster.await_node(self.who[0], self._killed.is_set, self._tell)
        if self._killed.is_set():
            return "it was not started any more"
        self._actor = self._make()
        if self._killed.is_set():  # by who saw no actor yet
            return "it was killed"
        report = self._result_of(self._actor.get_info)
        pid, self._started = report.pop(PROCESS_KEY)
        if not self.is_far and start_ticks(pid) == self._started:
            self._process = psutil.Process(pid)
        self.pid = pid
        if self._killed.is_set():
            return "it was killed"
        self._writer.send(report)
        self._result_of(self._actor.run_event_loop)
        return "it left its loop"

    def _tell(self, reason: str | None) -> None:
        if reason is not None and reason != self.waits_for:
            logger.warning("KunServe: replica %d waits to be started: %s", self.who[0], reason)
        self.waits_for = reason

    def _make(self) -> Any:
        from sglang.srt.ray import engine

        server_args, port_args, gpu_id, tp_rank, _, _, _, pp_rank, dp_rank, *_ = self._args
        if self._node is not None:
            server_args = copy.copy(server_args)
            object.__setattr__(server_args, "kunserve_directory", self._node.directory)
            object.__setattr__(server_args, "kunserve_host", self._node.host)
        group, bundle = self._cluster.place(dp_rank)
        self._args = ()
        return engine._create_scheduler_actor(
            pg=group,
            bundle_idx=bundle,
            gpu_id=gpu_id,
            server_args=server_args,
            port_args=port_args,
            tp_rank=tp_rank,
            pp_rank=pp_rank,
            dp_rank=dp_rank,
            dist_init_addr=None,
            rank0_node_ip=self._cluster.node_ip,
        )

    def _result_of(self, method: Any) -> Any:
        """Returns what a method of the actor returns. Raises what Ray raises, and TransientError where the agent of its
        node ends, which has the directory that it uses."""
        import ray

        result = method.remote()
        if self.is_far:
            assert self._node is not None
            assert self._cluster.nodes is not None
            ready, _ = ray.wait([result, self._node.until_gone], num_returns=1)
            if result not in ready:
                self._cluster.nodes.require_alive(self._node.number)
                raise TransientError("the agent of its node has ended, with the directory there")
        return ray.get(result)

    def _kill_by_ray(self) -> None:
        import ray

        try:
            ray.kill(self._actor)
            if self.is_far and self._node is not None and self.pid is not None:
                self._node.kill(self.pid, self._started)
        except Exception:
            logger.exception("KunServe: process %s cannot be killed now", self.pid)

    def _end(self) -> None:
        """Kills what may still be there, and waits until it is not."""
        if self._actor is None:
            return
        try:
            self._kill_by_ray()
            if self.is_far and self.pid is not None:
                self._await_far_end()
                return
            self._await_ray()
            if self.is_far:
                self._fetch_remains()
            elif self._process is not None:
                self._process.kill()
                self._process.wait(_END_DEADLINE_S)
        except psutil.NoSuchProcess:
            pass
        except Exception:
            logger.exception("KunServe: Ray does not say that process %s has ended", self.pid)

    def _await_ray(self) -> None:
        import ray
        from ray.exceptions import ActorDiedError

        with contextlib.suppress(ActorDiedError):
            ray.get(self._actor.__ray_ready__.remote(), timeout=_END_DEADLINE_S)

    def _await_far_end(self) -> None:
        """Waits until the agent of its node says that the process has ended, or Ray that the node has. There is no
        deadline: another one of its replica must not be started before."""
        from ray.exceptions import RayError

        assert self._node is not None
        assert self._cluster.nodes is not None
        assert self.pid is not None
        while True:
            try:
                if self._node.end(self.pid, self._started):
                    self._fetch_remains()
                    return
            except NodeGoneError:
                self._leave(Remains(None, None))
                return
            except (RayError, TransientError) as error:
                logger.warning(
                    "KunServe: whether process %d has ended is not known yet: %s", self.pid, _first_line(error)
                )
            time.sleep(_ASK_AGAIN_S)
            try:
                self._node = self._cluster.nodes.at(self._node.number)
            except NodeGoneError as error:
                logger.warning("KunServe: replica %d rank %d: %s", *self.who, error)
                self._leave(Remains(None, None))
                return
            except (RayError, TransientError) as error:
                logger.warning("KunServe: no agent at a node: %s", _first_line(error))

    def _fetch_remains(self) -> None:
        """Brings here what it has left on its node."""
        from ray.exceptions import RayError

        assert self._node is not None
        (replica, rank), incarnation = self.who, self._options.kunserve_incarnation
        try:
            self._leave(self._node.remains(replica, rank, incarnation))
            if rank == 0:  # the others have none that is to be brought here
                self._node.remove_files(replica, incarnation)
        except RayError as error:
            logger.warning("KunServe: what process %s has left is lost: %s", self.pid, _first_line(error))
            self._leave(Remains(None, None))

    def _leave(self, remains: Remains) -> None:
        """Leaves here what is known of its end, where a process of this machine does it itself."""
        (replica, rank), options = self.who, self._options
        last_words.pass_on(options.kunserve_directory, last_words.scheduler_name(replica, rank), remains.words)
        if rank == 0 and self.pid is not None:
            leave_begun(begun_requests_path(options, replica, options.kunserve_incarnation), remains.begun)


def how_ended(process: Any) -> str:
    """Says how a process ended, of whatever kind."""
    if isinstance(process, ActorProcess):
        return f"ended, and Ray says: {process.how_ended}"
    return f"ended with exit code {process.exitcode}"


def is_far(process: Any) -> bool:
    """Tells whether a process, of whatever kind, is on another machine."""
    return isinstance(process, ActorProcess) and process.is_far


def clean_up(directory: str, process: Any) -> None:
    """Gives up a process that has ended, and its shared memory files where they are on this machine."""
    if not is_far(process) and process.pid is not None:
        clean_up_after(directory, process.pid)
    process.close()


def _first_line(error: Exception) -> str:
    """Says in a line what Ray says in many."""
    return " ".join(str(error).split())[:_MOST_CHARACTERS]


class _Starts:
    """Stands in for `multiprocessing` in SGLang's module of the controller."""

    def __init__(self, cluster: RayCluster) -> None:
        self._cluster = cluster

    Pipe = staticmethod(multiprocessing.Pipe)

    def Process(self, *, target: Any, args: tuple[Any, ...]) -> ActorProcess:
        return ActorProcess(self._cluster, args)


@contextlib.contextmanager
def actors_of(module: Any, cluster: RayCluster) -> Iterator[None]:
    """Lets what `module` starts as `mp.Process`, which is schedulers, be actors while this lasts."""
    upstream, module.mp = module.mp, _Starts(cluster)
    try:
        yield
    finally:
        module.mp = upstream
