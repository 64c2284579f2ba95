"""A client of one server for the tests: every call has a deadline, every stream is read event by event."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import requests

CALL_DEADLINE_S = 600.0
# For `Endpoint.slowed`, one after the other: what comes while the HTTP process stands still is one event of a stream.
SLOWER_STEPS_S = (None, 0.1, 0.3, 1.0)
_POLL_S = 0.1
_METRIC = re.compile(r"^(sglang:\w+)(\{.*\})? (\S+)$", re.MULTILINE)

Json = dict[str, Any]


class StreamError(AssertionError):
    """A stream did not come as server-sent events that end with [DONE], or not in time."""


@dataclass(frozen=True)
class Endpoint:
    """One server by its URL, and the key to send with calls, if any."""

    base_url: str
    key: str | None = None

    def get(self, path: str) -> requests.Response:
        return requests.get(self.base_url + path, headers=self._headers, timeout=CALL_DEADLINE_S)

    def ask_for(self, path: str) -> Any:
        """The JSON answer to a GET that must succeed."""
        answer = self.get(path)
        assert answer.status_code == requests.codes.ok, f"{path}: {answer.status_code} {answer.text[:500]}"
        return answer.json()

    def post(self, path: str, body: Mapping[str, Any] | None = None) -> requests.Response:
        return requests.post(self.base_url + path, json=body, headers=self._headers, timeout=CALL_DEADLINE_S)

    def post_raw(self, path: str, data: bytes) -> requests.Response:
        """POST `data` as it is, announced as JSON."""
        headers = {"Content-Type": "application/json"}
        return requests.post(self.base_url + path, data=data, headers=headers, timeout=CALL_DEADLINE_S)

    def ask(self, path: str, body: Mapping[str, Any]) -> Any:
        """The JSON answer to a POST that must succeed."""
        answer = self.post(path, body)
        assert answer.status_code == requests.codes.ok, f"{path}: {answer.status_code} {answer.text[:500]}"
        return answer.json()

    def events(self, path: str, body: Mapping[str, Any]) -> Generator[Json, None, None]:
        """The events of a streamed answer as they come in; closing the iterator closes the connection.

        Raises:
            StreamError: something else came, or nothing more, or it took too long.
        """
        ends_at_s = time.monotonic() + CALL_DEADLINE_S
        with requests.post(
            self.base_url + path, json={**body, "stream": True}, timeout=CALL_DEADLINE_S, stream=True
        ) as answer:
            if answer.status_code != requests.codes.ok:
                raise StreamError(f"{path}: {answer.status_code} {answer.text[:500]}")
            for line in answer.iter_lines():
                if time.monotonic() > ends_at_s:
                    raise StreamError(f"{path}: not finished after {CALL_DEADLINE_S:g} s")
                if not line:
                    continue
                if not line.startswith(b"data: "):
                    raise StreamError(f"{path}: {line[:200]!r} is no event")
                if line == b"data: [DONE]":
                    return
                yield json.loads(line[len(b"data: ") :])
        raise StreamError(f"{path}: the stream ended without [DONE]")

    @contextmanager
    def slowed(self, batch_s: float | None) -> Iterator[None]:
        """Every batch takes so many seconds more: what is to run meanwhile does, however busy the machine is. With None
        none does."""
        self.ask_to_slow_down(batch_s)
        try:
            yield
        finally:
            self.ask_to_slow_down(None)

    def ask_to_slow_down(self, batch_s: float | None) -> None:
        """Lets every batch take so many seconds more from now on, None for as fast as it can be."""
        answer = self.post("/slow_down", {"forward_sleep_time": -1 if batch_s is None else batch_s})
        assert answer.status_code == requests.codes.ok, f"/slow_down: {answer.status_code} {answer.text[:500]}"

    def flush_cache(self) -> None:
        """Empty the radix cache of all replicas; waits until they are idle."""
        answer = self.post("/flush_cache?timeout=300")
        assert answer.status_code == requests.codes.ok, f"/flush_cache: {answer.status_code} {answer.text[:500]}"

    @property
    def _headers(self) -> dict[str, str]:
        return {} if self.key is None else {"Authorization": f"Bearer {self.key}"}

    def metrics(self) -> dict[str, float]:
        """SGLang's metrics, each summed over its labels."""
        totals: dict[str, float] = {}
        for name, _, value in _METRIC.findall(self.get("/metrics").text):
            totals[name] = totals.get(name, 0.0) + float(value)
        return totals

    def requests_inside(self) -> int:
        """Requests that the replicas run or have queued."""
        loads = self.get("/v1/loads").json()["loads"]
        return sum(load["num_running_reqs"] + load["num_waiting_reqs"] for load in loads)

    def wait_for_requests_inside(self, condition: Callable[[int], bool], what: str) -> None:
        """Wait until `condition` holds for the number of requests inside; `what` says it in the failure."""
        ends_at_s = time.monotonic() + CALL_DEADLINE_S
        while not condition(count := self.requests_inside()):
            assert time.monotonic() < ends_at_s, f"{count} requests inside after {CALL_DEADLINE_S:g} s, not {what}"
            time.sleep(_POLL_S)


def at_once(calls: Sequence[Callable[[], Any]]) -> list[Any]:
    """What `calls` return when they are all made at the same time, in their order."""
    with ThreadPoolExecutor(max_workers=len(calls)) as threads:
        return [future.result() for future in [threads.submit(call) for call in calls]]
