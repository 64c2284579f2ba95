"""What clients ask of all replicas at once: checked before anybody is told, and answered for each replica.

Upstream passes most of it on as it comes, and a scheduler that meets something impossible ends: that of every replica,
because all are asked the same.
"""

from __future__ import annotations

import asyncio
import math
import os
import time
from collections.abc import Collection
from pathlib import Path
from typing import Any

from fastapi import HTTPException
from sglang.srt.configs.load_config import LoadFormat
from sglang.srt.managers.communicator import FanOutCommunicator
from sglang.srt.managers.io_struct import FlushCacheReqInput, FlushCacheReqOutput
from sglang.srt.managers.tokenizer_manager import TokenizerManager
from typing_extensions import override

from kunserve_sgl.errors import TransientError
from kunserve_sgl.integration.launcher.calls import Calls
from kunserve_sgl.integration.launcher.request_bodies import shown
from kunserve_sgl.integration.messages import Outcome

# A batch that has been answered is gone from a replica a moment later.
_SETTLE_S = 5.0
_SETTLE_POLL_S = 0.02
_LONGEST_NAME = 150
_LOG_FORMATS = ("text", "json")
_LOG_LEVELS = ("debug", "info", "warning", "error", "critical")
_LEVELS_OF_REQUESTS = range(4)
_PROFILE_ACTIVITIES = {"cpu": ("CPU", "GPU"), "cuda": ("CPU", "GPU", "MEM", "CUDA_PROFILER", "RPD")}


class RefusedError(HTTPException):
    """Answers 400 with the reason, on every route: some answer with the text of the exception, others leave it to
    FastAPI."""

    def __init__(self, reason: str) -> None:
        super().__init__(status_code=400, detail=reason)

    def __str__(self) -> str:
        return str(self.detail)


