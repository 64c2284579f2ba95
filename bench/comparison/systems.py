"""The systems of the burst comparison: how each is started, and one of them measured from start to stop."""

from __future__ import annotations

import contextlib
import enum
import re
import shlex
import time
from argparse import Namespace
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import psutil
import requests

from comparison.report import CEILING, OUR_CEILING, STOCK, SystemRun
from comparison.watch import ServerWatch
from servers.command import KUNSERVE_SERVER, STOCK_SERVER, launch_command
from servers.progress import WaitProgress
from servers.server import HOST, ServerError, ServerProcess, find_free_port
from workload.play import parse_client_options, replay
from workload.traces import Trace

OURS = "ours"
_UNLOADED_OUTPUT_TOKENS = 32
_CALL_TIMEOUT_S = 300.0
_POLL_S = 0.1
_RETRACTED = re.compile(r"#retracted_reqs: (\d+)")


class Kind(enum.Enum):
    """What can be compared."""

    STOCK = "stock"
    HICACHE = "hicache"
    OFF = "off"
    MANUAL = "manual"
    AUTO = "auto"
    STILL = "still"
    CEILING = "ceiling"
    OUR_CEILING = OUR_CEILING


CEILINGS = (Kind.CEILING, Kind.OUR_CEILING)


@dataclass(frozen=True)
class Setup:
    """What all systems have in common. The dtype is among `server_flags`; `our_flags` are for KunServe's only.
    `show_progress` is for the start of servers and the replay of the trace, on stderr."""

    model: Path
    model_name: str
    replicas: int
    tokens: int
    context_tokens: int
    seed: int
    server_flags: tuple[str, ...]
    poll_s: float
    start_deadline_s: float
    request_timeout_s: float
    settle_s: float
    unloaded_requests: int
    log_dir: Path
    orders: tuple[tuple[float, str], ...] = ()
    show_progress: bool = False
    our_flags: tuple[str, ...] = ()
    environment: tuple[tuple[str, str], ...] = ()

    @property
    def server_environment(self) -> dict[str, str]:
        """What servers get beside this process's environment."""
        return {"OMP_NUM_THREADS": "1", **dict(self.environment)}


@dataclass(frozen=True)
class System:
    """One server to measure. `tokens` are the KV slots of each replica at start."""

    name: str
    kind: Kind
    tokens: int
    load_balance_method: str | None = None

    @property
    def attached(self) -> bool:
        """Whether it has the routes of KunServe."""
        return self.kind in (Kind.MANUAL, Kind.AUTO, Kind.STILL, Kind.OUR_CEILING)

    @property
    def role(self) -> str:
        """`stock`, `ceiling`, `our-ceiling` or `ours`. Stock with HiCache is no candidate for the best stock system: it
        has memory of the host in addition."""
        roles = {
            **{Kind.STOCK: STOCK, Kind.HICACHE: "hicache"},
            **{Kind.CEILING: CEILING, Kind.OUR_CEILING: OUR_CEILING},
        }
        return roles.get(self.kind, OURS)

    def command(self, setup: Setup, port: int) -> list[str]:
        """The server's argument vector."""
        mode = Kind.MANUAL if self.kind in (Kind.STILL, Kind.OUR_CEILING) else self.kind
        is_ours = self.role in (OURS, OUR_CEILING)
        flags = ["--kunserve", mode.value, *setup.our_flags] if is_ours else []
        if self.load_balance_method is not None:
            flags += ["--load-balance-method", self.load_balance_method]
        if self.kind is Kind.HICACHE:
            flags.append("--enable-hierarchical-cache")
        return launch_command(
            *(KUNSERVE_SERVER if is_ours else STOCK_SERVER, setup.model, port),
            *("--dp-size", str(setup.replicas), "--max-total-tokens", str(self.tokens)),
            # Without --sleep-on-idle, stock schedulers without work take the cores from those that have some.
            *("--context-length", str(setup.context_tokens), "--enable-metrics", "--sleep-on-idle"),
            *(*setup.server_flags, *flags),
        )


def systems_of(kinds: Sequence[Kind], methods: Sequence[str], tokens: int) -> list[System]:
    """In order of `kinds`, one stock system and one with HiCache per load balance method; the ceiling is last, because
    its memory is known only when one of ours has run."""
    systems = []
    for kind in dict.fromkeys(kinds):
        if kind is Kind.STOCK:
            systems += [System(f"stock {method}", kind, tokens, method) for method in methods]
        elif kind is Kind.HICACHE:
            systems.append(System("hicache", kind, tokens, methods[0]))
        elif kind not in CEILINGS:
            systems.append(System(kind.value, kind, tokens))
    if Kind.CEILING in kinds:
        # Which method is best is not known before stock has run.
        systems.append(System("ceiling", Kind.CEILING, tokens, methods[-1]))
    if Kind.OUR_CEILING in kinds:
        systems.append(System("our-ceiling", Kind.OUR_CEILING, tokens))
    return systems


