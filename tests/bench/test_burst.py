"""The logic of the burst comparison: limits and goodput, equal tokens, ratios, the table, systems, load, and the watch.

Real servers are compared by the command itself.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from _burst_runs import a_run, a_sample, answered, failed

from burst import build_parser, choose, order_times
from comparison import plots as burst_plots
from comparison.report import (
    Goodput,
    Order,
    Ratios,
    Slo,
    SystemRun,
    TokenComparison,
    Transition,
    best_stock,
    format_table,
    ratios,
    slos,
    transitions,
    write_run,
    write_summary,
)
from comparison.systems import Kind, Setup, System, ceiling_tokens, settled, systems_of, unloaded_trace
from comparison.watch import ServerWatch
from kunserve_sgl.tiny_model_spec import DTYPE_BYTES, PRESETS, TinyModelSpec
from workload.traces import Trace, TraceError, TraceRequest

DEADLINE_S = 300.0


def test_limits_are_multiples_of_the_unloaded_medians() -> None:
    unloaded = [answered(0, 0.1, 0.01), answered(1, 0.2, 0.02), answered(2, 0.9, 0.09), failed(3)]
    slo = Slo.of(unloaded, 5.0)
    assert (slo.ttft_s, slo.tpot_s) == (pytest.approx(1.0), pytest.approx(0.1))


def test_limits_need_an_unloaded_request_that_succeeded() -> None:
    with pytest.raises(ValueError, match="no unloaded request succeeded"):
        Slo.of([failed(0)], 5.0)


def test_a_request_meets_the_limits_by_both_times() -> None:
    slo = Slo(5.0, ttft_s=1.0, tpot_s=0.05)
    assert slo.met_by(answered(0, 1.0, 0.049))
    assert not slo.met_by(answered(0, 1.01, 0.05))
    assert not slo.met_by(answered(0, 1.0, 0.051))
    assert slo.met_by(answered(0, 1.0, tokens=(1,)))
    assert not slo.met_by(failed(0))
    assert Slo.of([answered(0, 1.0, tokens=(1,))], 5.0) == Slo(5.0, 5.0, None)
    assert Slo(5.0, 5.0, None).met_by(answered(0, 5.0, 99.0))


def test_goodput_counts_failed_requests_as_sent() -> None:
    slo = Slo(5.0, ttft_s=1.0, tpot_s=0.05)
    # From the first send at 0 to the last answer at 3 + 2 + 2 x 0.01 s.
    results = [answered(0, 0.5), failed(1), answered(2, 0.5), answered(3, 2.0)]
    goodput = Goodput.of(results, slo)
    assert goodput.share == 0.5
    assert goodput.requests_per_s == pytest.approx(2 / 5.02)


def test_tokens_are_compared_per_request_where_both_answered() -> None:
    reference = [answered(0, 0.1), answered(1, 0.1), answered(2, 0.1), failed(3)]
    other = [answered(2, 0.1, tokens=(7, 8, 1)), answered(0, 0.9), failed(1), answered(3, 0.1)]
    assert TokenComparison.of(other, reference) == TokenComparison(2, 1, (2,))


def test_answers_whose_tokens_are_not_all_known_are_not_compared() -> None:
    partial = replace(answered(0, 0.1), output_ids=(7,))
    assert TokenComparison.of([partial], [partial]) == TokenComparison(0, 0)


def test_the_best_stock_system_fails_least_and_has_the_lowest_tail() -> None:
    slow, fast = a_run("stock a", "stock", [1.0, 9.0]), a_run("stock b", "stock", [1.0, 4.0])
    failing = a_run("stock c", "stock", [0.1, 0.1])
    failing.results.append(failed(2))
    ours, missing = a_run("auto", "ours", [0.1]), SystemRun("stock d", "stock", "", problem="no")
    assert best_stock([slow, fast, failing, ours, missing]) is fast
    assert best_stock([ours, missing]) is None


def test_ratios_of_all_but_the_best_stock_and_the_ceilings() -> None:
    runs = [
        a_run("stock a", "stock", [40.0] * 3, 0.01),
        a_run("stock b", "stock", [20.0] * 3, 0.01),
        a_run("auto", "ours", [0.5] * 3, 0.022),
        a_run("ceiling", "ceiling", [0.25] * 3, 0.02),
        a_run("our-ceiling", "our-ceiling", [0.2] * 3, 0.011),
    ]
    found = {each.system: each for each in ratios(runs)}
    assert set(found) == {"stock a", "auto"}
    assert found["auto"].stock_p99_ttft_by_ours == pytest.approx(40.0)
    assert found["auto"].p99_ttft_by_ceiling == pytest.approx(2.0)
    assert found["auto"].tpot_p50_by_ceiling == pytest.approx(1.1)
    assert found["auto"].p99_ttft_by_our_ceiling == pytest.approx(2.5)
    assert found["auto"].tpot_p50_by_our_ceiling == pytest.approx(2.0)
    (line,) = [line for line in format_table(runs).splitlines() if line.startswith("ratio       auto ")]
    assert "this / ceiling 2.00, this / our-ceiling 2.50; TPOT P50 this / ceiling 1.10, this / our-ceiling 2.00" in line


def test_ratios_without_stock_and_ceilings_are_unknown() -> None:
    assert ratios([a_run("auto", "ours", [0.5])]) == [Ratios("auto", None, None, None, None, None)]


def test_a_system_without_a_success_has_an_infinite_tail() -> None:
    run = SystemRun("auto", "ours", "", results=[failed(0)])
    assert run.p99_ttft_s == float("inf")
    assert ratios([run, a_run("stock", "stock", [1.0])])[0].stock_p99_ttft_by_ours == 0.0


def test_transitions_are_changes_of_the_epoch() -> None:
    samples = [
        a_sample(0.0, 0, "normal"),
        a_sample(0.5, 0, "dropping"),
        a_sample(1.0, 1, "merged", 300),
        a_sample(1.5, None, None),
        a_sample(2.0, 1, "merged", 300),
        a_sample(2.5, 2, "normal"),
    ]
    assert transitions(samples) == [Transition(1.0, 1, "merged", 600), Transition(2.5, 2, "normal", 200)]


def test_the_limits_come_from_the_best_stock_system() -> None:
    stock, ours = a_run("stock", "stock", [1.0]), a_run("auto", "ours", [0.1])
    ours.unloaded = [answered(0, 9.0, 9.0)]
    assert [(slo.factor, slo.ttft_s) for slo in slos([ours, stock])] == [(5.0, 0.1), (10.0, pytest.approx(0.2))]


def test_the_table_shows_every_number_by_system() -> None:
    stock, ours = a_run("stock rr", "stock", [20.0] * 4), a_run("manual", "ours", [0.05, 0.15, 0.15, 2.0], 0.0123)
    ours.results[1] = replace(ours.results[1], output_ids=(7, 8, 0))
    ours.samples = [a_sample(0.0, 0, "normal"), a_sample(1.0, 1, "merged", 321)]
    ours.orders = [Order(0.9, "drop", 200, "", 0.045, 0.003, 442)]
    ours.normal_after_s, ours.as_at_start, ours.unloaded_after = 4.25, False, [answered(0, 0.02, 0.005, (7, 8, 1))]
    stock.retractions = 17
    text = format_table([stock, ours, SystemRun("hicache", "hicache", "", problem="no CUDA")])
    rows = {line.split()[0]: line for line in text.splitlines() if line.strip()}
    tpot = next(line for line in text.split("TPOT ms")[1].splitlines() if line.startswith("manual"))
    assert tpot.split()[1:3] == ["12.3", "12.3"]
    last = [line for line in text.splitlines() if line.startswith("manual")][-1].split()
    assert last[1] == "25.0%"  # 5 x 20 ms: only the first
    assert last[3] == "75.0%"
    assert last[-4:] == ["0", "0", "1/4", "642"]
    assert [line for line in text.splitlines() if line.startswith("stock rr")][-1].split()[-3] == "17"
    assert rows["ordered"].split()[1:] == (
        "manual: drop at 0.90 s, status 200, took 0.045 s with a pause of 0.003 s, 442 slots".split()
    )
    assert "seen at 1.00 s, epoch 1, merged, 642 slots" in rows["transition"]
    assert "manual: normal 4.2 s after the last answer, memory and plan NOT as at start" in rows["restored"]
    assert "TPOT P50 5.0 ms, 4.0 at start; 1 of 1 answers differ" in rows["afterwards"]
    assert "hicache: no CUDA" in rows["problem"]
    assert "stock P99 TTFT / this 10.29" in rows["ratio"]  # P99 of ours: 0.15 + 0.97 x 1.85 s


def test_the_table_of_nothing_says_so() -> None:
    text = format_table([SystemRun("auto", "ours", "", problem="did not start")])
    assert "auto: did not start" in text
    assert "no system was measured" in text


def test_the_file_has_a_line_per_request_sample_and_system_and_a_summary(tmp_path: Path) -> None:
    path = tmp_path / "burst.jsonl"
    run = a_run("stock", "stock", [1.0, 2.0])
    run.samples = [a_sample(0.0, None, None)]
    missing = SystemRun("hicache", "hicache", "", problem="no CUDA")
    for each in (run, missing):
        write_run(path, each)
    write_summary(path, [run, missing], {"machine": "a desk"})
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [(line["kind"], line.get("system")) for line in lines] == [
        ("unloaded", "stock"),
        ("request", "stock"),
        ("request", "stock"),
        ("sample", "stock"),
        ("system", "stock"),
        ("system", "hicache"),
        ("summary", None),
    ]
    assert lines[1]["output_ids"] == [7, 8, 9]
    assert lines[4]["summary"]["requests"] == 2
    assert lines[-1]["machine"] == "a desk"
    assert lines[-1]["problem"] == {"hicache": "no CUDA"}
    assert lines[-1]["tokens"]["stock"]["compared"] == 2


def test_the_pictures_are_written(tmp_path: Path) -> None:
    run = a_run("auto", "ours", [0.1, 0.2])
    run.samples = [a_sample(0.0, 0, "normal"), a_sample(1.0, 1, "merged", 300)]
    for plot in (burst_plots.plot_ttft, burst_plots.plot_memory):
        path = tmp_path / f"{plot.__name__}.png"
        plot(path, [run, a_run("stock", "stock", [1.0])], "a title")
        assert path.read_bytes().startswith(b"\x89PNG")


def a_setup(**changes: object) -> Setup:
    values: dict[str, object] = {
        **{"model": Path("model"), "model_name": "tiny", "replicas": 2, "tokens": 512, "context_tokens": 1024},
        **{"seed": 1, "server_flags": ("--dtype", "bfloat16"), "poll_s": 0.1, "start_deadline_s": 1.0},
        **{"request_timeout_s": 1.0, "settle_s": 1.0, "unloaded_requests": 2, "log_dir": Path()},
    }
    return Setup(**{**values, **changes})  # type: ignore[arg-type]


def test_the_ceiling_is_measured_last() -> None:
    kinds = [Kind.OUR_CEILING, Kind.CEILING, Kind.STOCK, Kind.AUTO]
    systems = systems_of(kinds, ["round_robin", "total_tokens"], 512)
    names = ["stock round_robin", "stock total_tokens", "auto", "ceiling", "our-ceiling"]
    assert [system.name for system in systems] == names
    assert ceiling_tokens(a_setup(), [100, 120]) == 632


def test_commands_differ_in_what_is_compared_only() -> None:
    setup = a_setup()
    stock, ours = System("stock", Kind.STOCK, 512, "total_tokens"), System("auto", Kind.AUTO, 512)
    commands = {system.name: system.command(setup, 1) for system in (stock, ours)}
    for command in commands.values():
        for flag, value in (("--max-total-tokens", "512"), ("--dp-size", "2"), ("--dtype", "bfloat16")):
            assert command[command.index(flag) + 1] == value
    assert "sglang.launch_server" in commands["stock"]
    assert commands["stock"][-2:] == ["--load-balance-method", "total_tokens"]
    assert "kunserve_sgl.launch_server" in commands["auto"]
    assert commands["auto"][-2:] == ["--kunserve", "auto"]
    assert "--kunserve" not in commands["stock"]
    assert System("ceiling", Kind.OUR_CEILING, 512).role == "our-ceiling"
    for kind in (Kind.STILL, Kind.OUR_CEILING):
        assert System(kind.value, kind, 512).command(setup, 1)[-2:] == ["--kunserve", "manual"]


def test_the_unloaded_pass_has_requests_of_all_lengths() -> None:
    trace = Trace("t", tuple(TraceRequest(float(n), n, 500, n) for n in (4, 1, 3, 2)))
    alone = unloaded_trace(trace, 2).requests
    assert [(each.prompt_tokens, each.arrival_s, each.output_tokens) for each in alone] == [(2, 0.0, 32), (4, 0.0, 32)]
    assert len(unloaded_trace(trace, 9).requests) == 4


@pytest.mark.parametrize("workload", ["burst", "waves", "long"])
@pytest.mark.parametrize("quick", [[], ["--quick"]], ids=["full", "quick"])
def test_workloads_overload_the_memory(workload: str, quick: list[str]) -> None:
    args = build_parser().parse_args([*quick, "--workload", workload])
    trace, systems = choose(args)
    # If all came at once they would want more than all replicas have.
    wanted = sum(request.prompt_tokens + request.output_tokens for request in trace.requests)
    assert wanted > 2 * args.replicas * args.tokens
    assert {Kind.STOCK, Kind.AUTO, Kind.CEILING} <= {system.kind for system in systems}
    assert choose(build_parser().parse_args([*quick, "--workload", workload]))[0] == trace


def test_the_burst_that_exceeds_the_merged_memory() -> None:
    args = build_parser().parse_args(["--workload", "exceeds"])
    trace, systems = choose(args)
    assert [system.kind for system in systems] == [Kind.AUTO, Kind.OUR_CEILING]
    assert (args.model, args.dtype, args.tokens) == ("deep", "bfloat16", 1536)
    # As much again is what all parameters that are there twice make room for.
    spec = TinyModelSpec(**PRESETS[args.model], dtype=args.dtype)
    matrices = spec.hidden * spec.hidden * 3 + 3 * spec.hidden * spec.intermediate
    copy_tokens = matrices * DTYPE_BYTES[spec.dtype] * spec.layers // spec.kv_bytes_per_token
    assert copy_tokens == args.replicas * args.tokens
    wanted = sum(request.prompt_tokens + request.output_tokens for request in trace.requests)
    assert wanted > 2 * args.replicas * 2 * args.tokens
    assert max(request.prompt_tokens for request in trace.requests) <= 4 * 180
    assert max(request.output_tokens for request in trace.requests) <= 4 * 140


def test_what_a_workload_chooses_can_be_given() -> None:
    args = build_parser().parse_args(
        ["--workload", "exceeds", "--dtype", "float32", "--systems", "off", "--burst-rate", "1"]
    )
    _, systems = choose(args)
    assert [system.kind for system in systems] == [Kind.OFF]
    assert (args.dtype, args.burst_rate, args.model) == ("float32", 1.0, "deep")


def test_the_drop_is_ordered_when_the_burst_begins() -> None:
    args = build_parser().parse_args(["--workload", "burst"])
    trace, _ = choose(args)
    ((at_s, command),) = order_times(args, trace)
    assert command == "drop"
    inside = [request for request in trace.requests if at_s <= request.arrival_s < at_s + args.burst_length]
    assert len(inside) > 0.8 * len(trace.requests)
    args = build_parser().parse_args(["--drop-at", "3", "--restore-at", "9", "--drop-at", "12"])
    assert order_times(args, choose(args)[0]) == ((3.0, "drop"), (9.0, "restore"), (12.0, "drop"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--systems", "stock,fast"], "--systems: fast; accepted are stock"),
        (["--load-balance-method", "best"], "--load-balance-method: best; accepted are round_robin"),
        (["--trace", "file", "--workload", "burst"], "--workload cannot be used with --trace"),
        (["--quick", "--workload", "exceeds"], "--workload exceeds cannot be used with --quick"),
        (["--replicas", "1"], "--replicas is 1; accepted is 2 or more"),
        (["--tokens", "200"], "fewer than 200 must do"),
    ],
)
def test_unusable_options_are_named(options: list[str], message: str) -> None:
    with pytest.raises(TraceError, match=message):
        choose(build_parser().parse_args(options))


class ScriptedKunserve(BaseHTTPRequestHandler):
    """A server that is merged after a drop; every second question for its loads is answered with an error."""

    state = "normal"
    epoch = 0
    capacities: tuple[int, ...] = (50, 50)
    asked: list[tuple[str, object]]
    loads = 0

    def do_GET(self) -> None:
        kind = type(self)
        if self.path.startswith("/v1/loads"):
            kind.loads += 1
            load = {"max_total_num_tokens": 50, "num_used_tokens": 4, "num_total_tokens": 9}
            self._answer(200 if kind.loads % 2 else 500, {"loads": [{"dp_rank": n, **load} for n in (1, 0)]})
        else:
            members = [{"state": "normal", "frames": {}, "capacity_tokens": tokens} for tokens in kind.capacities]
            plan = {"hosts": [], "homes": [], "replicas": members}
            self._answer(200, {"state": kind.state, "epoch": kind.epoch, **plan})

    def do_POST(self) -> None:
        kind = type(self)
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        kind.asked.append((self.path, body))
        if self.path == "/kunserve/drop":
            kind.state, kind.epoch = "merged", kind.epoch + 1
            self._answer(200, {"message": "", "seconds": 0.5, "pause_seconds": 0.1, "extension_slots": 60})
        else:
            self._answer(409, {"message": "another transition runs"})

    def _answer(self, status: int, body: object) -> None:
        data = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def kunserve() -> Iterator[tuple[str, type[ScriptedKunserve]]]:
    handler = type("Handler", (ScriptedKunserve,), {"asked": []})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_address[1]}", handler
    server.shutdown()
    server.server_close()
    thread.join()


def test_the_watch_samples_and_orders(kunserve: tuple[str, type[ScriptedKunserve]]) -> None:
    url, handler = kunserve
    watch = ServerWatch(url, attached=True, interval_s=0.01, orders=[(0.3, "restore"), (0.1, "drop")], group=range(2))
    with watch:
        time.sleep(0.15)
        assert [sample.t_s for sample in watch.samples] == [0.0], "but for how it was, nothing is asked before"
        handler.state, handler.epoch = "merged", 1  # over before the next sample
        assert not handler.asked
        watch.begin()
        ends_at_s = time.monotonic() + DEADLINE_S
        while len(watch.orders) < 2 or not transitions(watch.samples):
            assert time.monotonic() < ends_at_s
            time.sleep(0.01)
        assert watch.wait_normal(0.2) is None
        handler.state = "normal"
        assert watch.wait_normal(DEADLINE_S) is not None
    assert handler.asked == [(f"/kunserve/{each}", {"groups": [[0, 1]]}) for each in ("drop", "restore")]
    drop, restore = watch.orders
    assert 0.1 <= drop.t_s < restore.t_s
    assert (drop.status, drop.seconds, drop.pause_seconds, drop.extension_slots) == (200, 0.5, 0.1, 60)
    assert (restore.status, restore.message) == (409, "another transition runs")
    first = watch.samples[0]
    assert (first.capacity_tokens, first.used_tokens, first.wanted_tokens) == ((50, 50), (4, 4), (9, 9))
    assert (first.state, first.epoch) == ("normal", 0)
    assert {change.state for change in transitions(watch.samples)} == {"merged"}
    assert watch.missed > 0


def test_memory_that_is_free_to_be_lent_is_waited_for(kunserve: tuple[str, type[ScriptedKunserve]]) -> None:
    url, handler = kunserve
    at_start = settled(url, None, 0.0)
    handler.capacities = (50, 20)  # all are normal, and one has freed slots
    freed = settled(url, at_start, 0.2)
    assert freed != at_start
    back = threading.Timer(0.3, lambda: setattr(handler, "capacities", (50, 50)))
    back.start()
    assert settled(url, at_start, DEADLINE_S) == at_start
    back.join()
