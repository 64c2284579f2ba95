"""Attaches trace replay to SGLang's own benchmark client (`sglang.benchmark.serving`, 0.5.17).

The client sends the requests, keeps the clock and shows the progress. What is added, by assigning to
attributes of its module for the time of one run:

- a dataset, which its command line has no name for (the choices of `--dataset-name` are fixed);
- arrival times: its `get_request` can keep them, but `benchmark()` never asks it to;
- an observer of the streamed answers. An error inside a stream arrives with HTTP status 200, and the client
  then counts the request as a success with the asked number of tokens; and it takes the first chunk with text
  for the first token, which for a token that is no complete character is too late;
- deadlines on requests, on control calls, and on the cache flush after the warm-up.
"""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import sys
import time
import warnings
from argparse import Namespace
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import orjson
import requests
import sglang

from workload.prompts import PromptBuilder, plain_token_ids
from workload.report import RequestResult
from workload.traces import Trace, TraceRequest

with warnings.catch_warnings():
    # On import SGLang names the quantisations that need a GPU. A client needs none.
    warnings.simplefilter("ignore", UserWarning)
    from sglang.benchmark import datasets, serving
    from sglang.benchmark.datasets.common import BaseDataset, DatasetRow

DATASET_NAME = "trace-replay"
BACKEND = "sglang"
_CONTROL_TIMEOUT_S = 600.0
_FLUSH_IDLE_TIMEOUT_S = 300.0


class ReplayError(RuntimeError):
    """The replay could not be run; the message says what has to change."""


@dataclass
class _Observation:
    """What the server said in the stream of one request; times are `time.perf_counter()` seconds."""

    prompt_tokens: int | None = None
    output_tokens: int | None = None
    cached_tokens: int | None = None
    replica: int | None = None
    first_token_at_s: float | None = None
    last_token_at_s: float = 0.0
    itl_s: list[float] = field(default_factory=list)
    output_ids: Sequence[int] = ()
    error: str = ""

    def note(self, message: Any, now_s: float) -> None:
        """Take in one parsed message of the stream."""
        if not isinstance(message, dict):
            return
        if "error" in message:
            error = message["error"]
            self.error = f"server: {error.get('message', error) if isinstance(error, dict) else error}"
        meta = message.get("meta_info")
        if not isinstance(meta, dict):
            return
        self.prompt_tokens = meta.get("prompt_tokens", self.prompt_tokens)
        self.cached_tokens = meta.get("cached_tokens", self.cached_tokens)
        self.replica = meta.get("dp_rank", self.replica)
        # Every chunk holds all tokens so far.
        self.output_ids = message.get("output_ids", self.output_ids)
        reason = meta.get("finish_reason")
        if isinstance(reason, dict) and reason.get("type") == "abort":
            self.error = f"server aborted: {reason.get('message', reason)}"
        before, after = self.output_tokens or 0, meta.get("completion_tokens", 0)
        if after > before:
            if self.first_token_at_s is None:
                self.first_token_at_s = now_s
            else:
                self.itl_s += [(now_s - self.last_token_at_s) / (after - before)] * (after - before)
            self.last_token_at_s = now_s
        self.output_tokens = after


_observed: ContextVar[_Observation | None] = ContextVar("observed_request", default=None)


class _ObservingJson:
    """Stands in for `orjson` in the client's module: parses alike, and shows each message to the observer."""

    @staticmethod
    def loads(data: bytes | str) -> Any:
        message = orjson.loads(data)
        observation = _observed.get()
        if observation is not None:
            observation.note(message, time.perf_counter())
        return message

    def __getattr__(self, name: str) -> Any:
        return getattr(orjson, name)


class _RequestsWithDeadline:
    """Stands in for `requests` in the client's module, whose control calls have no timeout."""

    def __getattr__(self, name: str) -> Any:
        return getattr(requests, name)

    @staticmethod
    def get(url: str, **options: Any) -> requests.Response:
        return requests.get(url, **{"timeout": _CONTROL_TIMEOUT_S, **options})

    @staticmethod
    def post(url: str, **options: Any) -> requests.Response:
        return requests.post(url, **{"timeout": _CONTROL_TIMEOUT_S, **options})