def gained_tokens(base_url: str, replicas: int) -> list[int]:
    """What a drop of all that can be dropped would gain on each replica, as the server's planner says.

    Raises:
        ServerError: it made no plan.
    """
    # A server is healthy a moment before its replicas have told the coordinator of themselves.
    ends_at_s = time.monotonic() + _CALL_TIMEOUT_S
    while not _get(base_url, "/kunserve/status").json()["hosts"]:
        if time.monotonic() > ends_at_s:
            raise ServerError(f"replicas have not reported to the coordinator within {_CALL_TIMEOUT_S:g} s")
        time.sleep(_POLL_S)
    answer = requests.post(
        f"{base_url}/kunserve/plan", json={"groups": [list(range(replicas))]}, timeout=_CALL_TIMEOUT_S
    )
    if answer.status_code != requests.codes.ok:
        raise ServerError(f"POST /kunserve/plan: {answer.status_code} {answer.text[:300]}")
    gained: list[int] = answer.json()["cost"]["gained_tokens_of"]
    return gained


def ceiling_tokens(setup: Setup, gained: Sequence[int]) -> int:
    """KV slots of each replica of the ceiling: what it has, and the most that a drop would add to one."""
    return setup.tokens + max(gained)


def unloaded_trace(trace: Trace, count: int) -> Trace:
    """`count` requests of the trace, spread over their lengths, to be sent one after the other; short answers suffice
    for the time per token."""
    by_length = sorted(trace.requests, key=lambda request: request.prompt_tokens)
    chosen = [by_length[(2 * place + 1) * len(by_length) // (2 * count)] for place in range(min(count, len(by_length)))]
    shortened = tuple(
        replace(request, arrival_s=0.0, output_tokens=min(request.output_tokens, _UNLOADED_OUTPUT_TOKENS))
        for request in chosen
    )
    return replace(trace, requests=shortened, notes=())


def measure(system: System, setup: Setup, trace: Trace, *, on_ready: Callable[[str], None] | None = None) -> SystemRun:
    """Start the system, measure it unloaded and under `trace`, and stop it. What keeps a system from being measured
    is in the result. `on_ready` gets the address of the idle server."""
    # Imported late: it takes seconds, and a wrong option should be refused at once.
    from workload.client import ReplayError

    port = find_free_port()
    command = system.command(setup, port)
    run = SystemRun(system.name, system.role, shlex.join(command))
    log_path = setup.log_dir / f"{system.name.replace(' ', '-')}.log"
    log_path.unlink(missing_ok=True)
    with ServerProcess(command, port=port, env=setup.server_environment, log_path=log_path) as server:
        try:
            with _waiting(setup, f"{system.name} starting") as on_wait:
                run.start_s = server.wait_healthy(setup.start_deadline_s, on_wait=on_wait)
        except ServerError:
            run.problem = f"the server did not start: {_why_ended(log_path)} ({log_path})"
            return run
        run.attention_backend = _attention_backend(server.base_url)
        if on_ready is not None:
            on_ready(server.base_url)
        try:
            _load(system, setup, trace, server, run)
        except (ReplayError, ServerError, requests.RequestException, SystemExit) as error:
            run.problem = f"{type(error).__name__}: {error}; {_why_ended(log_path)} ({log_path})"
        else:
            if not server.running:
                run.problem = f"the server ended: {_why_ended(log_path)} ({log_path})"
    run.retractions = sum(map(int, _RETRACTED.findall(log_path.read_text(errors="replace"))))
    return run


def probe(setup: Setup, ask: Callable[[str], None]) -> None:
    """Start our server, hand its address to `ask`, and stop it.

    Raises:
        ServerError: it did not start, or `ask` failed.
    """
    port = find_free_port()
    command = System("probe", Kind.MANUAL, setup.tokens).command(setup, port)
    with ServerProcess(command, port=port, env=setup.server_environment) as server:
        with _waiting(setup, "probe starting") as on_wait:
            server.wait_healthy(setup.start_deadline_s, on_wait=on_wait)
        ask(server.base_url)


def _waiting(setup: Setup, what: str) -> AbstractContextManager[Callable[[float], None] | None]:
    return WaitProgress(what) if setup.show_progress else contextlib.nullcontext()


def _load(system: System, setup: Setup, trace: Trace, server: ServerProcess, run: SystemRun) -> None:
    options = ["--host", HOST, "--port", str(server.port), "--model", str(setup.model), "--seed", str(setup.seed)]

    def client_args(**changes: int | bool) -> Namespace:
        args = parse_client_options([*options, "--warmup-requests", str(2 * setup.replicas)])
        for name, value in {"disable_tqdm": True, **changes}.items():
            setattr(args, name, value)
        return args

    timeout_s = setup.request_timeout_s
    at_start = _memory_and_plan(server.base_url) if system.attached else None
    # The replay sets no limit, as that would delay arrivals; here all wait for the one before.
    alone = unloaded_trace(trace, setup.unloaded_requests)
    run.unloaded = replay(alone, client_args(max_concurrency=1), request_timeout_s=timeout_s)
    if all(result.failed for result in run.unloaded):
        raise ServerError(f"no request was answered while the server had no other: {run.unloaded[0].error[:300]}")
    # Several requests of the warm-up at once can be a reason to drop, or to free frames that can be lent.
    if system.attached and (now := settled(server.base_url, at_start, setup.settle_s)) != at_start:
        raise ServerError(f"{setup.settle_s:g} s after the unloaded requests {now} is not as at start: {at_start}")
    orders = setup.orders if system.kind is Kind.MANUAL else ()
    watch = ServerWatch(
        server.base_url,
        attached=system.attached,
        interval_s=setup.poll_s,
        orders=orders,
        group=range(setup.replicas),
    )
    with watch:
        cpu_before_s, started_at_s = _controller_cpu_s(server), time.monotonic()
        # Warm already, and a warm-up could make a server drop before the first arrival.
        args = client_args(disable_tqdm=not setup.show_progress, warmup_requests=0)
        run.results = replay(trace, args, request_timeout_s=timeout_s, on_start=watch.begin)
        if cpu_before_s is not None and (cpu_after_s := _controller_cpu_s(server)) is not None:
            run.controller_cpu_share = (cpu_after_s - cpu_before_s) / (time.monotonic() - started_at_s)
        dropped = [order for order in watch.orders if order.status == requests.codes.ok]
        if dropped and dropped[-1].command == "drop":
            watch.order("restore")
        if system.attached:
            run.normal_after_s = watch.wait_normal(setup.settle_s)
    if run.normal_after_s is not None:
        # Frames that were freed to be lent stay so for as long as a merge would, with all replicas normal.
        at_end = settled(server.base_url, at_start, setup.settle_s - run.normal_after_s)
        run.as_at_start = at_end == at_start
        run.capacity_after_tokens = tuple(capacity for _, _, capacity in at_end[-1])
        args = client_args(max_concurrency=1, warmup_requests=0)
        run.unloaded_after = replay(alone, args, request_timeout_s=timeout_s)
    run.samples, run.orders, run.missed_samples = watch.samples, watch.orders, watch.missed
    run.capacity_tokens = watch.samples[0].capacity_tokens if watch.samples else ()
    run.metrics = _kunserve_metrics(server.base_url) if system.attached else ()


def _controller_cpu_s(server: ServerProcess) -> float | None:
    """CPU time of the data-parallel controller so far; stock's polls without a pause, which on few cores takes time
    from the replicas. None if there is no such process (any more)."""
    for pid in server.pids():
        with contextlib.suppress(psutil.NoSuchProcess):
            process = psutil.Process(pid)
            if (process.cmdline() or [""])[0].startswith("sglang::data_parallel_controller"):
                times = process.cpu_times()
                return float(times.user + times.system)
    return None


def _memory_and_plan(base_url: str) -> tuple[Any, ...]:
    """What of the status must be the same again after a restore."""
    status = _get(base_url, "/kunserve/status").json()
    members = [(each["state"], each["frames"], each["capacity_tokens"]) for each in status["replicas"]]
    return status["state"], status["hosts"], status["homes"], members


def settled(base_url: str, at_start: tuple[Any, ...] | None, deadline_s: float) -> tuple[Any, ...]:
    """Returns memory and plan once they are as at start, or what they are at the deadline."""
    ends_at_s = time.monotonic() + deadline_s
    while (now := _memory_and_plan(base_url)) != at_start and time.monotonic() < ends_at_s:
        time.sleep(_POLL_S)
    return now


def _attention_backend(base_url: str) -> str:
    return str(_get(base_url, "/server_info").json()["attention_backend"])


def _kunserve_metrics(base_url: str) -> tuple[str, ...]:
    lines = _get(base_url, "/metrics").text.splitlines()
    return tuple(line for line in lines if line.startswith("kunserve:"))


def _get(base_url: str, path: str) -> requests.Response:
    answer = requests.get(base_url + path, timeout=_CALL_TIMEOUT_S)
    answer.raise_for_status()
    return answer


def _why_ended(log_path: Path) -> str:
    """The line of a log that says best why a server ended: the first exception's, as the others follow from it, else
    the last line."""
    lines = [line.strip() for line in log_path.read_text(errors="replace").splitlines() if line.strip()]
    errors = [line for line in lines if re.match(r"(\[[^\]]*\] )?(\w+\.)*\w*(Error|Exception)\b.*:", line)]
    return [*errors, *lines[-1:], "no output"][0][:300]
