"""`make demo`: a burst or a recorded trace through two replicas of a tiny model, as they are and with a drop.

The same arrivals are replayed twice through one server. In the second replay parameters are dropped as soon as requests
queue up (or at --drop-at), and restored when all have been answered. Printed are the KV capacity before, merged and
after, and the time to first token of both replays, of the requests that arrived before the drop and after it.
"""

from __future__ import annotations

import argparse
import copy
import json
import signal
import sys
import tempfile
import threading
import time
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType

import requests

from bursts import BurstSpec, LengthDistribution, generate_bursts
from replay import BURST, describe, parse_client_options, replay
from report import Distribution, RequestResult, format_summary, summarise
from server import HOST, ServerError, ServerProcess, find_free_port, remaining
from streams import Controls, LoadError, Ordered, table
from trace_files import read_trace
from traces import ShapeOptions, Trace, TraceError, busiest_window, shape

SEED = 42
START_DEADLINE_S = 300.0
_REQUEST_TIMEOUT_S = 120.0
_PROGRESS_EVERY_S = 10.0


@dataclass(frozen=True)
class DemoModel:
    """The tiny model, and how many tokens one replica of it holds. Sized for two replicas on two cores; as with large
    models, the parameters are several times as large as the KV cache that is left for the requests of a burst."""

    arch: str = "llama"
    layers: int = 4
    hidden: int = 256
    heads: int = 4
    kv_heads: int = 1
    intermediate: int = 2048
    context_tokens: int = 2048
    kv_tokens: int = 2048


