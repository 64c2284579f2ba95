"""The command `python -m kunserve_sgl.status URL`: prints a server's GET /kunserve/status for people."""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from typing import Any

_TIMEOUT_S = 60.0  # longer than the server waits for its replicas
_CLEAR = "\033[H\033[2J"

_COLUMNS = (
    ("replica", "id"),
    ("state", "state"),
    ("group", "group"),
    ("capacity", "capacity_tokens"),
    ("used", "slots.used"),
    ("cached", "slots.cached"),
    ("base", "slots.base"),
    ("extension", "slots.extension"),
    ("frames", "frames.total"),
    ("parameters", "frames.parameters"),
    ("kv", "frames.kv"),
    ("lent", "frames.lent"),
    ("free", "frames.free"),
)


class StatusError(Exception):
    """Says that the server gave no status; the message says why."""


def fetch_status(url: str, api_key: str | None) -> dict[str, Any]:
    """Asks the server at `url` for its status. Raises StatusError."""
    request = urllib.request.Request(f"{url.rstrip('/')}/kunserve/status")
    if api_key is not None:
        request.add_header("Authorization", f"Bearer {api_key}")
    try:
        with urllib.request.urlopen(request, timeout=_TIMEOUT_S) as answer:
            status = json.load(answer)
    except urllib.error.HTTPError as error:
        reason = {401: "a key is needed: --api-key", 404: "the server runs without KunServe"}.get(error.code, "")
        raise StatusError(f"{error.code} {reason or error.read().decode(errors='replace')}") from None
    except (OSError, ValueError) as error:
        raise StatusError(str(error)) from None
    if not isinstance(status, dict) or "replicas" not in status:
        raise StatusError("the answer is not a status of KunServe")
    return status


def render(status: dict[str, Any]) -> str:
    """Writes tables: the replicas, who executes which layers for whom, and where the KV of which slots is at home."""
    lines = [f"state {status['state']}, epoch {status['epoch']}"]
    transition = status["transition"]
    if transition is not None:
        waiting = ", ".join(f"{replica}.{rank}" for replica, rank in transition["waiting_for"])
        lines.append(
            f"transition {transition['number']} of replicas {_numbers(transition['members'])}: {transition['phase']}, "
            f"waiting for {waiting or 'nobody'}"
        )
        steps = [(each["id"], each.get("transition_step")) for each in status["replicas"]]  # a lost one has none
        lines += [f"replica {replica} is in {step}" for replica, step in steps if step]
    lines += _exchange_lines(status.get("exchange"))
    auto = status.get("auto")  # a single replica has none
    if auto is not None and auto["acts"]:
        lines.append(f"auto: {auto['decision']}: {auto['reason']}")
    replicas = status["replicas"]
    lines += [
        "",
        *_table([title for title, _ in _COLUMNS], [[_cell(r, path) for _, path in _COLUMNS] for r in replicas]),
    ]
    lines += [f"replica {replica['id']}: {replica['reason']}" for replica in replicas if replica["reason"]]
    hosts = status["hosts"]
    if any(host != replica for replica, row in enumerate(hosts) for host in row):
        rows = [[str(replica), _runs(row)] for replica, row in enumerate(hosts)]
        lines += ["", *_table(["batches of", "layers @ host"], rows)]
        slots = [[str(each["replica"]), str(each["slots"]), _runs(each["homes"])] for each in status["homes"]]
        lines += ["", *_table(["slots of", "count", "layers @ home"], slots)]
    return "\n".join(lines)


def _exchange_lines(exchange: dict[str, Any] | None) -> list[str]:
    """Says how much KV is where it is read, where some is not or was not from the start."""
    if exchange is None or not exchange["parts"]:
        return []
    why = exchange["last_failure"]
    doing = "goes on" if exchange["running"] else f"failed: {why}" if why else "rests"
    remote = sum(each["remote_bytes"] for each in exchange["replicas"].values()) / 2**20
    moved, rate = exchange["moved_bytes"] / 2**20, exchange["bytes_per_second"] / 2**20
    return [
        f"exchange {exchange['mode']}, {doing}: {exchange['parts_done']} of {exchange['parts']} parts of KV are where "
        f"they are read, and {remote:.1f} MiB are read through mapped memory; {moved:.1f} MiB moved at {rate:.1f} MiB/s"
    ]


def _cell(replica: dict[str, Any], path: str) -> str:
    value: Any = replica
    for name in path.split("."):
        value = value.get(name) if isinstance(value, dict) else None
    if value is None:  # a replica that has ended tells nothing
        return "-"
    return _numbers(value) if isinstance(value, list) else str(value)


def _numbers(values: Sequence[int]) -> str:
    return ",".join(map(str, values))


def _runs(row: Sequence[int]) -> str:
    """Writes the layer hosts of layers in runs: `0-3 @ 0, 4-7 @ 1` for eight layers."""
    parts = []
    for owner, run in itertools.groupby(enumerate(row), key=lambda each: each[1]):
        layers = [layer for layer, _ in run]
        span = str(layers[0]) if len(layers) == 1 else f"{layers[0]}-{layers[-1]}"
        parts.append(f"{span} @ {owner}")
    return ", ".join(parts)


def _table(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(row[column]) for row in (titles, *rows)) for column in range(len(titles))]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in (titles, *rows)
    ]


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command, on `sys.argv` where `argv` is None, and returns its exit code: 1 where the server gave no
    status."""
    parser = argparse.ArgumentParser(prog="python -m kunserve_sgl.status", description=__doc__)
    parser.add_argument("url", help="address of the server, such as http://127.0.0.1:30000")
    parser.add_argument("--api-key", help="the server's --admin-api-key, or its --api-key where it has no other")
    parser.add_argument("--watch", action="store_true", help="print it again and again, until interrupted")
    parser.add_argument("--interval", type=float, default=1.0, metavar="SECONDS", help="between two prints; default 1")
    arguments = parser.parse_args(argv)
    if arguments.interval <= 0:
        parser.error(f"--interval {arguments.interval}: accepted: seconds, more than 0")
    url = arguments.url if "://" in arguments.url else f"http://{arguments.url}"
    while True:
        try:
            text = render(fetch_status(url, arguments.api_key))
        except StatusError as error:
            print(f"{url}: {error}", file=sys.stderr)
            if not arguments.watch:
                return 1
        else:
            print((_CLEAR if arguments.watch and sys.stdout.isatty() else "") + text, flush=True)
        if not arguments.watch:
            return 0
        try:
            time.sleep(arguments.interval)
        except KeyboardInterrupt:
            return 0


if __name__ == "__main__":
    sys.exit(main())