class ControlRequests(TokenizerManager):  # type: ignore[misc]
    """Answers the control routes, as a part of the tokenizer manager. `calls` and `_alive` are kept by who inherits."""

    calls: Calls
    _alive: Collection[int]  # replicas that are there
    # Replicas that have been asked to update their parameters, and have been there ever since.
    _updating: frozenset[int] = frozenset()

    # Memory

    @override
    async def release_memory_occupation(self, obj: Any, request: Any = None) -> None:
        """Refuses with RefusedError, whatever the flags: no memory is given back."""
        raise RefusedError(
            "release_memory_occupation: KunServe manages the memory of parameters and KV cache, so none is given back; "
            "it takes --kunserve off with --enable-memory-saver"
        )

    @override
    async def resume_memory_occupation(self, obj: Any, request: Any = None) -> None:
        """Refuses with RefusedError: no memory was given back."""
        raise RefusedError("resume_memory_occupation: KunServe never releases memory, so there is none to resume")

    @override
    async def flush_cache(self, timeout_s: float | None = None) -> FlushCacheReqOutput:
        """Flushes every replica, and joins what all of them say; it succeeds where all do."""
        self.auto_create_handle_loop()
        answers = await self.flush_cache_communicator(FlushCacheReqInput(timeout_s=timeout_s))
        message = "".join(f"{text}\n" for text in sorted(answer.message for answer in answers))
        return FlushCacheReqOutput(success=all(answer.success for answer in answers), message=message)

    # Parameters

    @override
    async def get_weights_by_name(self, obj: Any, request: Any = None) -> Any:
        """Returns each replica's values, in the order of the replicas; one that has dropped the parameter's layer has
        it from another."""
        self.auto_create_handle_loop()
        answers = await self.get_weights_by_name_communicator(obj)
        found = [answer.parameter for answer in sorted(answers, key=lambda answer: int(answer.rid))]
        somewhere = next((parameter for parameter in found if parameter is not None), None)
        if somewhere is None or self.server_args.dp_size == 1:
            return somewhere
        return [somewhere if parameter is None else parameter for parameter in found]

    @override
    async def update_weights_from_disk(self, obj: Any, request: Any = None) -> Any:
        """Refuses a load format that SGLang does not know before a replica reads it."""
        formats = [each.value for each in LoadFormat]
        if obj.load_format is not None and obj.load_format not in formats:
            raise RefusedError(f"load_format: {shown(obj.load_format)}; accepted: {', '.join(formats)}")
        return await super().update_weights_from_disk(obj, request)

    @override
    async def _wait_for_model_update_from_disk(self, obj: Any) -> Any:
        """Updates all replicas or none: it is called when new requests wait, or the engine is paused, and asks all
        before one begins, else they could end up with different parameters."""
        reason = await self._why_unwritable(obj.flush_cache)
        if reason is not None:
            return False, reason, 0
        self._updating = frozenset(self._alive)
        return await super()._wait_for_model_update_from_disk(obj)

    async def _why_unwritable(self, flushes: bool) -> str | None:
        ends_at_s = time.monotonic() + _SETTLE_S
        while True:
            try:
                replies = await self.calls.ask_whether_writable(self._alive, flushes)
            except TransientError as error:
                return str(error)
            refusals = [reply for reply in replies if reply.outcome is not Outcome.DONE]
            if not refusals:
                return None
            is_settling = all(reply.outcome is Outcome.BUSY for reply in refusals)
            if not is_settling or time.monotonic() > ends_at_s:
                return "; ".join(f"replica {reply.replica}: {reply.message}" for reply in refusals)
            await asyncio.sleep(_SETTLE_POLL_S)

    @override
    async def update_weights_from_tensor(self, obj: Any, request: Any = None) -> Any:
        return self._several("update_weights_from_tensor") or await super().update_weights_from_tensor(obj, request)

    @override
    async def update_weights_from_distributed(self, obj: Any, request: Any = None) -> Any:
        several = self._several("update_weights_from_distributed")
        return several or await super().update_weights_from_distributed(obj, request)

    @override
    async def init_weights_update_group(self, obj: Any, request: Any = None) -> Any:
        return self._several("init_weights_update_group") or await super().init_weights_update_group(obj, request)

    @override
    async def destroy_weights_update_group(self, obj: Any, request: Any = None) -> Any:
        return self._several("destroy_weights_update_group") or await super().destroy_weights_update_group(obj, request)

    @override
    async def init_weights_send_group_for_remote_instance(self, obj: Any, request: Any = None) -> Any:
        several = self._several("init_weights_send_group_for_remote_instance")
        return several or await super().init_weights_send_group_for_remote_instance(obj, request)

    @override
    async def send_weights_to_remote_instance(self, obj: Any, request: Any = None) -> Any:
        several = self._several("send_weights_to_remote_instance")
        return several or await super().send_weights_to_remote_instance(obj, request)

    def _several(self, what: str) -> tuple[bool, str] | None:
        """Returns the refusal of what works with one replica only; None where there is one. Upstream has an assertion
        there, which is a 500."""
        if self.server_args.dp_size == 1:
            return None
        return False, f"{what}: SGLang does it with one replica only; with more, POST /update_weights_from_disk"

    # Profiles

    @override
    async def start_profile(self, req: Any = None) -> Any:
        """Refuses what a scheduler could not do; see `_check_profile`."""
        if req is not None:
            _check_profile(req, str(self.server_args.device))
        return await super().start_profile(req)

    async def _execute_profile(self, req: Any) -> Any:
        answers = await self.profile_communicator(req)
        succeeded, _ = FanOutCommunicator.merge_results(answers)
        if not succeeded:
            raise RefusedError("; ".join(sorted(answer.message for answer in answers)))
        return answers[0]

    # State

    @override
    async def slow_down(self, obj: Any, request: Any = None) -> None:
        """Refuses more than a quarter of the order timeout: whoever waits for a batch for longer gives up."""
        seconds = obj.forward_sleep_time
        most = self.server_args.kunserve_order_timeout / 4
        if seconds is not None and not (math.isfinite(seconds) and seconds <= most):
            raise RefusedError(
                f"forward_sleep_time: {seconds}; accepted: null, or seconds up to {most:g}, a quarter of "
                "--kunserve-order-timeout: whoever waits for a batch for longer than that gives up"
            )
        await super().slow_down(obj, request)

    @override
    async def set_internal_state(self, obj: Any) -> Any:
        """Refuses values that are no finite numbers."""
        for name, value in obj.server_args.items():
            if not math.isfinite(value) or (name == "pp_max_micro_batch_size" and type(value) is not int):
                raise RefusedError(
                    f"server_args: {shown(name)}: {value}; accepted: a finite number, for sizes an integer"
                )
        return await super().set_internal_state(obj)

    @override
    async def start_expert_distribution_record(self) -> None:
        raise RefusedError(_NO_EXPERT_DISTRIBUTION)

    @override
    async def stop_expert_distribution_record(self) -> None:
        raise RefusedError(_NO_EXPERT_DISTRIBUTION)

    @override
    async def dump_expert_distribution_record(self) -> None:
        raise RefusedError(_NO_EXPERT_DISTRIBUTION)

    @override
    def configure_logging(self, obj: Any) -> None:
        """Refuses levels and formats that SGLang would fail on later."""
        _require_one_of("log_level", None if obj.log_level is None else obj.log_level.lower(), _LOG_LEVELS)
        _require_one_of("log_requests_format", obj.log_requests_format, _LOG_FORMATS)
        _require_one_of("log_requests_level", obj.log_requests_level, _LEVELS_OF_REQUESTS)
        if obj.dump_requests_threshold is not None and obj.dump_requests_threshold < 1:
            raise RefusedError(f"dump_requests_threshold: {obj.dump_requests_threshold}; accepted: 1 or more")
        super().configure_logging(obj)