MODEL = DemoModel()
# What two replicas of the model get through in the time of a demo on two cores; a trace is scaled to it.
PROMPT_TOKENS_BUDGET = 40_000
OUTPUT_TOKENS_BUDGET = 16_000
REQUESTS_BUDGET = 500
_WINDOW_S = 20.0
# So many requests of a replica in its queue are a queue that builds up.
_QUEUED_PER_REPLICA = 3
_POLL_S = 0.1
_CALL_TIMEOUT_S = 60.0
_BURST = BurstSpec(
    base_rate=2.0,
    burst_rate=15.0,
    burst_start_s=4.0,
    burst_length_s=4.0,
    burst_gap_s=4.0,
    waves=2,
    prompt=LengthDistribution.parse("lognormal:128:0.6"),
    output=LengthDistribution.parse("uniform:64:192"),
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the demo: 0 if every request succeeded, 1 if one failed or the server did, 2 for unusable options."""
    parser = argparse.ArgumentParser(prog="demo.py", description=__doc__, allow_abbrev=False)
    parser.add_argument("--trace", default=BURST, metavar="PATH|burst", help="what to replay (%(default)s)")
    parser.add_argument("--window-start", type=float, help="seconds into the trace; default: its busiest part")
    parser.add_argument("--window-length", type=float, help=f"seconds of the trace to replay ({_WINDOW_S:g})")
    parser.add_argument("--replicas", type=int, default=2, help="data-parallel replicas (%(default)s)")
    parser.add_argument("--no-drop", action="store_true", help="replay once, and drop nothing")
    parser.add_argument(
        "--drop-at", type=float, metavar="SECONDS", help="of the trace; default: when requests queue up at the replicas"
    )
    parser.add_argument("--output", type=Path, help="write one JSON object per request and replay to this file")
    args = parser.parse_args(argv)
    started_at_s = time.monotonic()
    try:
        trace, scaling = workload(args)
        if args.replicas < 1:
            raise TraceError(f"--replicas is {args.replicas}; accepted is a whole number of at least 1")
        if args.replicas == 1 and not args.no_drop:
            raise TraceError("--replicas is 1, and a drop takes two or more; accepted with --no-drop")
        if args.drop_at is not None and (args.no_drop or args.drop_at < 0):
            raise TraceError(f"--drop-at is {args.drop_at}; accepted are 0 and above, and not with --no-drop")
        if args.output is not None and not args.output.parent.is_dir():
            raise TraceError(f"--output is {args.output}; accepted is a file in an existing directory")
    except TraceError as error:
        parser.error(str(error))
    # As Ctrl-C: the default action of SIGTERM would end this process without its clean-up.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        with tempfile.TemporaryDirectory(prefix="demo-") as directory:
            status = _run(args, trace, scaling, Path(directory))
    except (ServerError, LoadError) as error:
        print(f"demo.py: {error}", file=sys.stderr)
        return 1
    print(f"took        {time.monotonic() - started_at_s:.0f} s")
    return status


def server_command(model: Path, port: int, replicas: int) -> list[str]:
    """The server's argument vector."""
    return [
        *(sys.executable, "-m", "kunserve_sgl.launch_server"),
        *("--model-path", str(model), "--host", HOST, "--port", str(port)),
        *("--dp-size", str(replicas), "--max-total-tokens", str(MODEL.kv_tokens)),
        *("--context-length", str(MODEL.context_tokens), *(("--kunserve", "manual") if replicas > 1 else ())),
    ]


def workload(args: Namespace) -> tuple[Trace, str]:
    """The trace to replay, and in one line what was scaled."""
    if args.trace == BURST:
        if args.window_start is not None or args.window_length is not None:
            raise TraceError("--window-start and --window-length select a part of a recorded trace; give --trace PATH")
        return shape(generate_bursts(_BURST, SEED), ShapeOptions()), "nothing; the burst was made for this model"
    recorded = read_trace(Path(args.trace))
    length_s = _WINDOW_S if args.window_length is None else args.window_length
    window = ShapeOptions(args.window_start or 0.0, length_s)
    if args.window_start is None:
        window = ShapeOptions(busiest_window(recorded, length_s), length_s)
    requests = shape(recorded, window).requests[:REQUESTS_BUDGET]
    # Half of the context for each, less what rounding may add.
    longest = MODEL.context_tokens // 2 - 1
    prompts = [request.prompt_tokens for request in requests]
    outputs = [request.output_tokens for request in requests]
    prompt_scale = min(1.0, longest / max(prompts), PROMPT_TOKENS_BUDGET / sum(prompts))
    output_scale = min(1.0, longest / max(outputs), OUTPUT_TOKENS_BUDGET / sum(outputs))
    options = ShapeOptions(
        window.window_start_s,
        length_s,
        limit=REQUESTS_BUDGET,
        prompt_scale=prompt_scale,
        output_scale=output_scale,
    )
    which = "busiest" if args.window_start is None else "chosen"
    return shape(recorded, options), (
        f"the {which} {length_s:g} s of the trace, from {window.window_start_s:.1f} s on, at its own speed; prompts x "
        f"{prompt_scale:.3f} and outputs x {output_scale:.3f}, so that a tiny model on two cores can follow"
    )


def _run(args: Namespace, trace: Trace, scaling: str, directory: Path) -> int:
    model = directory / "model"
    print("model       writing a tiny model", flush=True)
    print(f"model       {_write_model(model)}", flush=True)
    port = find_free_port()
    with ServerProcess(server_command(model, port, args.replicas), port=port, env={"OMP_NUM_THREADS": "1"}) as server:
        # Imports the client, which takes seconds, while the server starts.
        client_options = ["--host", HOST, "--port", str(port), "--model", str(model), "--seed", str(SEED)]
        client_args = parse_client_options([*client_options, "--warmup-requests", str(2 * args.replicas)])
        from client import ReplayError

        waited_s = server.wait_healthy(START_DEADLINE_S, on_wait=_Progress(f"starting {args.replicas} replicas"))
        pids = server.pids()
        print(f"server      {args.replicas} replicas in {len(pids)} processes, ready after {waited_s:.0f} s")
        print(f"scaled      {scaling}\n{describe(trace)}", flush=True)
        try:
            failed = _replays(args, trace, server, client_args)
        except (ReplayError, LoadError) as error:
            print(f"demo.py: {error}\n{server.log_tail()}", file=sys.stderr)
            return 1
        if failed:
            print(f"the end of the server's log:\n{server.log_tail()}", file=sys.stderr)
    left = remaining(pids)
    if left:
        raise ServerError(f"processes {left} of the server are still there after its stop")
    print(f"stopped     {len(pids)} processes; none is left")
    return 1 if failed else 0


def _replays(args: Namespace, trace: Trace, server: ServerProcess, client_args: Namespace) -> int:
    """Replays without and with the drop, and what they show; returns how many requests failed."""
    runs: dict[str, list[RequestResult]] = {}
    print("\nreplay      no drop" if not args.no_drop else "", flush=True)
    runs["no drop"] = replay(trace, copy.copy(client_args), request_timeout_s=_REQUEST_TIMEOUT_S)
    print(format_summary(summarise(runs["no drop"])), flush=True)
    if not args.no_drop:
        print("\nreplay      drop", flush=True)
        controls = Controls(server.port, server.log_path)
        controls.wait_ready()
        capacity = {"before": controls.capacity_tokens()}
        with _Dropper(server.port, controls, list(range(args.replicas)), args.drop_at) as dropper:
            runs["drop"] = replay(
                trace, copy.copy(client_args), request_timeout_s=_REQUEST_TIMEOUT_S, on_start=dropper.begin
            )
        print(format_summary(summarise(runs["drop"])), flush=True)
        if dropper.ordered is None:
            print("drop        none: requests did not queue up; --drop-at SECONDS orders one all the same")
        else:
            capacity["merged"] = controls.capacity_tokens()
            restored = controls.restore()
            capacity["after"] = controls.capacity_tokens()
            print(f"\n{_transitions(dropper, restored, capacity)}\n\n{first_tokens(runs, dropper.dropped_at_s)}")
    if args.output is not None:
        with args.output.open("w", encoding="utf-8") as file:
            for name, results in runs.items():
                for result in results:
                    row = asdict(result) | {"lateness_s": result.lateness_s, "tpot_s": result.tpot_s, "replay": name}
                    file.write(json.dumps(row) + "\n")
    return sum(summarise(results).failed for results in runs.values())


class _Dropper:
    """Orders one drop while a replay runs, in a thread of its own: at its time, or when requests queue up.

    `/v1/loads` reads what the replicas publish in shared memory; asking costs them nothing.
    """

    def __init__(self, port: int, controls: Controls, group: list[int], drop_at_s: float | None) -> None:
        self._url = f"http://{HOST}:{port}/v1/loads?include=core"
        self._controls = controls
        self._group = group
        self._drop_at_s = drop_at_s
        self._began_s = 0.0
        self._begun, self._ended = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._error: Exception | None = None
        self.ordered: Ordered | None = None
        self.queued = 0

    def __enter__(self) -> _Dropper:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, _error: BaseException | None, _traceback: TracebackType | None
    ) -> None:
        self._ended.set()
        self._begun.set()
        self._thread.join(2 * _CALL_TIMEOUT_S)
        if kind is None and self._error is not None:
            raise LoadError(f"the drop failed: {self._error}") from self._error

    def begin(self) -> None:
        """The arrivals begin now."""
        self._began_s = time.perf_counter()
        self._begun.set()

    @property
    def dropped_at_s(self) -> float:
        """When the drop was answered, in seconds of the trace."""
        assert self.ordered is not None, "nothing has been dropped"
        return self.ordered.answered_s - self._began_s

    def _run(self) -> None:
        self._begun.wait()
        try:
            while not self._ended.is_set():
                if self._is_time():
                    self.ordered = self._controls.drop({"groups": [self._group]})
                    return
                self._ended.wait(_POLL_S)
        except (requests.RequestException, LoadError) as error:
            self._error = error

    def _is_time(self) -> bool:
        answer = requests.get(self._url, timeout=_CALL_TIMEOUT_S)
        answer.raise_for_status()
        self.queued = sum(load["num_waiting_reqs"] for load in answer.json()["loads"])
        if self._drop_at_s is not None:
            return time.perf_counter() - self._began_s >= self._drop_at_s
        return self.queued >= _QUEUED_PER_REPLICA * len(self._group)


