"""SGLang's receiver of requests, which also takes in the coordinator's orders, so that all ranks get them alike."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from sglang.srt.managers.scheduler_components.request_receiver import SchedulerRequestReceiver


@dataclasses.dataclass(kw_only=True, slots=True, frozen=True)
class KunserveRequestReceiver(SchedulerRequestReceiver):  # type: ignore[misc]
    """Receives requests, and at rank 0 of a replica also orders from its inbox, which SGLang then broadcasts with the
    requests."""

    take_orders: Callable[[], list[Any]]

    @classmethod
    def replacing(cls, receiver: Any, take_orders: Callable[[], list[Any]]) -> KunserveRequestReceiver:
        """Makes a receiver with everything that SGLang's `receiver` has. `take_orders` is called at rank 0, each time
        that requests are received."""
        fields = {field.name: getattr(receiver, field.name) for field in dataclasses.fields(receiver)}
        return cls(**fields, take_orders=take_orders)

    def _pull_raw_reqs(self) -> list[Any] | None:
        requests: list[Any] | None = SchedulerRequestReceiver._pull_raw_reqs(self)
        if requests is not None:
            requests.extend(self.take_orders())
        return requests
