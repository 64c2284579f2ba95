"""The functions that SGLang runs in its child processes, with KunServe attached.

This module must not import SGLang when it is imported: a child imports it to find these functions, and only then
are the patches installed that SGLang's modules have to be loaded with.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
from typing import Any

from kunserve_sgl.args import Activations
from kunserve_sgl.control.addresses import rank_store_url
from kunserve_sgl.integration.attach import forked_process, last_words
from kunserve_sgl.integration.attach.attachment import Attachment, Role, attach
from kunserve_sgl.integration.attach.head_sockets import detokenizer_ports
from kunserve_sgl.integration.attach.patches import AttachmentError
from kunserve_sgl.integration.attach.reaper import join, keep_temporary_files_in

logger = logging.getLogger(__name__)

# Not "kunserve": what a child reports is part of /server_info, where that is the mode.
ATTACHED_KEY = "kunserve_attached_as"
# The environment variable by which SGLang is told where the ranks of a replica find each other.
_RANKS_MEET_AT = "SGLANG_DISTRIBUTED_INIT_METHOD_OVERRIDE"
_MODULE_LOADING = "CUDA_MODULE_LOADING"
_SERVER_ARGS_ARGUMENT = 0  # positions among the arguments of SGLang's run_scheduler_process
_TP_RANK_ARGUMENT = 3
_DP_RANK_ARGUMENT = 8
_PIPE_ARGUMENT = 9  # `pipe_writer`


class _VerifyingPipe:
    """Stands in for the pipe by which a child reports that it is ready. It verifies the attachment before the report
    goes out."""

    def __init__(self, pipe: Any, attachment: Attachment, server_args: Any) -> None:
        self._pipe = pipe
        self._attachment = attachment
        self._server_args = server_args

    def send(self, message: dict[str, Any]) -> None:
        with last_words.ending_alone(self._server_args):
            self._attachment.verify()
        self._pipe.send({**message, ATTACHED_KEY: self._attachment.role.value})

    def __getattr__(self, name: str) -> Any:
        return getattr(self._pipe, name)


def _attach_or_stop_server(role: Role, is_restart: bool = False) -> Attachment:
    """Attaches this child. If it cannot, ends it and its parent, as SGLang does with a child that fails; not the parent
    of one that is started while others serve.

    SGLang's own handler is not installed yet at this point, and the parent would wait for the child's report forever.
    """
    try:
        return attach(role)
    except AttachmentError as error:
        logging.basicConfig(format="[%(asctime)s] %(message)s", datefmt="%Y-%m-%d %H:%M:%S")
        logger.error("KunServe cannot attach to SGLang in the %s process: %s", role.value, error)
        last_words.leave(f"KunServe cannot attach to SGLang: {error}")
        parent = multiprocessing.parent_process()
        if not is_restart and parent is not None and parent.pid is not None and parent.is_alive():
            os.kill(parent.pid, signal.SIGQUIT)
        last_words.end_process()


def run_scheduler_process(*args: Any, **kwargs: Any) -> None:
    """Runs one tensor-parallel rank of one replica; takes the arguments of SGLang's function of this name."""
    server_args = args[_SERVER_ARGS_ARGUMENT]
    attachment = attach_scheduler(server_args, args[_DP_RANK_ARGUMENT] or 0, args[_TP_RANK_ARGUMENT])
    from sglang.srt.managers import scheduler

    pipe = args[_PIPE_ARGUMENT]
    args = (*args[:_PIPE_ARGUMENT], _VerifyingPipe(pipe, attachment, server_args), *args[_PIPE_ARGUMENT + 1 :])
    last_words.left_by(scheduler.run_scheduler_process)(*args, **kwargs)


def attach_scheduler(server_args: Any, replica: int, rank: int) -> Attachment:
    """Makes this process, which has imported no scheduler yet, one that runs a rank of a replica with KunServe
    attached. Ends it where that is not possible."""
    directory = server_args.kunserve_directory
    join(directory)
    last_words.sign_up(directory, last_words.scheduler_name(replica, rank))
    if server_args.dist_init_addr is None:
        # Torch's own way to let ranks find each other is a port on all interfaces, which takes orders from anybody.
        os.environ.setdefault(_RANKS_MEET_AT, rank_store_url(server_args, replica))
    load_kernels_at_start(server_args)
    return _attach_or_stop_server(Role.SCHEDULER, is_restart=server_args.kunserve_incarnation > 0)


def load_kernels_at_start(server_args: Any) -> None:
    """Has CUDA load all kernels when this process first uses it, where activations may be sent by NCCL: to load one
    later CUDA waits for the device, which a send keeps busy until the peer receives. SGLang leaves the choice to CUDA.
    It costs GPU memory, and time at start, for kernels that are never used."""
    may_send = server_args.kunserve_activations != Activations.MAPPED.value
    if may_send and server_args.dp_size > server_args.kunserve_replicas_per_gpu:
        os.environ[_MODULE_LOADING] = "EAGER"


def run_controller_process(*, pipe_writer: Any, **kwargs: Any) -> None:
    """Runs the data-parallel controller; takes the arguments of SGLang's run_data_parallel_controller_process."""
    directory = kwargs["server_args"].kunserve_directory
    join(directory)
    last_words.sign_up(directory, last_words.CONTROLLER)
    if not kwargs["server_args"].use_ray:
        last_words.left_by(forked_process.use_own_starter)()  # as long as there is one thread
    keep_temporary_files_in(directory)
    attachment = _attach_or_stop_server(Role.CONTROLLER)
    from sglang.srt.managers import data_parallel_controller

    run = last_words.left_by(data_parallel_controller.run_data_parallel_controller_process)
    run(pipe_writer=_VerifyingPipe(pipe_writer, attachment, kwargs["server_args"]), **kwargs)


def run_detokenizer_process(server_args: Any, port_args: Any, *args: Any) -> None:
    """Runs the detokenizer; takes the arguments of SGLang's function of this name. Nothing is attached; a failure
    leaves its reason."""
    last_words.sign_up(server_args.kunserve_directory, last_words.DETOKENIZER)
    from sglang.srt.managers import detokenizer_manager

    class Detokenizer(detokenizer_manager.DetokenizerManager):  # type: ignore[misc]
        __init__ = last_words.left_by(detokenizer_manager.DetokenizerManager.__init__)
        event_loop = last_words.left_by(detokenizer_manager.DetokenizerManager.event_loop)

        def init_ipc_channels(self, port_args: Any, server_args: Any) -> None:
            with detokenizer_ports(
                server_args, detokenizer_manager, port_args, lambda: self.recv_from_scheduler
            ) as ports:
                super().init_ipc_channels(ports, server_args)

    detokenizer_manager.run_detokenizer_process(server_args, port_args, *(args or (Detokenizer,)))
