"""What happens to a server in a soak: transitions, resizes, deaths and stalls, chosen by chance from a seed."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from random import Random
from typing import Any

import psutil
import requests

from long_run.watch import NORMAL, status_of
from servers.server import ServerError, ServerProcess

Json = dict[str, Any]

_TITLE = "sglang::scheduler"
_CALL_DEADLINE_S = 300.0
_POLL_S = 0.05
# When a process is killed or stopped in a transition: so long after the order, at most. Most transitions of a tiny
# model under load end within that.
_MOST_DELAY_S = 1.5
_KILL, _STALL = "kill", "stall"
# What is ordered, what is done to a process meanwhile, and how often it comes.
KINDS: dict[str, tuple[str, str, int]] = {
    "drop": ("drop", "", 6),
    "partial drop": ("partial drop", "", 3),
    "restore": ("restore", "", 6),
    "resize": ("resize", "", 2),
    "kill": ("", _KILL, 4),
    "stall": ("", _STALL, 1),
    "kill in a drop": ("drop", _KILL, 3),
    "kill in a restore": ("restore", _KILL, 3),
    "stall in a drop": ("drop", _STALL, 1),
    "stall in a restore": ("restore", _STALL, 1),
}


@dataclass(frozen=True)
class Event:
    """What has happened. `answers` are the HTTP statuses of its orders with what was said; `whole_s` are the seconds
    until every replica took part again, from its beginning; None where none was gone."""

    number: int
    kind: str
    what: str
    seconds: float
    answers: tuple[tuple[int, str], ...] = ()
    whole_s: float | None = None
    differences: tuple[str, ...] = field(default=())

    @property
    def is_disturbed(self) -> bool:
        """Whether a process was killed or stopped meanwhile, so that an order may fail."""
        return bool(KINDS[self.kind][1])


class Events:
    """Makes things happen to one server, in manual mode, one after the other."""

    def __init__(
        self,
        server: ServerProcess,
        chance: Random,
        kinds: Sequence[str],
        *,
        whole_deadline_s: float,
        most_stall_s: float,
    ) -> None:
        """`kinds` are of `KINDS`; `whole_deadline_s` is for the replicas to be there again; a stall ends before
        `most_stall_s`."""
        self._kinds = kinds
        self._server = server
        self._chance = chance
        self._whole_deadline_s = whole_deadline_s
        self._most_stall_s = most_stall_s
        self._resized: dict[int, int] = {}  # frames that a replica was given, and has

    def next(self, number: int) -> Event:
        """Lets the next thing happen, waits for its end, and lets the server check itself.

        Raises:
            ServerError: the server does not come to an end with it.
        """
        kinds = {kind: KINDS[kind][2] for kind in self._kinds if self._is_possible(KINDS[kind][0])}
        if not kinds:
            raise ServerError(f"of {', '.join(self._kinds)} nothing can happen now")
        kind = self._chance.choices(list(kinds), list(kinds.values()))[0]
        action, disturbance, _ = KINDS[kind]
        began_s = time.monotonic()
        with ThreadPoolExecutor(1) as threads:
            order: Future[tuple[int, str]] | None = None
            what = []
            if action:
                path, body = self._order(action)
                what.append(f"{path} {body}")
                order = threads.submit(self._post, path, body)
            if disturbance:
                if order is not None:
                    _pause_unless(order.done, self._chance.uniform(0, _MOST_DELAY_S))
                what.append(self._disturb(disturbance))
            answers = () if order is None else (order.result(),)
        seconds = time.monotonic() - began_s
        whole_s = None
        if disturbance:
            self.wait_whole()
            whole_s = time.monotonic() - began_s
        return Event(number, kind, "; ".join(what), seconds, answers, whole_s, self.check())

    def rest(self) -> list[tuple[int, str]]:
        """Takes all merged groups apart and all resizes back; the answers."""
        answers = [self._post("restore", {})] if self._groups(merged=True) else []
        for replica, frames in sorted(self._resized.items()):
            answers.append(self._post("kv", {"replica": replica, "frames": -frames}))
        self._resized.clear()
        return answers

    def check(self) -> tuple[str, ...]:
        """Lets the server check itself; what differs, in words."""
        status, text = self._post("check", {})
        if status != requests.codes.ok:
            return (f"/kunserve/check: {status} {text}",)
        body = self._answer
        return () if body["ok"] else tuple(_differences(body))

    def wait_whole(self) -> None:
        """Until every replica takes part, and no transition runs.

        Raises:
            ServerError: that is not so within the deadline.
        """
        ends_s, last = time.monotonic() + self._whole_deadline_s, "no status"
        while time.monotonic() < ends_s:
            if not self._server.running:
                raise ServerError(f"the server has ended:\n{self._server.log_tail()}")
            try:
                status = status_of(self._server.base_url)
                states = [(each["id"], each["state"], each["lost"], each["reason"]) for each in status["replicas"]]
                settled = all(state in (NORMAL, "merged") and not lost for _, state, lost, _ in states)
                if settled and status["transition"] is None and all("slots" in each for each in status["replicas"]):
                    return
                last = str(states)
            except requests.RequestException as error:
                last = str(error)
            time.sleep(_POLL_S)
        raise ServerError(f"after {self._whole_deadline_s:g} s not all replicas take part: {last}"[:1000])

    def _is_possible(self, action: str) -> bool:
        if action == "restore":
            return bool(self._groups(merged=True))
        if action == "resize":
            return bool(self._groups(merged=False))
        return "drop" not in action or len(self._groups()) > 1

    def _groups(self, merged: bool | None = None) -> list[list[int]]:
        members = status_of(self._server.base_url)["replicas"]
        groups = sorted({tuple(each["group"]) for each in members})
        return [list(group) for group in groups if merged is None or (len(group) > 1) == merged]

    def _order(self, action: str) -> tuple[str, Json]:
        """The route and the body of an order."""
        chance = self._chance
        if action == "restore":
            groups = self._groups(merged=True)
            return "restore", {} if chance.random() < 0.5 else {"groups": [chance.choice(groups)]}
        if action == "resize":
            replica = chance.choice(self._groups(merged=False))[0]
            frames = -self._resized.pop(replica) if replica in self._resized else chance.choice((8, 16))
            if frames > 0:
                self._resized[replica] = frames
            return "kv", {"replica": replica, "frames": frames}
        groups = self._groups()
        chosen = chance.sample(groups, chance.randrange(2, len(groups) + 1))
        body: Json = {"groups": [sorted(member for group in chosen for member in group)]}
        if action == "partial drop":
            body["tokens"] = chance.randrange(64, 400)
        return "drop", body

    def _post(self, path: str, body: Json) -> tuple[int, str]:
        try:
            answer = requests.post(f"{self._server.base_url}/kunserve/{path}", json=body, timeout=_CALL_DEADLINE_S)
        except requests.RequestException as error:
            return 0, f"{type(error).__name__}: {error}"[:300]
        if answer.status_code == requests.codes.ok:
            self._answer: Json = answer.json()
            return answer.status_code, ""
        return answer.status_code, answer.text[:300]

    def _disturb(self, how: str) -> str:
        """Kills or stops a scheduler; says which."""
        process = self._chance.choice(self._schedulers())
        title = (process.cmdline() or ["?"])[0]
        if how == _KILL:
            replica = int(title.split("_DP")[1].split("_")[0])
            self._resized.pop(replica, None)
            os.kill(process.pid, signal.SIGKILL)
            process.wait(_CALL_DEADLINE_S)
            return f"{title} was killed"
        seconds = self._chance.uniform(0.1, self._most_stall_s)
        os.kill(process.pid, signal.SIGSTOP)
        try:
            threading.Event().wait(seconds)
        finally:
            os.kill(process.pid, signal.SIGCONT)
        return f"{title} stood still for {seconds:.1f} s"

    def _schedulers(self) -> Sequence[psutil.Process]:
        found = []
        for pid in self._server.pids():
            try:
                process = psutil.Process(pid)
                if (process.cmdline() or [""])[0].startswith(_TITLE):
                    found.append(process)
            except psutil.NoSuchProcess:
                continue
        if not found:
            raise ServerError("the server has no scheduler")
        return found


def _differences(body: Json) -> list[str]:
    found = [str(each) for each in body.get("differences", ())]
    for replica in body.get("replicas", ()):
        found += [f"replica {replica.get('replica', replica.get('id'))}: {each}" for each in replica["differences"]]
    return found or [str(body)]


def _pause_unless(done: Callable[[], bool], seconds: float) -> None:
    """Waits so long, or until `done`."""
    ends_s = time.monotonic() + seconds
    while not done() and time.monotonic() < ends_s:
        time.sleep(0.01)
