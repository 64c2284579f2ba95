"""The launcher's side of the attachment: checks that every process it started reports to be attached."""

from __future__ import annotations

import dataclasses
from typing import Any

from sglang.srt.entrypoints.engine import Engine
from sglang.srt.server_args import PortArgs

from kunserve_sgl.integration.patches import AttachmentError
from kunserve_sgl.integration.process import ATTACHED_KEY
from kunserve_sgl.integration.reaper import name_instance


class KunserveEngine(Engine):  # type: ignore[misc]
    """SGLang's engine; starts no server whose schedulers are not ours."""

    @classmethod
    def _launch_subprocesses(cls, server_args: Any, *args: Any, port_args: Any = None, **kwargs: Any) -> Any:
        port_args = port_args or PortArgs.init_new(server_args)
        name_instance(server_args.kunserve_directory, port_args.instance_id)
        return super()._launch_subprocesses(server_args, *args, port_args=port_args, **kwargs)

    @classmethod
    def _launch_scheduler_processes(cls, *args: Any, **kwargs: Any) -> Any:
        result, processes = super()._launch_scheduler_processes(*args, **kwargs)
        upstream_wait = result.wait_for_ready

        def wait_for_ready() -> None:
            upstream_wait()
            for info in result.scheduler_infos:
                if ATTACHED_KEY not in info:
                    raise AttachmentError("a scheduler or controller process started without KunServe attached")

        return dataclasses.replace(result, wait_for_ready=wait_for_ready), processes
