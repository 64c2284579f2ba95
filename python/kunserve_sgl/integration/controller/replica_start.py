"""Starts the scheduler processes of one replica while the others serve: nothing here waits for them.

SGLang's own function starts them, as at the start of the server. It would then wait for their reports in this process,
so it gets pipes that say at once what the first start has said; what really comes through them is read when it is
there. The processes are started in the controller's main thread: the kernel ends those that are spawned with the thread
that started them.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import zmq
from sglang.srt.managers import data_parallel_controller
from sglang.srt.utils.network import get_free_port

from kunserve_sgl.control.addresses import requests_bind_address
from kunserve_sgl.errors import TransientError
from kunserve_sgl.exits import await_exits
from kunserve_sgl.integration.attach.head_sockets import make_socket
from kunserve_sgl.integration.attach.process import ATTACHED_KEY
from kunserve_sgl.integration.controller.actor_process import clean_up
from kunserve_sgl.integration.controller.worker_socket import WorkerSocket


class _SaidBefore:
    """Stands in for the reading end of a pipe, in SGLang's function."""

    def __init__(self, report: Mapping[str, Any]) -> None:
        self._report = report

    def recv(self) -> Mapping[str, Any]:
        return self._report


class _NotedPipes:
    """Stands in for `multiprocessing` in SGLang's module, and keeps the pipes."""

    def __init__(self, upstream: Any, report: Mapping[str, Any]) -> None:
        self._upstream = upstream
        self._report = report
        self.readers: list[Any] = []
        self.writers: list[Any] = []

    def Pipe(self, duplex: bool) -> tuple[_SaidBefore, Any]:
        reader, writer = self._upstream.Pipe(duplex)
        self.readers.append(reader)
        self.writers.append(writer)
        return _SaidBefore(self._report), writer

    def __getattr__(self, name: str) -> Any:
        return getattr(self._upstream, name)


class ReplicaStart:
    """Is one start of one replica: its processes, by rank, and the socket for its requests. `close` or `hand_over` ends
    it."""

    def __init__(
        self,
        replica: int,
        incarnation: int,
        socket: Any,
        processes: Sequence[Any],
        readers: Sequence[Any],
        directory: str,
    ) -> None:
        """`directory` is the server's private one."""
        self.replica = replica
        self.incarnation = incarnation
        self.processes = list(processes)
        self.living = list(processes)  # without those whose end has been seen
        self.socket = socket
        self._readers = {reader.fileno(): reader for reader in readers}
        self._directory = directory
        self._has_ended = False

    @property
    def files(self) -> Sequence[int]:
        """Lists the files that bring reports and have not yet."""
        return tuple(self._readers)

    @property
    def is_ready(self) -> bool:
        """Tells whether all ranks have reported that they are ready."""
        return not self._readers and not self._has_ended

    @property
    def waits_for(self) -> str | None:
        """Says what somebody else has to do before it can start; None where nobody has to."""
        return next((why for each in self.living if (why := getattr(each, "waits_for", None)) is not None), None)

    @property
    def has_lost_node(self) -> bool:
        """Tells whether it has ended because a node of Ray has, which no process of it can help."""
        return any(getattr(each, "has_lost_node", False) for each in self.processes)

    def rank_of(self, process: Any) -> int | None:
        """Returns the rank of a process of this start, None for another one."""
        return self.processes.index(process) if process in self.processes else None

    def read(self, file: int) -> None:
        """Takes in the report that a file has brought. Raises TransientError for a process that is not attached as it
        should be. For one that has ended instead nothing is said: its end is seen, and says more."""
        with self._readers.pop(file) as reader:
            try:
                report = reader.recv()
            except EOFError:
                self._has_ended = True
                return
        if ATTACHED_KEY not in report:
            raise TransientError("it started without KunServe attached")

    def kill(self) -> None:
        """Ends the processes, and says nothing of it: their ends are seen as any other."""
        for process in self.living:
            process.kill()

    def hand_over(self) -> Any:
        """Returns the socket, which is the caller's from now on."""
        socket, self.socket = self.socket, None
        return socket

    def close(self) -> None:
        """Closes what this start has in this process, and removes what its processes have left. All of them have
        ended."""
        for reader in self._readers.values():
            reader.close()
        self._readers.clear()
        for process in self.processes:
            clean_up(self._directory, process)
        if self.socket is not None:
            self.socket.close(linger=0)


def requests_socket(controller: Any, replica: int, incarnation: int) -> tuple[Any, str]:
    """Binds a socket for the requests of a replica, in SGLang's `controller`. Returns it, and what the replica connects
    to: on a network nobody else can. Raises zmq.ZMQError."""
    address = requests_bind_address(controller.server_args, replica, incarnation)
    socket = make_socket(controller.keys, controller.context, zmq.PUSH, address, only=(replica, 0))
    return socket, socket.getsockopt_string(zmq.LAST_ENDPOINT)


def start_replica(controller: Any, replica: int, incarnation: int, changes: Mapping[str, Any]) -> ReplicaStart:
    """Starts the processes of `replica` with SGLang's `controller`, on the same GPUs as before. `changes` are server
    arguments that differ from those of the server. Raises OSError, TransientError."""
    arguments = copy.copy(controller.server_args)
    for name, value in changes.items():
        object.__setattr__(arguments, name, value)  # SGLang keeps them from being changed by accident
    bound, address = requests_socket(controller, replica, incarnation)
    socket = WorkerSocket(bound, replica)
    ports = dataclasses.replace(controller.port_args, scheduler_input_ipc_name=address, nccl_port=get_free_port())
    before = controller.scheduler_procs
    started: list[Any] = []
    controller.scheduler_procs = started
    report = {
        "max_total_num_tokens": controller.max_total_num_tokens,
        "max_req_input_len": controller.max_req_input_len,
        "startup_time": None,
    }
    try:
        with controller.starts(), _noted(report) as pipes:
            controller.launch_tensor_parallel_group(arguments, ports, 0, replica)
    except BaseException:
        # One rank may have been started before the other failed.
        for process in started:
            process.kill()
        await_exits(started)
        socket.close(linger=0)
        raise
    finally:
        controller.scheduler_procs = before
    return ReplicaStart(replica, incarnation, socket, started, pipes.readers, arguments.kunserve_directory)


@contextlib.contextmanager
def _noted(report: Mapping[str, Any]) -> Iterator[_NotedPipes]:
    upstream = data_parallel_controller.mp
    pipes = data_parallel_controller.mp = _NotedPipes(upstream, report)
    try:
        yield pipes
    finally:
        data_parallel_controller.mp = upstream
        for writer in pipes.writers:  # else the end of a process would not be seen in its pipe
            writer.close()
