"""Looks at a server while it is loaded: memory and state over time, and orders that are due at set times."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from dataclasses import replace
from types import TracebackType
from typing import Any

import requests

from comparison.report import Order, Sample

_CALL_TIMEOUT_S = 60.0
_NORMAL = "normal"
_POLL_NORMAL_S = 0.1


class ServerWatch:
    """Samples of one server, taken in a thread from `begin` to the end of the block. The first one is how the server
    was when the block began, and counts as of time 0: a drop may be over before a busy machine gets to the next.

    `/v1/loads` reads what the schedulers publish in shared memory: at every prefill, when idle, and every 15 decode
    steps; asking costs them nothing. `/kunserve/status` is asked where KunServe is attached.

    Args:
        base_url: the server.
        attached: whether it has the routes of KunServe.
        interval_s: time between two samples.
        orders: (seconds after `begin`, "drop" or "restore"), sent by a thread of their own.
        group: the replicas that an order is for.
    """

    def __init__(
        self,
        base_url: str,
        *,
        attached: bool,
        interval_s: float,
        orders: Sequence[tuple[float, str]] = (),
        group: Sequence[int] = (),
    ) -> None:
        self._base_url = base_url
        self._attached = attached
        self._interval_s = interval_s
        self._due = sorted(orders)
        self._group = list(group)
        self._began_at_s = 0.0
        self._begun, self._ended = threading.Event(), threading.Event()
        self._threads = [threading.Thread(target=self._sample, daemon=True)]
        if self._due:
            self._threads.append(threading.Thread(target=self._order, daemon=True))
        self.samples: list[Sample] = []
        self.orders: list[Order] = []
        self.missed = 0

    def __enter__(self) -> ServerWatch:
        before = self._take()
        if before is None:
            self.missed += 1
        else:
            self.samples.append(replace(before, t_s=0.0))
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(
        self, _kind: type[BaseException] | None, _error: BaseException | None, _traceback: TracebackType | None
    ) -> None:
        self._ended.set()
        self._begun.set()
        for thread in self._threads:
            thread.join(2 * _CALL_TIMEOUT_S)

    def begin(self) -> None:
        """Time 0 is now."""
        self._began_at_s = time.perf_counter()
        self._begun.set()

    def order(self, command: str) -> Order:
        """Order a drop or restore now and wait for the answer."""
        t_s = time.perf_counter() - self._began_at_s
        try:
            answer = requests.post(
                f"{self._base_url}/kunserve/{command}", json={"groups": [self._group]}, timeout=_CALL_TIMEOUT_S
            )
            body = answer.json()
            status, message = answer.status_code, str(body.get("message", body))
        except (requests.RequestException, ValueError) as error:
            body, status, message = {}, 0, str(error)
        order = Order(
            t_s=t_s,
            command=command,
            status=status,
            message=message,
            seconds=body.get("seconds", 0.0),
            pause_seconds=body.get("pause_seconds", 0.0),
            extension_slots=body.get("extension_slots", 0),
        )
        self.orders.append(order)
        return order

    def wait_normal(self, deadline_s: float) -> float | None:
        """Seconds until no replicas are merged and no transition runs, None if that is not within the deadline."""
        started_at_s = time.perf_counter()
        while (waited_s := time.perf_counter() - started_at_s) < deadline_s:
            sample = self._take()
            if sample is not None and sample.state == _NORMAL:
                self.samples.append(sample)
                return waited_s
            time.sleep(_POLL_NORMAL_S)
        return None

    def _sample(self) -> None:
        self._begun.wait()
        while not self._ended.is_set():
            sample = self._take()
            if sample is None:
                self.missed += 1
            else:
                self.samples.append(sample)
            self._ended.wait(self._interval_s)

    def _order(self) -> None:
        self._begun.wait()
        for due_s, command in self._due:
            if self._ended.wait(max(0.0, self._began_at_s + due_s - time.perf_counter())):
                return
            self.order(command)

    def _take(self) -> Sample | None:
        """None where the server does not answer in time or not with a status."""
        t_s = time.perf_counter() - self._began_at_s
        try:
            loads = self._get("/v1/loads?include=core")["loads"]
            status = self._get("/kunserve/status") if self._attached else {}
        except (requests.RequestException, ValueError):
            return None
        loads.sort(key=lambda load: load["dp_rank"])
        return Sample(
            t_s=t_s,
            capacity_tokens=tuple(load["max_total_num_tokens"] for load in loads),
            used_tokens=tuple(load["num_used_tokens"] for load in loads),
            wanted_tokens=tuple(load["num_total_tokens"] for load in loads),
            state=status.get("state"),
            epoch=status.get("epoch"),
        )

    def _get(self, path: str) -> dict[str, Any]:
        answer = requests.get(self._base_url + path, timeout=_CALL_TIMEOUT_S)
        answer.raise_for_status()
        body: dict[str, Any] = answer.json()
        return body
