"""What the commands of long runs have in common: a server of a model whose answers end, and clients that know them."""

from __future__ import annotations

import signal
import sys
import tempfile
import time
from argparse import Namespace
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from random import Random
from typing import Any, TypeVar

from tqdm import tqdm

from long_run.load import Load
from long_run.report import Bounds
from long_run.requests import Sizes
from long_run.watch import flush, memory_of, status_of, wait_reported
from servers.machine import describe_machine
from servers.progress import WaitProgress
from servers.server import ServerError, ServerProcess, find_free_port

Found = TypeVar("Found")
_START_DEADLINE_S = 600.0
_REPORT_DEADLINE_S = 60.0
# SGLang's own checks for leaks, also while requests run, and at every page.
_CHECKS = {"SGLANG_ENABLE_STRICT_MEM_CHECK_DURING_BUSY": "1", "SGLANG_CHECK_KV_PAGE_INVARIANTS": "1"}


def begin(server: ServerProcess, args: Namespace, seed: int) -> tuple[dict[str, Any], Load]:
    """What memory and plan of the server are at rest, once it is ready, and clients that have learnt its answers.

    Raises:
        ServerError: it did not become healthy, or the idle server gave no answers.
    """
    with WaitProgress("starting") as on_wait:
        server.wait_healthy(_START_DEADLINE_S, on_wait=on_wait)
    wait_reported(server.base_url, _REPORT_DEADLINE_S)
    flush(server.base_url)
    at_start = memory_of(status_of(server.base_url))
    load = Load(
        server.base_url,
        sizes=Sizes(args.tokens),
        answers=args.answers,
        clients=args.clients,
        deadline_s=args.deadline,
        seed=seed,
        clock=time.monotonic,
    )
    with tqdm(total=load.known_requests, desc="answers of the idle server", file=sys.stderr) as bar:
        load.learn(lambda: bar.update(1))
    return at_start, load


def bounds_of(args: Namespace) -> Bounds:
    """The growth that is allowed."""
    return Bounds(round(args.most_growth * 2**20), args.most_files)


def run(
    name: str,
    args: Namespace,
    server_command: Callable[[Path, int, Namespace], list[str]],
    measure: Callable[[ServerProcess, Namespace, int], Found],
    write: Callable[[Found, Namespace, dict[str, str]], Sequence[str]],
) -> int:
    """Starts the server, measures and writes; the exit code is 0 if `write` has found nothing wrong, else 1."""
    seed = Random().randrange(1 << 32) if args.seed is None else args.seed
    about = {**describe_machine(), "seed": str(seed)}
    print(f"seed      {seed}", flush=True)
    # As Ctrl-C: the default action of SIGTERM would end this process without its clean-up.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    args.output_dir.mkdir(parents=True, exist_ok=True)
    log_path = args.output_dir / "server.log"
    log_path.unlink(missing_ok=True)
    # Imported late: it takes seconds, and a wrong option should be refused at once.
    from long_run.ending_model import write_ending_model

    try:
        with tempfile.TemporaryDirectory(prefix=f"{name}-") as directory:
            model = args.model_path or Path(directory) / "model"
            about["model"] = str(model) if args.model_path else write_ending_model(model)
            port = find_free_port()
            command = server_command(model, port, args)
            env = {"OMP_NUM_THREADS": "1", **_CHECKS}
            with ServerProcess(command, port=port, env=env, log_path=log_path) as server:
                found = measure(server, args, seed)
    except ServerError as error:
        print(f"{name}.py: {error}", file=sys.stderr)
        return 1
    return 1 if write(found, args, about) else 0


def tell(args: Namespace, about: Mapping[str, str], tables: str, wrong: Sequence[str]) -> None:
    """Prints the tables with what they are about and what is wrong, and writes that to table.txt."""
    verdict = ["all is as it should be"] if not wrong else ["not as it should be:", *wrong]
    text = "\n".join([*(f"{name:<9} {value}" for name, value in about.items()), "", tables, "", *verdict])
    (args.output_dir / "table.txt").write_text(text + "\n", encoding="utf-8")
    print(text, flush=True)
