"""The replay of a trace through SGLang's client: what it sends, what it accepts as success, and what it computes.

The server here is a script that answers as told; the client is SGLang's own. Real servers: tests/host.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import numpy as np
import pytest
from sglang.benchmark import datasets, serving
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from replay import main
from workload import report
from workload.client import Replay, ReplayError
from workload.play import parse_client_options, replay
from workload.report import RequestResult, format_summary, summarise, write_results
from workload.traces import Trace, TraceError, TraceRequest

VOCABULARY = {"<s>": 0, "</s>": 1, **{f"w{i}": i for i in range(2, 202)}}


@pytest.fixture(scope="module")
def tokenizer_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A real tokenizer on disk, as the client loads it."""
    directory = tmp_path_factory.mktemp("tokenizer")
    inner = Tokenizer(models.WordLevel(VOCABULARY, unk_token="w2"))
    PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", eos_token="</s>").save_pretrained(directory)
    return directory


@dataclass
class Answer:
    """One way to answer /generate: chunks of (delay in s, message), then the end of the stream."""

    chunks: list[tuple[float, dict[str, Any]]]
    status: int = 200


def tokens(prompt: int, *counts: int, delay_s: float = 0.0, text: str = "x") -> Answer:
    """A stream that reports these cumulative numbers of generated tokens."""
    chunks = [
        (
            delay_s,
            {"text": text * count, "meta_info": {"prompt_tokens": prompt, "completion_tokens": count, "dp_rank": 1}},
        )
        for count in counts
    ]
    return Answer(chunks)


def said(message: dict[str, Any]) -> Answer:
    """A stream of this one message."""
    return Answer([(0.0, message)])


@dataclass
class ScriptedServer:
    """Speaks the part of SGLang's HTTP interface that the client uses, and notes what it was sent."""

    answer: Callable[[dict[str, Any]], Answer]
    generated: list[tuple[float, dict[str, Any]]] = field(default_factory=list)
    flushes: list[tuple[float, dict[str, list[str]]]] = field(default_factory=list)
    flush_status: int = 200

    def __post_init__(self) -> None:
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, format: str, *args: Any) -> None:
                pass

            def reply(self, status: int, body: dict[str, Any]) -> None:
                data = json.dumps(body).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def do_GET(self) -> None:
                self.reply(200, {"data": [{"id": "scripted"}]})

            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                if urlsplit(self.path).path == "/flush_cache":
                    server.flushes.append((time.perf_counter(), parse_qs(urlsplit(self.path).query)))
                    self.reply(server.flush_status, {"message": "busy"})
                    return
                request = json.loads(body)
                server.generated.append((time.perf_counter(), request))
                answer = server.answer(request)
                if answer.status != 200:
                    self.reply(answer.status, {"error": "overloaded"})
                    return
                self.send_response(200)
                self.send_header("Connection", "close")
                self.end_headers()
                try:
                    for delay_s, message in answer.chunks:
                        time.sleep(delay_s)
                        self.wfile.write(b"data: " + json.dumps(message).encode() + b"\n\n")
                    self.wfile.write(b"data: [DONE]\n\n")
                except (BrokenPipeError, ConnectionResetError):
                    pass  # The client has given up, as in the test of the deadline.
                self.close_connection = True

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.port: int = self._server.server_address[1]
        self._thread = threading.Thread(target=self._server.serve_forever)
        self._thread.start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join(timeout=300)
        assert not self._thread.is_alive()

    def traced(self) -> list[tuple[float, dict[str, Any]]]:
        """What was generated for the trace, without the warm-up."""
        return [(at_s, request) for at_s, request in self.generated if "rid" in request]


def honest(request: dict[str, Any]) -> Answer:
    return tokens(len(request["input_ids"]), *range(1, request["sampling_params"]["max_new_tokens"] + 1))


@pytest.fixture
def serve() -> Iterator[Callable[[Callable[[dict[str, Any]], Answer]], ScriptedServer]]:
    """Starts scripted servers, and stops them after the test."""
    started: list[ScriptedServer] = []

    def start(answer: Callable[[dict[str, Any]], Answer]) -> ScriptedServer:
        started.append(ScriptedServer(answer))
        return started[-1]

    yield start
    for server in started:
        server.close()


Serve = Callable[[Callable[[dict[str, Any]], Answer]], ScriptedServer]
TRACE = Trace(
    "made",
    (
        TraceRequest(0.0, 7, 4, line=2),
        TraceRequest(0.25, 130, 1, line=3),
        TraceRequest(0.25, 3, 3, line=4),
        TraceRequest(0.6, 40, 2, line=5),
    ),
)


