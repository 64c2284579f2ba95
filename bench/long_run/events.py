"""What happens to a server in a soak: transitions, resizes, deaths and stalls, chosen by chance from a seed."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from random import Random
from typing import Any

import requests

from long_run.disturbances import Disturbance, Schedulers
from long_run.event_kinds import KINDS, LULL, Kind
from long_run.exchanges import (
    Course,
    Progress,
    contradictions,
    progress_of,
    unreturned,
    wait_for_end,
    wait_for_progress,
)
from long_run.watch import NORMAL, status_of, wait_normal
from servers.server import ServerError, ServerProcess

Json = dict[str, Any]

_CALL_DEADLINE_S = 300.0
_NORMAL_DEADLINE_S = 120.0
_CHECK_DEADLINE_S = 60.0
_EXCHANGE_DEADLINE_S = 120.0
_POLL_S = 0.05
# When a process is killed or stopped in a transition: so long after the order, at most. Most transitions of a tiny
# model under load end within that.
_MOST_DELAY_S = 0.5
_CONFLICT = requests.codes.conflict
_TAKES_PART = (NORMAL, "lending", "merged")
# How often the next thing happens while those that were killed are still being started.
_GOES_ON = 0.5


@dataclass(frozen=True)
class Event:
    """What has happened. `answers` are the HTTP statuses of its orders with what was said; `whole_s` are the seconds
    until every replica took part again, from its beginning; None where none was gone, or that was not waited for.
    `may_be_refused` says that what else went on may have been in the way of its orders. `exchange` is of servers that
    exchange KV."""

    number: int
    kind: str
    what: str
    seconds: float
    answers: tuple[tuple[int, str], ...] = ()
    whole_s: float | None = None
    check_s: float = 0.0
    differences: tuple[str, ...] = field(default=())
    may_be_refused: bool = False
    exchange: Course | None = None

    @property
    def is_disturbed(self) -> bool:
        """Whether a process was killed or stopped meanwhile, so that an order may fail."""
        return KINDS[self.kind].disturbance is not Disturbance.NONE


@dataclass(frozen=True)
class _Begun:
    """An exchange that an event comes upon: what was ordered for it, what was answered, how far KV was before that and
    is then, and what is wrong."""

    what: str
    answers: tuple[tuple[int, str], ...]
    before: Progress
    met: Progress
    wrong: list[str]


class Events:
    """Makes things happen to one server, one after the other."""

    def __init__(
        self,
        server: ServerProcess,
        seed: str,
        kinds: Sequence[str],
        schedulers: Schedulers,
        *,
        whole_deadline_s: float,
        quiet: Callable[[], AbstractContextManager[None]] | None = None,
        exchanges: bool = False,
    ) -> None:
        """`kinds` are of `KINDS`; `whole_deadline_s` is for the replicas to be there again. `quiet` is for servers in
        automatic mode, and keeps clients from asking. `exchanges` says that KV moves after every drop."""
        self._kinds = kinds
        self._server = server
        self._schedulers = schedulers
        self._seed = seed
        self._whole_deadline_s = whole_deadline_s
        self._quiet = quiet
        self._exchanges = exchanges
        self._resized: dict[int, int] = {}  # frames that a replica was given, and has

    @property
    def is_automatic(self) -> bool:
        """Whether the server orders transitions itself, which may be in the way of ours."""
        return self._quiet is not None

    def next(self, number: int) -> Event:
        """Lets the next thing happen, waits for its end, and lets the server check itself. Each has its chances of its
        own, so that how one ended changes as little of the next as possible.

        Raises:
            ServerError: the server does not come to an end with it.
        """
        chance = Random(f"{self._seed} event {number}")
        kinds = {name: KINDS[name].weight for name in self._kinds if self._is_possible(KINDS[name])}
        if not kinds:
            self.wait_settled(whole=True)
            kinds = {name: KINDS[name].weight for name in self._kinds if self._is_possible(KINDS[name])}
        if not kinds:
            raise ServerError(f"of {', '.join(self._kinds)} nothing can happen now")
        name = chance.choices(list(kinds), list(kinds.values()))[0]
        kind = KINDS[name]
        begun = self._begin_exchange(kind, chance) if kind.in_exchange else None
        before = self._progress() if begun is None else begun.before
        began_s = time.monotonic()
        what, answers = self._lull() if kind.order == LULL else self._happen(kind, chance)
        seconds = time.monotonic() - began_s
        whole_s = None
        if kind.disturbance is not Disturbance.NONE:
            is_whole = chance.random() >= _GOES_ON
            self.wait_settled(whole=is_whole)
            whole_s = time.monotonic() - began_s if is_whole else None
        course, wrong = None, []
        if before is not None:
            status, wrong = wait_for_end(self._status, _EXCHANGE_DEADLINE_S)
            course = Course(before, progress_of(status), None if begun is None else begun.met)
            if begun is not None:
                what, answers = "; ".join(filter(None, (begun.what, what))), (*begun.answers, *answers)
                wrong += begun.wrong
                if kind.disturbance is Disturbance.NONE and not self.is_automatic:
                    wrong += unreturned(course)
        check_began_s = time.monotonic()
        differences = (*wrong, *self.check())
        check_s = time.monotonic() - check_began_s
        return Event(
            *(number, name, what, seconds, answers, whole_s, check_s, differences),
            may_be_refused=self.is_automatic or (kind.in_exchange and kind.order == "resize"),
            exchange=course,
        )

    def _status(self) -> Json:
        return status_of(self._server.base_url)

    def _progress(self) -> Progress | None:
        return progress_of(self._status()) if self._exchanges else None

    def _begin_exchange(self, kind: Kind, chance: Random) -> _Begun:
        """Takes merged groups apart and merges some anew, and waits for a moment of the exchange that follows."""
        self.wait_settled(whole=True)
        answers = [self._post("restore", {})] if self._groups(merged=True) else []
        before = progress_of(self._status())
        # A part, or a pair of several, leaves something for a second drop, and somebody whose KV cache can be resized.
        leaves_some = "drop" in kind.order or kind.order == "resize"
        order = self._order(
            "partial drop" if leaves_some and chance.random() < 0.5 else "drop", chance, pairs=leaves_some
        )
        if order is None:
            raise ServerError("replicas take part by themselves, and cannot be merged")
        answers.append(self._post(*order))
        failed = [
            f"answered {status} {text}" for status, text in answers if status not in (requests.codes.ok, _CONFLICT)
        ]
        status = wait_for_progress(self._status, before, chance.random(), _EXCHANGE_DEADLINE_S)
        what = f"{order[0]} {order[1]}"
        return _Begun(what, tuple(answers), before, progress_of(status), failed + contradictions(status))

    def _happen(self, kind: Kind, chance: Random) -> tuple[str, tuple[tuple[int, str], ...]]:
        """Orders and disturbs; what was done, and the answers."""
        what = []
        with ThreadPoolExecutor(1) as threads:
            order: Future[tuple[int, str]] | None = None
            path, body = "", {}
            wanted = self._order(kind.order, chance, again=kind.in_exchange) if kind.order else None
            if wanted is not None:
                path, body = wanted
                what.append(f"{path} {body}")
                order = threads.submit(self._post, path, body)
            elif kind.order:
                what.append(f"{kind.order} is not possible any more")
            if kind.disturbance is not Disturbance.NONE:
                is_over = (lambda: True) if order is None else order.done
                if order is not None:
                    _pause_unless(is_over, chance.uniform(0, _MOST_DELAY_S))
                done, ended = self._schedulers.disturb(kind.disturbance, chance, is_over)
                what.append(done)
                for replica in ended:
                    self._resized.pop(replica, None)
            if order is None:
                return "; ".join(what), ()
            answer = order.result()
        if path == "kv" and answer[0] == requests.codes.ok:
            self._resized[body["replica"]] = self._resized.get(body["replica"], 0) + body["frames"]
        return "; ".join(what), (answer,)

    def _lull(self) -> tuple[str, tuple[tuple[int, str], ...]]:
        """Nobody asks until all is restored."""
        assert self._quiet is not None
        before = status_of(self._server.base_url)
        with self._quiet():
            epoch = wait_normal(self._server.base_url, _NORMAL_DEADLINE_S)
        return f"nobody asked, {before['state']} at epoch {before['epoch']} became {NORMAL} at {epoch}", ()

    def rest(self) -> list[tuple[int, str]]:
        """Takes all merged groups apart and all resizes back; the answers.

        Raises:
            ServerError: not all replicas take part in time.
        """
        self.wait_settled(whole=True)
        answers = []
        if self.is_automatic:
            wait_normal(self._server.base_url, _NORMAL_DEADLINE_S)
        elif self._groups(merged=True):
            answers.append(self._post("restore", {}))
        for replica, frames in sorted(self._resized.items()):
            if frames:
                answers.append(self._post("kv", {"replica": replica, "frames": -frames}))
        self._resized.clear()
        return answers

    def check(self) -> tuple[str, ...]:
        """Lets the server check itself; what differs, in words. It is asked again where a transition that nobody
        has ordered was in the way."""
        ends_s = time.monotonic() + _CHECK_DEADLINE_S
        while True:
            status, text = self._post("check", {})
            if status != _CONFLICT or not (self.is_automatic or self._exchanges) or time.monotonic() > ends_s:
                break
            time.sleep(_POLL_S)
        if status != requests.codes.ok:
            return (f"/kunserve/check: {status} {text}",)
        body = self._answer
        return () if body["ok"] else tuple(_differences(body))

    def wait_settled(self, *, whole: bool) -> None:
        """Until no transition or recovery runs and every replica takes part, or, unless they have to be `whole`, is
        being started again.

        Raises:
            ServerError: that is not so within the deadline.
        """
        accepted = {*_TAKES_PART} if whole else {*_TAKES_PART, "restarting"}
        ends_s, last = time.monotonic() + self._whole_deadline_s, "no status"
        while time.monotonic() < ends_s:
            if not self._server.running:
                raise ServerError(f"the server has ended:\n{self._server.log_tail()}")
            try:
                status = status_of(self._server.base_url)
                states = [(each["id"], each["state"], each["lost"], each["reason"]) for each in status["replicas"]]
                is_there = all("slots" in each for each in status["replicas"] if each["state"] != "restarting")
                if status["transition"] is None and is_there and {each[1] for each in states} <= accepted:
                    return
                last = str(states)
            except requests.RequestException as error:
                last = str(error)
            time.sleep(_POLL_S)
        raise ServerError(f"after {self._whole_deadline_s:g} s not all replicas take part: {last}"[:1000])

    def _is_possible(self, kind: Kind) -> bool:
        if (kind.automatic and not self.is_automatic) or (
            kind.in_exchange and (self.is_automatic or not self._exchanges)
        ):
            return False
        if kind.in_exchange:
            return True  # it takes groups apart, and merges some
        if kind.order == "partial restore":
            return bool(self._pipelines())
        if "restore" in kind.order:
            return bool(self._groups(merged=True))
        if kind.order == "lend":
            return bool(self._loans())
        if kind.order == "resize":
            return bool(self._groups(merged=False))
        if kind.order == "drop of layers":
            return len(self._groups(merged=False)) > 1
        return "drop" not in kind.order or len(self._groups()) > 1

    def _groups(self, merged: bool | None = None) -> list[list[int]]:
        """Groups of replicas that take part, those by themselves too."""
        members = [each for each in status_of(self._server.base_url)["replicas"] if each["state"] in _TAKES_PART]
        groups = sorted({tuple(each["group"]) for each in members})
        return [list(group) for group in groups if merged is None or (len(group) > 1) == merged]

    def _pipelines(self) -> list[list[int]]:
        """Groups whose replicas have dropped something."""
        replicas = {each["id"]: each["state"] for each in status_of(self._server.base_url)["replicas"]}
        return [group for group in self._groups(merged=True) if replicas[group[0]] == "merged"]

    def _loans(self) -> list[Json]:
        """What replicas can lend each other now, by the frames that are free."""
        members = [
            each for each in status_of(self._server.base_url)["replicas"] if each["state"] in (NORMAL, "lending")
        ]
        most = {each["id"]: each["frames"]["free"] // each["frames"]["per_granule"] for each in members}
        slots = {each["id"]: each["slots"]["per_granule"] for each in members}
        return [
            {"from": lender, "to": borrower, "tokens": granules * slots[lender]}
            for lender, granules in most.items()
            for borrower in most
            if granules and lender != borrower
        ]

    def _order(
        self, action: str, chance: Random, *, pairs: bool = False, again: bool = False
    ) -> tuple[str, Json] | None:
        """The route and the body of an order; None where the server has made it impossible meanwhile. A drop is of two
        groups if it is of `pairs`; `again` is for one of a merged group, and for a resize of its members, where nobody
        else is there."""
        body: Json
        if action == "lend":
            loans = self._loans()
            if not loans:
                return None
            body = chance.choice(loans)
            return "lend", {**body, "tokens": chance.randrange(1, body["tokens"] + 1)}
        if "restore" in action:
            groups = self._pipelines() if action == "partial restore" else self._groups(merged=True)
            some = action == "partial restore" or chance.random() < 0.5
            body = {"groups": [chance.choice(groups)]} if groups and some else {}
            if action == "partial restore":
                body["tokens"] = chance.randrange(1, 1500)
            elif action == "forced restore":
                body["force"] = True
            return "restore", body
        if action == "resize":
            groups = self._groups(merged=False) or (self._groups() if again else [])
            if not groups:
                return None
            replica = chance.choice(groups)[0]
            return "kv", {
                "replica": replica,
                "frames": -self._resized.get(replica, 0) or chance.choice((-8, 8, 16)),
            }
        groups = self._groups(merged=False) if action == "drop of layers" else self._groups()
        if len(groups) < (1 if again else 2):
            return None
        most = 2 if pairs else len(groups)
        chosen = chance.sample(groups, chance.randrange(min(2, most), most + 1))
        members = sorted(member for group in chosen for member in group)
        body = {"groups": [members]}
        if action == "partial drop":
            body["tokens"] = chance.randrange(64, 400)
        elif action == "drop of layers":
            body["layers"] = self._layer_hosts(members, chance)
        return "drop", body

    def _layer_hosts(self, members: Sequence[int], chance: Random) -> Json:
        """Some of the members have runs of layers with others; nobody else drops anything."""
        layers = len(status_of(self._server.base_url)["hosts"][0])
        layer_hosts: Json = {}
        for owner in members[1:]:  # the first one keeps all
            hosts = [owner] * layers
            first = chance.randrange(layers)
            for layer in range(first, chance.randrange(first + 1, layers + 1)):
                hosts[layer] = members[0]
            layer_hosts[str(owner)] = hosts
        return layer_hosts

    def _post(self, path: str, body: Json) -> tuple[int, str]:
        try:
            answer = requests.post(f"{self._server.base_url}/kunserve/{path}", json=body, timeout=_CALL_DEADLINE_S)
        except requests.RequestException as error:
            return 0, f"{type(error).__name__}: {error}"[:300]
        if answer.status_code == requests.codes.ok:
            self._answer: Json = answer.json()
            return answer.status_code, ""
        return answer.status_code, answer.text[:300]


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
