"""Starts the server: plain SGLang with `--kunserve off`, else SGLang with KunServe attached to every process."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, NoReturn

from kunserve_sgl.args import Mode
from kunserve_sgl.control.addresses import make_control_directory, make_host_copies
from kunserve_sgl.integration.attach import last_words
from kunserve_sgl.integration.attach.attachment import Role, attach
from kunserve_sgl.integration.attach.last_words import StartFailedError
from kunserve_sgl.integration.attach.patches import AttachmentError
from kunserve_sgl.integration.attach.preload import is_attached, preload
from kunserve_sgl.integration.attach.reaper import keep_temporary_files_in, start_reaper

if TYPE_CHECKING:
    from kunserve_sgl.integration.launcher.server_args import KunserveServerArgs

logger = logging.getLogger(__name__)


def run(argv: Sequence[str]) -> None:
    """Parses `argv`, serves until the process is told to stop, and leaves no child process behind."""
    if is_attached(argv):
        _preload()
    from sglang.srt.plugins import load_plugins
    from sglang.srt.utils import kill_process_tree

    from kunserve_sgl.integration.launcher.server_args import KunserveServerArgs, prepare_server_args, refuse_taken_port

    load_plugins()
    server_args = prepare_server_args(argv)
    if isinstance(server_args, KunserveServerArgs):
        refuse_taken_port(server_args)
        end_after(partial(_run_attached, server_args))
    from sglang.launch_server import run_server

    try:
        run_server(server_args)
    finally:
        kill_process_tree(os.getpid(), include_parent=False)


def _preload() -> None:
    try:
        why_spawned = preload()
    except AttachmentError as error:
        logger.error("KunServe: cannot attach to SGLang: %s", error)
        last_words.end_process()
    if why_spawned is not None:
        logger.warning("KunServe: each process imports SGLang again: %s", why_spawned)


def end_after(serve: Callable[[], None]) -> NoReturn:
    """Serves, and ends all children and this process, whatever their libraries are still at: the end of an interpreter
    waits for threads and sockets without a deadline. The last line says why, where that was not asked for."""
    from kunserve_sgl.integration.launcher.ending import INTERRUPTED, end_now, end_with

    try:
        serve()
    except AttachmentError as error:
        end_now(f"cannot attach to SGLang: {error}")
    except StartFailedError as error:
        end_now(f"the server has not started: {error}")
    except KeyboardInterrupt:
        end_with(INTERRUPTED)
    except SystemExit as error:
        if isinstance(error.code, str):
            end_now(error.code)
        end_with(error.code or 0)
    except BaseException as error:
        logger.exception("KunServe: the server has failed")
        end_now(f"the server has failed: {type(error).__name__}: {error}")
    end_with(0)


def _run_attached(server_args: KunserveServerArgs) -> None:
    attachment = attach(Role.LAUNCHER)
    from sglang.srt.entrypoints import http_server
    from sglang.srt.entrypoints.engine import init_tokenizer_manager

    from kunserve_sgl.integration.attach.process import run_detokenizer_process, run_scheduler_process
    from kunserve_sgl.integration.bad_request import BadRequestError
    from kunserve_sgl.integration.launcher import routes
    from kunserve_sgl.integration.launcher.checked_requests import answer_bad_request
    from kunserve_sgl.integration.launcher.ending import OpenCalls, warm_up
    from kunserve_sgl.integration.launcher.tokenizer_manager import KunserveTokenizerManager

    how = "transitions are ordered over HTTP"
    if server_args.kunserve == Mode.AUTO.value and server_args.dp_size > 1:
        how = (
            f"layers are dropped where requests need more than {server_args.kunserve_drop_at:.0%} of the KV capacity, "
            f"and restored when they have needed less than {server_args.kunserve_restore_at:.0%} of what it was for "
            f"{server_args.kunserve_min_stay:g} s"
        )
    logger.info("KunServe %s: %d replicas; %s", server_args.kunserve, server_args.dp_size, how)
    routes.add_routes(http_server.app)
    http_server.app.add_middleware(OpenCalls)
    http_server.app.add_exception_handler(BadRequestError, answer_bad_request)
    attachment.verify()
    directory = make_control_directory()
    # Stays open until this process ends, in whatever way: that is what the reaper waits for.
    start_reaper(directory)
    keep_temporary_files_in(directory)
    server_args.override("kunserve", kunserve_directory=directory)
    if server_args.kunserve_host_copy:
        make_host_copies(server_args, server_args.tp_size)
    http_server.launch_server(
        server_args,
        init_tokenizer_manager_func=partial(init_tokenizer_manager, TokenizerManagerClass=KunserveTokenizerManager),
        run_scheduler_process_func=run_scheduler_process,
        run_detokenizer_process_func=run_detokenizer_process,
        execute_warmup_func=warm_up,
    )