def _transitions(dropper: _Dropper, restored: Ordered, capacity: dict[str, int]) -> str:
    drop = dropper.ordered
    assert drop is not None, "nothing has been dropped"
    return "\n".join(
        [
            f"drop        at {dropper.dropped_at_s:.1f} s with {dropper.queued} requests in the queues: "
            f"{1000 * drop.answer['seconds']:.0f} ms, {drop.answer['freed_bytes'] / 2**20:.1f} MiB of parameters gone, "
            f"{drop.answer['extension_slots']} KV slots more",
            f"restore     after the replay: {1000 * restored.answer['seconds']:.0f} ms",
            "KV capacity " + ", ".join(f"{when} {tokens}" for when, tokens in capacity.items()) + " tokens",
        ]
    )


def first_tokens(runs: dict[str, list[RequestResult]], dropped_at_s: float) -> str:
    """The time to first token of both replays, of the requests that arrived before and after the drop."""
    rows: list[list[object]] = []
    for which, arrived_after in (("before the drop", False), ("after the drop", True), ("all", None)):
        for name, results in runs.items():
            values = Distribution.of(
                result.ttft_s
                for result in results
                if not result.failed
                and result.ttft_s is not None
                and (arrived_after is None or (result.arrival_s >= dropped_at_s) == arrived_after)
            )
            cells = [] if values is None else [values.p50, values.p90, values.p99, values.p999, values.largest]
            numbers = [f"{1000 * cell:.0f}" for cell in cells] or ["-"] * 5
            rows.append([f"arrived {which}" if arrived_after is not None else which, name, *numbers])
            rows[-1].append(0 if values is None else values.count)
    return table(["TTFT ms", "replay", "P50", "P90", "P99", "P99.9", "max", "requests"], rows)


def _write_model(directory: Path) -> str:
    # Imported late: it takes seconds, and a wrong option or trace should be refused at once.
    from kunserve_sgl.tiny_model import write_tiny_model
    from kunserve_sgl.tiny_model_spec import TinyModelSpec

    spec = TinyModelSpec(
        arch=MODEL.arch,
        layers=MODEL.layers,
        hidden=MODEL.hidden,
        heads=MODEL.heads,
        kv_heads=MODEL.kv_heads,
        intermediate=MODEL.intermediate,
        max_position=MODEL.context_tokens,
    )
    sizes = write_tiny_model(spec, directory)
    return (
        f"{MODEL.arch}, {MODEL.layers} layers, {sizes.parameters / 1e6:.1f} million random parameters; KV for "
        f"{MODEL.kv_tokens} tokens per replica, {sizes.kv_bytes_per_token} bytes each"
    )


class _Progress:
    """Shows the seconds waited: in place on a terminal, else a line now and then."""

    def __init__(self, what: str) -> None:
        self._what = what
        self._next_s = 0.0

    def __call__(self, waited_s: float) -> None:
        if sys.stderr.isatty():
            print(f"\r{self._what}: {waited_s:.0f} s ", end="", file=sys.stderr, flush=True)
        elif waited_s >= self._next_s:
            print(f"{self._what}: {waited_s:.0f} s", file=sys.stderr, flush=True)
            self._next_s = waited_s + _PROGRESS_EVERY_S


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        print("demo.py: interrupted; everything it started has been stopped", file=sys.stderr)
        sys.exit(130)
