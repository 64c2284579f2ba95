"""Streamed requests whose every token is timed, and the control calls of a server: the load of the benchmarks."""

from __future__ import annotations

import http.client
import itertools
import json
import re
import threading
import time
import uuid
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import requests

from servers.server import HOST

Json = dict[str, Any]

DEADLINE_S = 300.0
_POLL_S = 0.02
_TRANSITION = re.compile(
    r"KunServe: transition \d+ of replicas \[[^]]*\] from epoch \d+ to (?P<epoch>\d+) (?P<end>[a-z ]+?)(?: \(.*\))?: "
    r"(?P<phases>.*?); longest pause"
)
_PHASE = re.compile(r"(?P<name>[a-z]+) (?P<ms>[0-9.]+) ms")


class LoadError(RuntimeError):
    """The server did not do what the benchmark needs; the message says what."""


class Stream:
    """One streamed greedy request, received in a thread of its own. Times are `time.perf_counter()` seconds.

    `times_s[i]` is when the token i was received; tokens of one chunk share their time. `token_ids` are those that the
    server says it has generated, `aborted` is why it ended the request where it did so before its time.
    """

    def __init__(self, port: int, prompt: Sequence[int], new_tokens: int, replica: int | None) -> None:
        self.rid = uuid.uuid4().hex
        self.prompt_tokens = len(prompt)
        self.new_tokens = new_tokens
        self.replica = replica
        self.sent_s = 0.0
        self.times_s: list[float] = []
        self.token_ids: list[int] = []
        self.finished = False
        self.error = ""
        self.aborted = ""
        self._changed = threading.Condition()
        self._body: Json = {
            "input_ids": list(prompt),
            "sampling_params": {"temperature": 0, "max_new_tokens": new_tokens, "ignore_eos": True},
            "stream": True,
            "rid": self.rid,
        }
        if replica is not None:
            self._body["routed_dp_rank"] = replica
        self._port = port
        self._thread = threading.Thread(target=self._receive, daemon=True)
        self._thread.start()

    @property
    def tokens(self) -> int:
        """Tokens received so far."""
        return len(self.times_s)

    @property
    def ttft_s(self) -> float:
        """Seconds from sending to the first token."""
        return self.times_s[0] - self.sent_s

    @property
    def tpot_s(self) -> float:
        """Mean seconds per token after the first."""
        return (self.times_s[-1] - self.times_s[0]) / (len(self.times_s) - 1)

    @property
    def gaps(self) -> list[tuple[float, float]]:
        """(begin, end) of the time between each two tokens."""
        return list(itertools.pairwise(self.times_s))

    def wait_sent(self) -> None:
        """Until the request is on its way.

        Raises:
            LoadError: it failed, or the deadline passed.
        """
        self._wait(lambda: self.sent_s > 0, "was not sent")

    def wait_tokens(self, count: int) -> None:
        """Until it has received `count` tokens.

        Raises:
            LoadError: it ended before, it failed, or the deadline passed.
        """
        self._wait(lambda: self.tokens >= count or self.finished, f"did not receive {count} tokens")
        if self.tokens < count:
            raise LoadError(f"request {self.rid} ended after {self.tokens} tokens, and {count} were awaited")

    def wait_end(self) -> None:
        """Until it has ended, aborted or not.

        Raises:
            LoadError: it failed, or the deadline passed.
        """
        self._wait(lambda: self.finished, "did not end")

    def wait_over(self) -> None:
        """Until it has ended, however; `error` and `aborted` say whether that was before its time.

        Raises:
            LoadError: the deadline passed.
        """
        with self._changed:
            if not self._changed.wait_for(lambda: self.finished, DEADLINE_S):
                raise LoadError(f"request {self.rid} did not end within {DEADLINE_S:g} s")

    def _wait(self, condition: Any, what: str) -> None:
        with self._changed:
            done = self._changed.wait_for(lambda: condition() or self.error, DEADLINE_S)
        if self.error:
            raise LoadError(f"request {self.rid} failed: {self.error}")
        if not done:
            raise LoadError(f"request {self.rid} {what} within {DEADLINE_S:g} s")

    def _receive(self) -> None:
        connection = http.client.HTTPConnection(HOST, self._port, timeout=DEADLINE_S)
        try:
            body = json.dumps(self._body)
            sent_s = time.perf_counter()
            connection.request("POST", "/generate", body, {"Content-Type": "application/json"})
            self._note(lambda: setattr(self, "sent_s", sent_s))
            answer = connection.getresponse()
            if answer.status != requests.codes.ok:
                raise LoadError(f"status {answer.status}: {answer.read(300)!r}")
            while line := answer.readline():
                if line.startswith(b"data: {"):
                    self._take(json.loads(line[6:]), time.perf_counter())
        except Exception as error:  # noqa: BLE001 - raised again by whoever waits for the stream
            self._note(lambda error=error: setattr(self, "error", f"{type(error).__name__}: {error}"))
        finally:
            connection.close()
            self._note(lambda: setattr(self, "finished", True))

    def _take(self, message: Json, now_s: float) -> None:
        if "error" in message:
            raise LoadError(str(message["error"]))
        new = message["meta_info"]["completion_tokens"] - self.tokens
        finish = message["meta_info"]["finish_reason"]
        if finish is not None and finish["type"] == "abort":
            self.aborted = str(finish.get("message") or "aborted")
        self.token_ids = message["output_ids"]
        self._note(lambda: self.times_s.extend([now_s] * new))

    def _note(self, change: Any) -> None:
        with self._changed:
            change()
            self._changed.notify_all()


