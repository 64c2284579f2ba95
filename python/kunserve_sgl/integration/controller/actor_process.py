"""A rank's process on Ray, for those who know it as one of `multiprocessing`: started, watched and killed alike.

Ray says that an actor has died when it has decided so, which may be before its process has ended. On this machine the
process itself is waited for: others map its memory, and use it again when it is gone. On another machine nobody can.
"""

from __future__ import annotations

import contextlib
import logging
import multiprocessing
import os
import threading
from collections.abc import Iterator
from multiprocessing.connection import Connection
from typing import Any

import psutil

from kunserve_sgl.integration.attach.last_words import FAILED
from kunserve_sgl.integration.attach.reaper import start_ticks
from kunserve_sgl.integration.controller.ray_cluster import RayCluster

logger = logging.getLogger(__name__)

_MOST_CHARACTERS = 400
_END_DEADLINE_S = 30.0  # for Ray to say that an actor is dead that does not answer


class ActorProcess:
    """Is one actor. A thread follows it until its end, as nothing that a poller takes comes from Ray."""

    def __init__(self, cluster: RayCluster, args: tuple[Any, ...]) -> None:
        """`args` are those of SGLang's run_scheduler_process."""
        self._cluster = cluster
        self._args = args
        self.pid: int | None = None  # once it is ready
        self.exitcode: int | None = None
        self.how_ended = ""  # as Ray says
        self._process: psutil.Process | None = None  # where it is on this machine
        self._over = threading.Event()

    def start(self) -> None:
        """Asks Ray for the actor; does not wait for it. Raises what Ray raises."""
        server_args, port_args, gpu_id, tp_rank, _, _, _, pp_rank, dp_rank, writer, *_ = self._args
        self._writer = Connection(os.dup(writer.fileno()), readable=False)
        self.sentinel, self._sentinel_writer = os.pipe()
        from sglang.srt.ray import engine

        group, bundle = self._cluster.place(dp_rank)
        self._actor: Any = engine._create_scheduler_actor(
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
        self._args = ()
        threading.Thread(target=self._follow, name=f"kunserve-actor-{dp_rank}-{tp_rank}", daemon=True).start()

    def is_alive(self) -> bool:
        """Tells whether its end has not been seen."""
        return self.exitcode is None

    def kill(self) -> None:
        """Kills it, also where it is stopped; its end is seen later."""
        import ray

        ray.kill(self._actor)
        if self._process is not None:
            with contextlib.suppress(psutil.NoSuchProcess):
                self._process.kill()

    def join(self, timeout: float | None = None) -> None:
        """Waits until its end has been seen."""
        self._over.wait(timeout)

    def close(self) -> None:
        """Gives up what this process has of it. Its end has been seen."""
        os.close(self.sentinel)

    def _follow(self) -> None:
        import ray
        from ray.exceptions import RayError

        from kunserve_sgl.integration.attach.scheduler_actor import PROCESS_KEY

        try:
            report = ray.get(self._actor.get_info.remote())
            pid, started = report.pop(PROCESS_KEY)
            if start_ticks(pid) == started:
                self._process = psutil.Process(pid)
            self.pid = pid
            self._writer.send(report)
            ray.get(self._actor.run_event_loop.remote())
            self.how_ended = "it left its loop"
        except RayError as error:
            self.how_ended = _first_line(error)
        finally:
            self._writer.close()
            self._wait_for_end()
            self.exitcode = FAILED
            self._over.set()
            os.close(self._sentinel_writer)

    def _wait_for_end(self) -> None:
        """Kills what may still be there, and waits until it is not."""
        import ray
        from ray.exceptions import ActorDiedError

        try:
            self.kill()
            with contextlib.suppress(ActorDiedError):
                ray.get(self._actor.__ray_ready__.remote(), timeout=_END_DEADLINE_S)
            if self._process is not None:
                self._process.wait(_END_DEADLINE_S)
        except Exception:
            logger.exception("KunServe: Ray does not say that process %s has ended", self.pid)


def how_ended(process: Any) -> str:
    """Says how a process ended, of whatever kind."""
    if isinstance(process, ActorProcess):
        return f"ended, and Ray says: {process.how_ended}"
    return f"ended with exit code {process.exitcode}"


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