class Replay:
    """One run of the benchmark client over given requests, and what came of it."""

    def __init__(
        self,
        trace: Trace,
        *,
        seed: int,
        request_timeout_s: float,
        run_name: str,
        on_start: Callable[[], None] | None = None,
    ) -> None:
        self._requests = trace.requests
        self._hash_block_tokens = trace.hash_block_tokens
        self._seed = seed
        self._request_timeout_s = request_timeout_s
        self._run_name = run_name
        self._on_start = on_start
        self._started_at_s: float | None = None
        self._results: dict[int, RequestResult] = {}

    def __repr__(self) -> str:
        # The client prints its arguments, of which this is one.
        return f"Replay({len(self._requests)} requests)"

    @property
    def complete(self) -> bool:
        """Whether every request has a result."""
        return len(self._results) == len(self._requests)

    @property
    def results(self) -> list[RequestResult]:
        """Results in order of arrival, of the requests that have one."""
        return [self._results[index] for index in sorted(self._results)]

    def rows(self, tokenizer: Any) -> list[DatasetRow]:
        """The client's dataset: token-id prompts of exact length, with arrival times in milliseconds."""
        token_ids = plain_token_ids(tokenizer)
        builder = PromptBuilder(token_ids, self._seed, hash_block_tokens=self._hash_block_tokens)
        return [
            DatasetRow(
                prompt=builder.build(request),
                prompt_len=request.prompt_tokens,
                output_len=request.output_tokens,
                timestamp=request.arrival_s * 1000.0,
                # The request id finds the request again in the client's calls and in the server's log. The
                # warm-up request has none, as the client builds it from the global extras only.
                extra_request_body={"rid": f"{self._run_name}-{index}"},
            )
            for index, request in enumerate(self._requests)
        ]

    def run(self, client_args: Namespace) -> None:
        """Run the client. `client_args` is what its command line gave; dataset and arrivals are set here.

        Raises:
            ReplayError: this is not the client it was written for, or the client never sent the requests.
        """
        client_args.dataset_name = DATASET_NAME
        client_args.trace_replay = self
        client_args.num_prompts = len(self._requests)
        try:
            with self._attached():
                serving.run_benchmark(client_args)
        except IndexError:
            # The client's own summary takes percentiles of successful requests and fails if there are none.
            if not self.complete or any(not result.failed for result in self._results.values()):
                raise
        except ValueError as error:
            if not str(error).startswith("Warmup failed"):
                raise
            raise ReplayError(f"the server did not answer the warm-up request: {error}") from error
        except requests.RequestException as error:
            raise ReplayError(f"a control call of the benchmark client failed: {error}") from error
        if not self.complete:
            raise ReplayError(
                f"SGLang's benchmark client sent {len(self._results)} of {len(self._requests)} requests "
                f"through the replay; sglang {sglang.__version__} does not call what it is attached to"
            )

    @contextlib.contextmanager
    def _attached(self) -> Iterator[None]:
        if "use_trace_timestamps" not in inspect.signature(serving.get_request).parameters:
            raise ReplayError(f"get_request of sglang {sglang.__version__} cannot keep arrival times; needed: 0.5.17")
        replaced = {
            "get_request": self._arrivals(serving.get_request),
            "orjson": _ObservingJson(),
            "requests": _RequestsWithDeadline(),
            "flush_server_cache": _flush_when_idle,
            # Prompts are token ids, so whether there is a template does not matter; for a model that is known
            # by its served name only, the client would look for one in the Hugging Face hub.
            "check_chat_template": lambda _model: True,
        }
        missing = [name for name in replaced if not hasattr(serving, name)]
        if missing:
            raise ReplayError(
                f"sglang.benchmark.serving of sglang {sglang.__version__} has no {missing}; needed: 0.5.17"
            )
        originals = {name: getattr(serving, name) for name in replaced}
        send = serving.ASYNC_REQUEST_FUNCS[BACKEND]
        try:
            for name, value in replaced.items():
                setattr(serving, name, value)
            serving.ASYNC_REQUEST_FUNCS[BACKEND] = self._observing(send)
            datasets.DATASET_MAPPING[DATASET_NAME] = _TraceDataset
            yield
        finally:
            for name, value in originals.items():
                setattr(serving, name, value)
            serving.ASYNC_REQUEST_FUNCS[BACKEND] = send
            datasets.DATASET_MAPPING.pop(DATASET_NAME, None)

    def _arrivals(self, get_request: Callable[..., AsyncIterator[DatasetRow]]) -> Callable[..., Any]:
        async def arrivals(
            rows: list[DatasetRow], _request_rate: float, *_: Any, **__: Any
        ) -> AsyncIterator[DatasetRow]:
            if self._on_start is not None:
                self._on_start()
            self._started_at_s = time.perf_counter()
            async for row in get_request(rows, float("inf"), use_trace_timestamps=True, slowdown_factor=1.0):
                yield row

        return arrivals

    def _observing(self, send: Callable[..., Any]) -> Callable[..., Any]:
        async def observing(request_func_input: Any, pbar: Any = None) -> Any:
            observation = _Observation()
            # Each request is a task of its own, so the variable is seen by this request's parsing only.
            _observed.set(observation)
            called_at_s = time.perf_counter()
            try:
                output = await asyncio.wait_for(send(request_func_input, pbar=pbar), self._request_timeout_s)
            except asyncio.TimeoutError:
                output = serving.RequestFuncOutput.init_new(request_func_input)
                output.start_time = called_at_s
                output.error = f"no complete answer within {self._request_timeout_s:g} s"
                if pbar is not None:
                    pbar.update(1)
            rid = request_func_input.extra_request_body.get("rid")
            if rid is not None:
                self._keep(int(rid.rsplit("-", 1)[1]), output, observation)
            elif observation.error:
                # The warm-up: without this the client takes an error inside the stream for a success.
                output.success, output.error = False, observation.error
            return output

        return observing

    def _keep(self, index: int, output: Any, seen: _Observation) -> None:
        request = self._requests[index]
        assert self._started_at_s is not None, "a traced request was sent before the arrivals began"
        error = seen.error or output.error or ("" if output.success else "the client gave no reason")
        if not error:
            error = _mismatch(request, seen)
        # The client's own counts and progress must not call a failed request a success.
        output.success, output.error = not error, error
        self._results[index] = RequestResult(
            index=index,
            line=request.line,
            copy=request.copy,
            arrival_s=request.arrival_s,
            sent_s=output.start_time - self._started_at_s,
            prompt_tokens=request.prompt_tokens,
            output_tokens=request.output_tokens,
            server_prompt_tokens=seen.prompt_tokens,
            server_output_tokens=seen.output_tokens,
            cached_tokens=seen.cached_tokens,
            replica=seen.replica,
            ttft_s=None if seen.first_token_at_s is None else seen.first_token_at_s - output.start_time,
            client_ttft_s=output.ttft or None,
            latency_s=output.latency or None,
            itl_s=tuple(seen.itl_s),
            error=error,
            output_ids=tuple(seen.output_ids),
        )


