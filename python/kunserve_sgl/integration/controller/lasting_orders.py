"""What clients have asked of all replicas and holds until it is asked again, for a replica that comes later."""

from __future__ import annotations

from typing import Any

from sglang.srt.managers.io_struct import (
    ConfigureLoggingReq,
    ContinueGenerationReqInput,
    PauseGenerationReqInput,
    SetInternalStateReq,
    SlowDownReqInput,
    UpdateWeightFromDiskReqInput,
)


class LastingOrders:
    """Keeps the last of each. Their answers, of a replica that comes later, are dropped in the HTTP server, because
    nobody waits for them there."""

    def __init__(self) -> None:
        self._pause: Any = None
        self._slow_down: Any = None
        self._state: dict[str, int | float] = {}
        self._weights: Any = None
        self._log_level: Any = None

    def note(self, order: Any) -> None:
        """Takes note of what is sent to all replicas, whatever it is."""
        if isinstance(order, PauseGenerationReqInput):
            self._pause = order
        elif isinstance(order, ContinueGenerationReqInput):
            self._pause = None
        elif isinstance(order, SlowDownReqInput):
            self._slow_down = order
        elif isinstance(order, SetInternalStateReq):
            self._state.update(order.server_args)
        elif isinstance(order, ConfigureLoggingReq):
            self._log_level = order
        elif isinstance(order, UpdateWeightFromDiskReqInput):
            self._weights = order

    @property
    def model(self) -> dict[str, Any]:
        """Says where all replicas were told to load parameters from last, as server arguments; nothing where nobody
        said so. The order may have failed."""
        weights = self._weights
        return {} if weights is None else {"model_path": weights.model_path, "load_format": weights.load_format}

    def orders(self) -> list[Any]:
        """Returns what a replica has to be told before its first request."""
        state = SetInternalStateReq(server_args=dict(self._state)) if self._state else None
        return [each for each in (self._log_level, state, self._slow_down, self._pause) if each is not None]
