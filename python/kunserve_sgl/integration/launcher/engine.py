"""The launcher's side of the attachment: checks that every process it started reports to be attached."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

from sglang.srt.entrypoints import engine
from sglang.srt.entrypoints.engine import Engine
from sglang.srt.server_args import PortArgs

from kunserve_sgl.integration.attach import forked_process
from kunserve_sgl.integration.attach.last_words import StartFailedError
from kunserve_sgl.integration.attach.patches import AttachmentError
from kunserve_sgl.integration.attach.process import ATTACHED_KEY
from kunserve_sgl.integration.attach.reaper import name_instance
from kunserve_sgl.integration.launcher.ending import end_on_sigquit_during_start, reason_of_failed_start


class KunserveEngine(Engine):  # type: ignore[misc]
    """Starts no server whose schedulers are not ours."""

    _children: ClassVar[list[tuple[str, Any]]] = []  # of the server that is being started, by SGLang's names

    @classmethod
    def _launch_subprocesses(cls, server_args: Any, *args: Any, port_args: Any = None, **kwargs: Any) -> Any:
        port_args = port_args or PortArgs.init_new(server_args)
        name_instance(server_args.kunserve_directory, port_args.instance_id)
        return super()._launch_subprocesses(server_args, *args, port_args=port_args, **kwargs)

    @classmethod
    def _launch_scheduler_processes(cls, server_args: Any, *args: Any, **kwargs: Any) -> Any:
        directory, replicas = server_args.kunserve_directory, server_args.dp_size
        children = cls._children = []
        end_on_sigquit_during_start(directory, children, replicas)  # in place of SGLang's way, set a moment ago
        with forked_process.starts_of(engine):
            result, processes = super()._launch_scheduler_processes(server_args, *args, **kwargs)
        children += [(f"scheduler_{i}", process) for i, process in enumerate(processes)]
        upstream_wait = result.wait_for_ready

        def wait_for_ready() -> None:
            try:
                upstream_wait()
            except RuntimeError as error:
                raise StartFailedError(reason_of_failed_start(directory, children, replicas)) from error
            for info in result.scheduler_infos:
                if ATTACHED_KEY not in info:
                    raise AttachmentError("a scheduler or controller process started without KunServe attached")

        return dataclasses.replace(result, wait_for_ready=wait_for_ready), processes

    @classmethod
    def _launch_detokenizer_subprocesses(cls, *args: Any, **kwargs: Any) -> Any:
        with forked_process.starts_of(engine):
            processes, names = super()._launch_detokenizer_subprocesses(*args, **kwargs)
        cls._children += zip(names, processes, strict=True)
        return processes, names