def client_options(server: ScriptedServer, tokenizer_dir: Path, *more: str) -> list[str]:
    address = ["--host", "127.0.0.1", "--port", str(server.port)]
    return [*address, "--model", "served-name", "--tokenizer", str(tokenizer_dir), "--disable-tqdm", *more]


def run(
    server: ScriptedServer, tokenizer_dir: Path, *more: str, trace: Trace = TRACE, **options: Any
) -> list[RequestResult]:
    client_args = parse_client_options(client_options(server, tokenizer_dir, *more))
    return replay(trace, client_args, **{"request_timeout_s": 300.0, **options})


class TestClient:
    def test_lengths_and_arrivals_are_the_traces(self, serve: Serve, tokenizer_dir: Path) -> None:
        server = serve(honest)
        results = run(server, tokenizer_dir)
        assert [result.error for result in results] == [""] * 4
        sent = server.traced()
        asked = [(len(r["input_ids"]), r["sampling_params"]["max_new_tokens"]) for _, r in sent]
        assert sorted(asked) == sorted((r.prompt_tokens, r.output_tokens) for r in TRACE.requests)
        assert all(request["sampling_params"]["ignore_eos"] for _, request in sent)
        assert all(2 <= token < 202 for _, request in sent for token in request["input_ids"])
        assert len({request["rid"] for _, request in sent}) == 4
        # Never early; how late is the machine's affair, but the order and the gaps' size must be there.
        assert all(result.lateness_s >= 0 for result in results)
        assert [result.line for result in results] == [2, 3, 4, 5]
        assert sent[-1][0] - server.flushes[0][0] >= 0.6
        assert [(r.server_prompt_tokens, r.server_output_tokens, r.replica) for r in results] == [
            (7, 4, 1),
            (130, 1, 1),
            (3, 3, 1),
            (40, 2, 1),
        ]
        assert [len(result.itl_s) for result in results] == [3, 0, 2, 1]

    def test_prompts_are_the_same_in_every_run(self, serve: Serve, tokenizer_dir: Path) -> None:
        def prompts(*more: str) -> list[list[int]]:
            server = serve(honest)
            run(server, tokenizer_dir, *more)
            return sorted(request["input_ids"] for _, request in server.traced())

        found = prompts("--seed", "3")
        assert found == prompts("--seed", "3")
        assert found != prompts("--seed", "4")

    def test_times_are_of_tokens_not_of_text(self, serve: Serve, tokenizer_dir: Path) -> None:
        def answer(request: dict[str, Any]) -> Answer:
            stream = honest(request)
            if "rid" in request and len(request["input_ids"]) == 7:
                # The first token is no complete character: no text yet, and a while until the next chunk.
                stream.chunks[0][1]["text"] = ""
                stream.chunks[1] = (4.0, stream.chunks[1][1])
            elif "rid" in request and len(request["input_ids"]) == 3:
                # The second and third token arrive together.
                stream.chunks[1:] = [(4.0, stream.chunks[2][1])]
            return stream

        results = run(serve(answer), tokenizer_dir)
        assert [result.error for result in results] == [""] * 4
        textless, together = results[0], results[2]
        assert textless.ttft_s is not None
        assert textless.client_ttft_s is not None
        assert textless.client_ttft_s - textless.ttft_s > 0.25
        assert textless.itl_s[0] > 0.25
        assert len(textless.itl_s) == 3
        assert len(together.itl_s) == 2
        assert len(set(together.itl_s)) == 1
        assert sum(together.itl_s) > 0.15

    def test_what_is_no_success(self, serve: Serve, tokenizer_dir: Path) -> None:
        # But for the status, all of these arrive in a way that the client alone takes for a success.
        broken = [
            (said({"error": {"message": "input too long", "code": 400}}), "server: input too long"),
            (Answer(tokens(11, 1).chunks + said({"error": "lost"}).chunks), "server: lost"),
            (tokens(12, 1, 2), "server generated 2 tokens, asked were 4"),
            (tokens(12, 1, 2, 3, 4), "server counted 12 prompt tokens, sent were 13"),
            (Answer([]), "the server's stream ended without token counts"),
            (said({"meta_info": {"finish_reason": {"type": "abort", "message": "full"}}}), "server aborted: full"),
            (Answer([], status=503), "overloaded"),
        ]
        trace = Trace("broken", tuple(TraceRequest(0.0, 10 + i, 4, line=i) for i in range(len(broken) + 1)))
        answers = {10 + i: answer for i, (answer, _) in enumerate(broken)}
        server = serve(lambda r: answers.get(len(r["input_ids"]), honest(r)) if "rid" in r else honest(r))
        results = run(server, tokenizer_dir, trace=trace)
        for result_, (_, message) in zip(results, broken, strict=False):
            assert message in result_.error
        assert results[-1].error == ""
        summary = summarise(results)
        assert summary.failed == len(broken)
        for _, message in broken:
            assert message in format_summary(summary)

    def test_all_failed(self, serve: Serve, tokenizer_dir: Path) -> None:
        results = run(serve(lambda r: Answer([], status=503) if "rid" in r else honest(r)), tokenizer_dir)
        assert [result.failed for result in results] == [True] * 4
        text = format_summary(summarise(results))
        assert "failed 4 x: Service Unavailable" in text
        assert "no sample" in text

    def test_answer_that_never_comes_fails_at_its_deadline(self, serve: Serve, tokenizer_dir: Path) -> None:
        slow = Answer([(20.0, {"meta_info": {}})])
        server = serve(lambda r: slow if len(r["input_ids"]) == 7 and "rid" in r else honest(r))
        results = run(server, tokenizer_dir, request_timeout_s=5.0)
        assert results[0].error == "no complete answer within 5 s"
        assert [result.failed for result in results[1:]] == [False] * 3

    def test_warm_up_that_fails_stops_the_replay(self, serve: Serve, tokenizer_dir: Path) -> None:
        server = serve(lambda r: said({"error": {"message": "too long"}}))
        with pytest.raises(ReplayError, match=r"did not answer the warm-up request.*too long"):
            run(server, tokenizer_dir)
        assert server.traced() == []

    def test_cache_is_flushed_between_warm_up_and_trace(self, serve: Serve, tokenizer_dir: Path) -> None:
        server = serve(honest)
        run(server, tokenizer_dir, "--warmup-requests", "2")
        ((flushed_at_s, query),) = server.flushes
        assert float(query["timeout"][0]) > 0
        warm_up = [at_s for at_s, request in server.generated if "rid" not in request]
        assert len(warm_up) == 2
        assert max(warm_up) < flushed_at_s < min(at_s for at_s, _ in server.traced())
        kept = serve(honest)
        run(kept, tokenizer_dir, keep_cache=True)
        assert kept.flushes == []

    def test_refused_flush_stops_the_replay(self, serve: Serve, tokenizer_dir: Path) -> None:
        server = serve(honest)
        server.flush_status = 400
        with pytest.raises(ReplayError, match="did not flush its cache"):
            run(server, tokenizer_dir)

    def test_client_is_left_as_it_was(self, serve: Serve, tokenizer_dir: Path) -> None:
        def state() -> list[Any]:
            names = ("get_request", "orjson", "requests", "flush_server_cache", "run_benchmark")
            return [
                *(getattr(serving, name) for name in names),
                dict(serving.ASYNC_REQUEST_FUNCS),
                dict(datasets.DATASET_MAPPING),
            ]

        before = state()
        run(serve(honest), tokenizer_dir)
        assert state() == before
        with pytest.raises(ReplayError):
            run(serve(lambda r: Answer([], status=500)), tokenizer_dir)
        assert state() == before

    def test_client_that_does_not_use_what_is_attached_is_noticed(
        self, serve: Serve, tokenizer_dir: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(serving, "run_benchmark", lambda args: None)
        with pytest.raises(ReplayError, match="sent 0 of 4 requests through the replay"):
            run(serve(honest), tokenizer_dir)
        monkeypatch.undo()
        monkeypatch.setattr(serving, "get_request", lambda input_requests, request_rate: None)
        with pytest.raises(ReplayError, match=r"cannot keep arrival times; needed: 0\.5\.17"):
            run(serve(honest), tokenizer_dir)

    def test_dataset_rows(self, tokenizer_dir: Path) -> None:
        tokenizer = PreTrainedTokenizerFast.from_pretrained(tokenizer_dir)
        rows = Replay(TRACE, seed=1, request_timeout_s=1, run_name="r").rows(tokenizer)
        assert [(len(row.prompt), row.prompt_len, row.output_len) for row in rows] == [
            (r.prompt_tokens, r.prompt_tokens, r.output_tokens) for r in TRACE.requests
        ]
        assert [row.timestamp for row in rows] == [0.0, 250.0, 250.0, 600.0]


class TestCommand:
    @pytest.mark.parametrize(
        ("option", "reason"),
        [
            (("--backend", "vllm"), "--backend cannot be used in a replay"),
            (("--max-concurrency", "4"), "--max-concurrency cannot be used in a replay: it would delay arrivals"),
            (("--max-conc", "4"), "--max-concurrency cannot be used"),
            (("--request-rate", "3"), "use --time-scale"),
            (("--num-prompts", "3"), "use --limit"),
            (("--dataset-name", "random"), "the dataset is the trace"),
            (("--disable-ignore-eos",), "output lengths are the trace's"),
            (("--disable-stream",), "no time to first token"),
        ],
    )
    def test_client_options_that_contradict_a_replay(self, option: tuple[str, ...], reason: str) -> None:
        with pytest.raises(TraceError) as error:
            parse_client_options(option)
        assert reason in str(error.value)

    def test_client_options_pass(self) -> None:
        given = parse_client_options(["--port", "5", "--warmup-requests", "7"])
        assert (given.port, given.warmup_requests) == (5, 7)

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ((), "--trace"),
            (("--trace", "/missing.csv"), "/missing.csv: cannot be read"),
            (("--trace", "burst", "--nonsense"), "unrecognized arguments: --nonsense"),
            (("--trace", "burst", "--skip-malformed"), "--skip-malformed cannot be used with --trace burst"),
            (("--trace", "/missing.csv", "--waves", "3"), "--waves cannot be used with --trace /missing.csv"),
            (("--trace", "burst", "--upscale", "0"), "upscale is 0"),
            (("--trace", "burst", "--length-scale", "-1"), "prompt_scale is -1.0"),
            (("--trace", "burst", "--prompt-lengths", "some"), "length distribution is 'some'"),
            (("--trace", "burst", "--request-timeout", "0"), "--request-timeout is 0.0"),
            (("--trace", "burst", "--output", "/missing/file"), "--output is /missing/file"),
        ],
    )
    def test_unusable_options_end_with_status_2(
        self, arguments: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
    ) -> None:
        with pytest.raises(SystemExit) as exit_:
            main(arguments)
        assert exit_.value.code == 2
        assert message in capsys.readouterr().err

    def test_from_trace_file_to_results(
        self, serve: Serve, tokenizer_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        trace, output = tmp_path / "trace.csv", tmp_path / "results.jsonl"
        rows = [f"2023-11-16 18:17:0{i}.5,{30 + i},{2 + i}" for i in range(6)]
        trace.write_text("\n".join(["TIMESTAMP,ContextTokens,GeneratedTokens", *rows]))
        shaping = ["--window-start", "1", "--window-length", "3", "--time-scale", "0.1", "--upscale", "2"]
        server = serve(honest)
        arguments = ["--trace", str(trace), "--output", str(output), *shaping, *client_options(server, tokenizer_dir)]
        assert main(arguments) == 0
        written = [json.loads(line) for line in output.read_text().splitlines()]
        assert [row["line"] for row in written] == [3, 3, 4, 4, 5, 5]
        assert [row["copy"] for row in written] == [0, 1] * 3
        assert [row["arrival_s"] for row in written] == pytest.approx([0, 0, 0.1, 0.1, 0.2, 0.2])
        assert [row["server_prompt_tokens"] for row in written] == [31, 31, 32, 32, 33, 33]
        assert [row["server_output_tokens"] for row in written] == [3, 3, 4, 4, 5, 5]
        printed = capsys.readouterr().out
        assert "6 requests in 0.2 s" in printed
        assert "0 failed" in printed
        assert "Serving Benchmark Result" not in printed

    def test_failed_request_gives_status_1(
        self, serve: Serve, tokenizer_dir: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        server = serve(lambda r: tokens(len(r["input_ids"]), 1) if "rid" in r else honest(r))
        arguments = ["--trace", "burst", "--limit", "3", "--time-scale", "0.01", *client_options(server, tokenizer_dir)]
        assert main(arguments) == 1
        assert "failed 3 x: server generated 1 tokens, asked were " in capsys.readouterr().out

    def test_no_server_gives_status_1(self, serve: Serve, tokenizer_dir: Path) -> None:
        server = serve(lambda r: Answer([], status=500))
        assert main(["--trace", "burst", "--limit", "1", *client_options(server, tokenizer_dir)]) == 1


def result(**changes: Any) -> RequestResult:
    whole = RequestResult(
        index=0,
        line=2,
        copy=0,
        arrival_s=0.0,
        sent_s=0.0,
        prompt_tokens=10,
        output_tokens=5,
        server_prompt_tokens=10,
        server_output_tokens=5,
        cached_tokens=2,
        replica=None,
        ttft_s=0.1,
        client_ttft_s=0.1,
        latency_s=0.5,
        itl_s=(0.1,) * 4,
        error="",
    )
    return replace(whole, **changes)


class TestReport:
    def test_percentiles_are_numpys(self) -> None:
        rng = np.random.default_rng(5)
        ttfts, latencies = rng.lognormal(-2, 1, 1500), rng.lognormal(1, 1, 1500)
        outputs = rng.integers(1, 40, 1500)
        results = [
            result(
                ttft_s=float(t), latency_s=float(t + rest), output_tokens=int(n), itl_s=(float(rest),) * (int(n) - 1)
            )
            for t, rest, n in zip(ttfts, latencies, outputs, strict=True)
        ]
        summary = summarise(results)
        several = outputs > 1
        expected = {
            "ttft": ttfts,
            "tpot": latencies[several] / (outputs[several] - 1),
            "itl": np.repeat(latencies, outputs - 1),
            "e2e": ttfts + latencies,
        }
        for name, values in expected.items():
            found = getattr(summary, name)
            shown = [found.p50, found.p90, found.p99, found.p999, found.largest]
            assert shown == pytest.approx([*np.percentile(values, [50, 90, 99, 99.9]), values.max()]), name
            assert found.count == len(values)
        assert f"{1000 * np.percentile(ttfts, 99.9):.2f}" in format_summary(summary)

    def test_single_token_answers_have_no_tpot(self) -> None:
        assert result(output_tokens=1).tpot_s is None
        assert result().tpot_s == pytest.approx(0.1)
        assert summarise([result(output_tokens=1, itl_s=())]).tpot is None

    def test_failed_requests_count_in_nothing_but_failures_and_lateness(self) -> None:
        good = [result(sent_s=1.0 + i, arrival_s=1.0 + i) for i in range(3)]
        bad = result(sent_s=2.5, arrival_s=2.0, ttft_s=9.0, latency_s=0.1, error="boom")
        summary = summarise([*good, bad])
        assert (summary.requests, summary.failed) == (4, 1)
        assert summary.ttft is not None
        assert (summary.ttft.count, summary.ttft.largest) == (3, 0.1)
        assert summary.duration_s == pytest.approx(2.5)
        assert summary.requests_per_s == pytest.approx(3 / 2.5)
        assert summary.input_tokens_per_s == pytest.approx(30 / 2.5)
        assert summary.output_tokens_per_s == pytest.approx(15 / 2.5)
        assert summary.lateness.largest == pytest.approx(0.5)
        assert summary.cached_tokens == 6

    def test_offered_and_achieved_rates(self) -> None:
        late = [result(index=i, arrival_s=float(i), sent_s=2.0 * i) for i in range(11)]
        text = format_summary(summarise(late))
        assert "offered 1.00/s in 10.0 s, sent 0.50/s in 20.0 s" in text
        assert "lateness P50 5000.0 ms" in text
        assert "offered 2 at once" in format_summary(summarise([result(), result()]))

    def test_failures_are_grouped_by_cause(self) -> None:
        errors = [f"server: The input ({n} tokens) is too long" for n in (5, 17, 800)]
        errors += ["Traceback (most recent call last):\n  File\nConnectionError: refused"]
        groups = summarise([result(error=error) for error in errors]).failures
        assert [(group.count, group.example) for group in groups] == [
            (3, "server: The input (5 tokens) is too long"),
            (1, "ConnectionError: refused"),
        ]

    def test_replicas_share(self) -> None:
        summary = summarise([result(replica=1), result(replica=0), result(replica=1)])
        assert summary.per_replica == {0: 1, 1: 2}
        assert "replica 0: 1, replica 1: 2" in format_summary(summary)

    def test_few_samples_are_said_to_be_few(self) -> None:
        assert "P99.9 of 999 requests" in format_summary(summarise([result()] * 999))
        assert "P99.9 of" not in format_summary(summarise([result()] * 1000))

    def test_results_are_written_whole(self, tmp_path: Path) -> None:
        path = tmp_path / "results.jsonl"
        write_results(path, [result(), result(index=1, error="boom", ttft_s=None)])
        first, second = (json.loads(line) for line in path.read_text().splitlines())
        assert (first["lateness_s"], first["tpot_s"], first["itl_s"]) == (0.0, pytest.approx(0.1), [0.1] * 4)
        assert (second["error"], second["ttft_s"], second["tpot_s"]) == ("boom", None, None)

    def test_no_result_has_no_summary(self) -> None:
        with pytest.raises(ValueError, match="no summary"):
            report.summarise([])