_NO_EXPERT_DISTRIBUTION = (
    "the distribution of experts is not recorded: with KunServe a layer may run at another replica; it takes "
    "--kunserve off with --expert-distribution-recorder-mode"
)


def _require_one_of(field: str, value: Any, accepted: Any) -> None:
    if value is not None and value not in accepted:
        raise RefusedError(f"{field}: {shown(value)}; accepted: {', '.join(map(str, accepted))}")


def _check_profile(req: Any, device: str) -> None:
    for field in ("num_steps", "start_step"):
        value = getattr(req, field)
        if value is not None and not 0 <= value < 2**53:
            raise RefusedError(f"{field}: {shown(value)}; accepted: an integer, 0 or more")
    if req.profile_by_stage and not req.num_steps:
        raise RefusedError("num_steps: profile_by_stage needs it; accepted: an integer, 1 or more")
    accepted = _PROFILE_ACTIVITIES.get(device, ("CPU", "GPU"))
    if req.activities is not None and not (req.activities and set(req.activities) <= set(accepted)):
        raise RefusedError(f"activities: {shown(req.activities)}; accepted on {device}: {', '.join(accepted)}")
    for field in ("profile_id", "profile_prefix"):
        value = getattr(req, field)
        if value is not None and not (
            len(value) <= _LONGEST_NAME and value.isascii() and value.isprintable() and "/" not in value
        ):
            raise RefusedError(
                f"{field}: {shown(value)}; accepted: a part of a file name, at most {_LONGEST_NAME} plain characters, "
                "none of them /"
            )
    directory = req.output_dir if req.output_dir is not None else os.getenv("SGLANG_TORCH_PROFILER_DIR", "/tmp")
    try:
        path = Path(directory).expanduser()
        path.mkdir(parents=True, exist_ok=True)
        if not os.access(path, os.W_OK | os.X_OK):
            raise PermissionError("it is not writable")
    except (OSError, ValueError, RuntimeError) as error:
        raise RefusedError(f"output_dir: {shown(directory)}: {error}; accepted: a directory to write to") from None
