"""Profiles of one replica. A profile that fails is given up and says why; upstream ends the process."""

from __future__ import annotations

import logging
from typing import Any

from sglang.srt.managers.io_struct import ProfileReq, ProfileReqOutput, ProfileReqType
from sglang.srt.managers.scheduler_components.profiler_manager import SchedulerProfilerManager

logger = logging.getLogger(__name__)


class KunserveProfilerManager(SchedulerProfilerManager):  # type: ignore[misc]
    """Answers whose profile it is, and what went wrong with it."""

    torch_profiler: Any

    def _profile(self, recv_req: ProfileReq) -> ProfileReqOutput:
        is_start = recv_req.req_type == ProfileReqType.START_PROFILE
        try:
            if is_start and getattr(self, "profile_in_progress", False):  # upstream would start a second one inside it
                answer = _failed("a profile is in progress; POST /stop_profile first")
            else:
                answer = super()._profile(recv_req)
        except Exception as error:
            logger.exception("KunServe: a profile fails")
            self._give_up()
            answer = _failed(f"the profile is given up: {type(error).__name__}: {error}")
        return ProfileReqOutput(success=answer.success, message=f"replica {self.ps.dp_rank or 0}: {answer.message}")

    def _profile_batch_predicate(self, batch: Any) -> None:
        try:
            super()._profile_batch_predicate(batch)
        except Exception:
            logger.exception("KunServe: a profile fails")
            self._give_up()

    def _start_profile(self, *args: Any, **kwargs: Any) -> ProfileReqOutput | None:
        answer = super()._start_profile(*args, **kwargs)
        if getattr(self, "torch_profiler", None) is not None:
            self.torch_profiler = _Trace(self.torch_profiler)
        return answer

    def _stop_profile(self, *args: Any, **kwargs: Any) -> ProfileReqOutput | None:
        trace = getattr(self, "torch_profiler", None)
        answer = super()._stop_profile(*args, **kwargs)
        return _failed(trace.failure) if trace is not None and trace.failure else answer

    def _give_up(self) -> None:
        trace = getattr(self, "torch_profiler", None)
        if trace is not None:
            trace.stop()
        self.__post_init__()


def _failed(message: str) -> ProfileReqOutput:
    return ProfileReqOutput(success=False, message=message)


class _Trace:
    """Writes a torch profiler's trace, which may fail. The ranks of a replica wait for each other afterwards, so none
    may leave in between."""

    def __init__(self, profiler: Any) -> None:
        self._profiler = profiler
        self.failure = ""

    def stop(self) -> None:
        self._attempt(self._profiler.stop)

    def export_chrome_trace(self, path: str) -> None:
        self._attempt(self._profiler.export_chrome_trace, path)

    def _attempt(self, step: Any, *args: Any) -> None:
        try:
            step(*args)
        except Exception as error:
            logger.exception("KunServe: a profile cannot be written")
            self.failure = self.failure or f"the profile cannot be written: {type(error).__name__}: {error}"
