"""The actor in which a rank of a replica runs on Ray: SGLang's, with KunServe attached before it is imported.

Ray's workers import this module to make the actor. Like `process.py`, it must not import SGLang.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from kunserve_sgl.errors import ConfigurationError, TransientError
from kunserve_sgl.integration.attach import last_words
from kunserve_sgl.integration.attach.process import ATTACHED_KEY, attach_scheduler
from kunserve_sgl.integration.attach.reaper import DIRECTORY_VARIABLE, name_instance, start_ticks

_METRICS = "PROMETHEUS_MULTIPROC_DIR"  # by which SGLang's processes share metrics
_OWN = "metrics"  # in the server's directory of a node
PROCESS_KEY = "kunserve_process"  # the actor's pid and when it started, beside what SGLang's scheduler reports


class KunserveSchedulerActor:
    """Runs one tensor-parallel rank of one replica. An error of its scheduler ends the process, as it does without
    Ray: what it has mapped of others must not stay."""

    def __init__(self, server_args: Any, *, tp_rank: int, dp_rank: int, **kwargs: Any) -> None:
        directory = server_args.kunserve_directory
        if not Path(directory).is_dir():
            raise TransientError(
                f"the server's directory {directory} is not on this node of Ray, {os.uname().nodename}; replicas on "
                "machines of their own take --kunserve-control network"
            )
        os.environ[DIRECTORY_VARIABLE] = directory  # for what this process starts; Ray has handed on the server's
        name_instance(directory, kwargs["port_args"].instance_id)
        keep_metrics(directory, f"replica{dp_rank}.{server_args.kunserve_incarnation}")
        self._attachment = attach_scheduler(server_args, dp_rank, tp_rank)
        last_words.left_by(require_files)(server_args)
        from sglang.srt.plugins import load_plugins
        from sglang.srt.ray.scheduler_actor import SchedulerActor

        load_plugins()  # as SGLang's processes do, but not its actor
        upstream = SchedulerActor.__ray_metadata__.modified_class
        start = last_words.left_by(upstream)
        self._actor: Any = start(server_args=server_args, tp_rank=tp_rank, dp_rank=dp_rank, **kwargs)

    def get_info(self) -> dict[str, Any]:
        """Returns what SGLang's scheduler reports when it is ready, which is that this process is attached too."""
        last_words.left_by(self._attachment.verify)()
        me = os.getpid(), start_ticks(os.getpid())
        return {**self._actor.get_info(), ATTACHED_KEY: self._attachment.role.value, PROCESS_KEY: me}

    def run_event_loop(self) -> None:
        """Serves until the process ends."""
        try:
            last_words.left_by(self._actor.run_event_loop)()
        finally:
            last_words.end_process()


def keep_metrics(directory: str, who: str) -> None:
    """Lets SGLang's metrics go where the HTTP server reads them, in a file of each process; on another machine to
    `directory`, from where they are sent, those of all ranks of replica `who` to one place. Call it before SGLang is
    imported."""
    there = os.environ.get(_METRICS)
    if there is not None and not os.path.isdir(there):
        own = Path(directory, _OWN, who)
        own.mkdir(parents=True, exist_ok=True)
        os.environ[_METRICS] = str(own)


def own_metrics(directory: str) -> Path | None:
    """Returns where the metrics of this replica go if that is not where the HTTP server reads them."""
    own = Path(os.environ.get(_METRICS, ""))
    return own if own.parent == Path(directory, _OWN) else None


def require_files(server_args: Any) -> None:
    """Raises ConfigurationError unless the model is on this node too: SGLang would take a path that is missing for the
    name of a repository."""
    for flag, path in (("--model-path", server_args.model_path), ("--tokenizer-path", server_args.tokenizer_path)):
        if path is not None and os.path.isabs(path) and not os.path.exists(path):
            raise ConfigurationError(
                f"{flag} {path}: there is no such file or directory on the node {os.uname().nodename} of Ray, at "
                f"{server_args.kunserve_host}; accepted: what each node has at the same path, or the name of a "
                "repository"
            )
