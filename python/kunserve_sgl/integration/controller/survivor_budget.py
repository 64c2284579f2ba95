"""The loads by which SGLang's methods pick a replica, without those that have ended or stand still."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from sglang.srt.managers.data_parallel_controller import DPBudget
from typing_extensions import override


class SurvivorBudget(DPBudget):  # type: ignore[misc]
    """Keeps the loads by which upstream picks a replica, without those that have ended or stand still."""

    def __init__(self, dp_size: int) -> None:
        super().__init__(dp_size)
        self._ended: set[int] = set()
        self._stalled: set[int] = set()

    def exclude(self, replica: int) -> None:
        """Leaves out a replica until it is included again."""
        self._ended.add(replica)
        self.total_requests[replica] = self.total_tokens[replica] = float("inf")

    def include(self, replica: int) -> None:
        """Takes a replica in again, which has no load yet."""
        self._ended.discard(replica)
        self.total_requests[replica] = self.total_tokens[replica] = 0
        self.last_timestamp[replica] = -1.0

    def set_stalled(self, stalled: Iterable[int]) -> None:
        """Leaves out these replicas until it is called again."""
        before, self._stalled = self._stalled, set(stalled) - self._ended
        for replica in self._stalled:
            self.total_requests[replica] = self.total_tokens[replica] = float("inf")
        for replica in before - self._stalled - self._ended:
            self.total_requests[replica] = self.total_tokens[replica] = 0
            self.last_timestamp[replica] = -1.0  # its last snapshot counts again

    @override
    def update_budget(self, loads: Iterable[Any]) -> None:
        excluded = self._ended | self._stalled
        super().update_budget([load for load in loads if load.dp_rank not in excluded])