class _TraceDataset(BaseDataset):  # type: ignore[misc]
    """The dataset as the client asks for it: by its arguments, then by tokenizer."""

    def __init__(self, replay: Replay) -> None:
        self._replay = replay

    @classmethod
    def from_args(cls, args: Namespace) -> _TraceDataset:
        return cls(args.trace_replay)

    def load(self, tokenizer: Any, model_id: str | None = None) -> list[DatasetRow]:
        return self._replay.rows(tokenizer)


def parse_client_args(arguments: Sequence[str]) -> Namespace:
    """Parse arguments with the client's own command line, without running it.

    Raises:
        SystemExit: the client refuses them (it has printed why).
    """
    parsed: list[Namespace] = []
    original_run, original_argv = serving.run_benchmark, sys.argv
    serving.run_benchmark = parsed.append
    sys.argv = ["replay.py", *arguments]
    try:
        serving.cli_main()
    finally:
        serving.run_benchmark, sys.argv = original_run, original_argv
    return parsed[0]


def _mismatch(request: TraceRequest, seen: _Observation) -> str:
    if seen.prompt_tokens is None or seen.output_tokens is None:
        return "the server's stream ended without token counts"
    if seen.prompt_tokens != request.prompt_tokens:
        return f"server counted {seen.prompt_tokens} prompt tokens, sent were {request.prompt_tokens}"
    if seen.output_tokens != request.output_tokens:
        return f"server generated {seen.output_tokens} tokens, asked were {request.output_tokens}"
    return ""


def _flush_when_idle(base_url: str, _backend: str) -> None:
    # The server refuses to flush while the last warm-up batch is being retired; it can wait for that itself.
    response = requests.post(
        f"{base_url}/flush_cache",
        params={"timeout": _FLUSH_IDLE_TIMEOUT_S},
        headers=serving.get_auth_headers(),
        timeout=_CONTROL_TIMEOUT_S,
    )
    if response.status_code != requests.codes.ok:
        raise ReplayError(f"the server did not flush its cache before the replay: {response.text.strip()[:300]}")