@dataclass(frozen=True)
class Ordered:
    """An answered drop or restore: `time.perf_counter()` seconds of the call, and phases from the server's log."""

    action: str
    ordered_s: float
    answered_s: float
    answer: Json
    phases_ms: Mapping[str, float]

    @property
    def row(self) -> Json:
        """For a line of JSON."""
        names = ("seconds", "pause_seconds", "freed_bytes", "extension_slots")
        return {
            "action": self.action,
            "call_s": self.answered_s - self.ordered_s,
            **{name: self.answer[name] for name in names},
            "phases_ms": dict(self.phases_ms),
        }


class Controls:
    """The control calls of one server of two or more replicas."""

    def __init__(self, port: int, log_path: Path) -> None:
        self._url = f"http://{HOST}:{port}"
        self._log_path = log_path
        self._session = requests.Session()
        self._read_bytes = 0
        self._ended_transitions = 0

    def status(self) -> Json:
        answer = self._session.get(f"{self._url}/kunserve/status", timeout=DEADLINE_S)
        answer.raise_for_status()
        status: Json = answer.json()
        return status

    def capacity_tokens(self) -> int:
        """KV capacity of all replicas."""
        return sum(replica["capacity_tokens"] for replica in self.status()["replicas"])

    def wait_capacity(self, tokens: int) -> None:
        """Until all replicas together have so many slots, each by itself.

        Raises:
            LoadError: the deadline passed.
        """
        self._wait(
            lambda: self.status()["state"] == "normal" and self.capacity_tokens() == tokens,
            f"all replicas have {tokens} slots",
        )

    def wait_ready(self) -> None:
        """Until all replicas have reported to the coordinator."""
        self._wait(lambda: bool(self.status()["hosts"]), "all replicas have reported")

    def wait_idle(self) -> None:
        """Until no request has slots, and none are kept as cached prefixes.

        Raises:
            LoadError: the deadline passed.
        """
        answer = self._session.post(f"{self._url}/flush_cache", params={"timeout": DEADLINE_S}, timeout=2 * DEADLINE_S)
        if answer.status_code != requests.codes.ok:
            raise LoadError(f"the server did not become idle: {answer.text[:300]}")
        self._wait(lambda: all(r["slots"]["used"] == 0 for r in self.status()["replicas"]), "no slots are used")

    def drop(self, body: Mapping[str, Any]) -> Ordered:
        return self._order("drop", body)

    def restore(self) -> Ordered:
        return self._order("restore", {})

    def lend(self, lender: int, borrower: int, tokens: int) -> Ordered:
        """Gives `borrower` so many KV slots in free frames of `lender`, or a few more."""
        return self._order("lend", {"from": lender, "to": borrower, "tokens": tokens})

    def resize(self, replica: int, frames: int) -> None:
        """Gives free frames of a replica to its KV cache, or takes -`frames` from it."""
        self._post("kv", {"replica": replica, "frames": frames})

    def abort(self, streams: Iterable[Stream]) -> None:
        """Ends these requests, and returns when they have ended."""
        streams = list(streams)
        for stream in streams:
            self._session.post(f"{self._url}/abort_request", json={"rid": stream.rid}, timeout=DEADLINE_S)
        for stream in streams:
            stream.wait_end()

    def retractions(self) -> int:
        """How often the server has taken memory back from running requests, by its log."""
        return self._log_path.read_text(encoding="utf-8", errors="replace").count("Retract requests")

    def ended_transitions(self) -> int:
        """How many transitions have ended since the start, by the lines of the server's log. It asks the server for
        nothing."""
        with self._log_path.open("rb") as log:
            log.seek(self._read_bytes)
            new = log.read()
        whole = new[: new.rfind(b"\n") + 1]
        self._read_bytes += len(whole)
        self._ended_transitions += len(_TRANSITION.findall(whole.decode("utf-8", errors="replace")))
        return self._ended_transitions

    def _order(self, action: str, body: Mapping[str, Any]) -> Ordered:
        ordered_s = time.perf_counter()
        fields = self._post(action, body)
        answered_s = time.perf_counter()
        log = self._log_path.read_text(encoding="utf-8", errors="replace")
        return Ordered(action, ordered_s, answered_s, fields, phases_of(log, fields["epoch"]))

    def _post(self, action: str, body: Mapping[str, Any]) -> Json:
        answer = self._session.post(f"{self._url}/kunserve/{action}", json=body, timeout=DEADLINE_S)
        if answer.status_code != requests.codes.ok:
            raise LoadError(f"{action} {json.dumps(body)} was answered {answer.status_code}: {answer.text[:500]}")
        fields: Json = answer.json()
        return fields

    @staticmethod
    def _wait(condition: Any, what: str) -> None:
        ends_s = time.monotonic() + DEADLINE_S
        while not condition():
            if time.monotonic() > ends_s:
                raise LoadError(f"not within {DEADLINE_S:g} s: {what}")
            time.sleep(_POLL_S)


def phases_of(log: str, epoch: int) -> dict[str, float]:
    """Milliseconds of each phase of the transition to the plan of `epoch`, from a server's log.

    Raises:
        LoadError: the log says nothing of a transition to it that succeeded.
    """
    for match in _TRANSITION.finditer(log):
        if int(match["epoch"]) == epoch and match["end"] == "succeeded":
            return {phase["name"]: float(phase["ms"]) for phase in _PHASE.finditer(match["phases"])}
    raise LoadError(f"the log does not say that a transition to epoch {epoch} succeeded")


def table(titles: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Right-aligned columns below their titles; the first one is left-aligned."""
    cells = [[str(cell) for cell in row] for row in (titles, *rows)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(titles))]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if column == 0 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in cells
    )
