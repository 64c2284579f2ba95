"""Sends a trace through SGLang's benchmark client."""

from __future__ import annotations

import contextlib
import io
import os
import sys
import uuid
from argparse import Namespace
from collections.abc import Callable, Sequence

from workload.load import flag
from workload.report import RequestResult
from workload.traces import Trace, TraceError

# Options of the client that contradict a replay, by the name they have in its parsed arguments.
_REFUSED_CLIENT_OPTIONS = {
    "backend": "prompts are token ids for SGLang's /generate",
    "dataset_name": "the dataset is the trace",
    "dataset_path": "the dataset is the trace",
    "num_prompts": "use --limit",
    "request_rate": "arrivals are the trace's; use --time-scale",
    "use_trace_timestamps": "arrival times are always kept",
    "max_concurrency": "it would delay arrivals",
    "disable_ignore_eos": "output lengths are the trace's",
    "disable_stream": "without streaming there is no time to first token",
}


def replay(
    trace: Trace,
    client_args: Namespace,
    *,
    request_timeout_s: float,
    keep_cache: bool = False,
    show_client: bool = False,
    on_start: Callable[[], None] | None = None,
) -> list[RequestResult]:
    """Send `trace` with SGLang's client and return one result per request.

    `on_start` is called when the arrivals begin, after warm-up and flush.

    Raises:
        client.ReplayError: the replay could not be run.
        SystemExit: the client gave up (its own message has been printed).
    """
    from workload.client import Replay

    client_args.flush_cache = not keep_cache
    # The client always writes a file, and names it itself if it is given none.
    client_args.output_file = client_args.output_file or os.devnull
    # The run's part of the request ids keeps them apart from those of an earlier run on the same server.
    run = Replay(
        trace,
        seed=client_args.seed,
        request_timeout_s=request_timeout_s,
        run_name=f"replay-{uuid.uuid4().hex[:8]}",
        on_start=on_start,
    )
    printed = io.StringIO()
    with contextlib.nullcontext() if show_client else contextlib.redirect_stdout(printed):
        try:
            run.run(client_args)
        except SystemExit:
            sys.stderr.write(printed.getvalue())
            raise
    return run.results


def parse_client_options(arguments: Sequence[str]) -> Namespace:
    """Parse the client's options and refuse those that contradict a replay.

    Raises:
        TraceError: an option is refused, with the reason.
        SystemExit: the client does not know an option (it has printed why).
    """
    # The client's module takes seconds to import; a wrong option of ours should not wait for it.
    from workload.client import parse_client_args

    defaults, given = vars(parse_client_args([])), parse_client_args(arguments)
    for name, reason in _REFUSED_CLIENT_OPTIONS.items():
        if getattr(given, name) != defaults[name]:
            raise TraceError(f"{flag(name)} cannot be used in a replay: {reason}")
    return given
