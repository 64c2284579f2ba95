"""What an exchange costs, for transition.py: KV of all layers that have moved goes to where it is read while requests
run, against a plain copy of as many bytes, and what these requests see of it."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence

import numpy as np

from comparison.gaps import gaps_within, milliseconds
from comparison.restores import plain_copy_s
from servers.streams import Controls, Json, LoadError, Stream, table

LOAD = "exchange"
FLAGS = ("--kunserve-exchange", "on")
_POLL_S = 0.01
_QUIET_S = 1.0  # after the last transition in the log, before the server is asked whether that was all
_DEADLINE_S = 300.0


def measure(
    number: int,
    controls: Controls,
    merge: Json,
    runners: Sequence[Stream],
    advance: Callable[[Sequence[Stream], int], None],
) -> Json:
    """A row: drops, waits until all KV is where it is read, lets the requests go on for as many tokens as they got
    meanwhile, and restores. `advance` waits for so many more tokens of each, and at least for some. The server has to
    run with `FLAGS`. It is asked for nothing while it exchanges, since answers take time of batches."""
    before = controls.status()["exchange"]
    began_s = max(runner.times_s[0] for runner in runners)
    advance(runners, 0)
    drop = controls.drop(merge)
    done_s, ended = _wait_for_all(controls, drop.answered_s)
    advance(runners, sum(drop.answered_s < at_s <= done_s for at_s in runners[0].times_s))
    gaps = [gap for runner in runners for gap in runner.gaps]
    ends_s = min(runner.times_s[-1] for runner in runners)
    if any(runner.finished for runner in runners) or ends_s < done_s:
        raise LoadError("a request ended before the exchange did: more base slots are needed")
    restore = controls.restore()
    moved_bytes = ended["moved_bytes"] - before["moved_bytes"]
    return {
        "round": number,
        "load": LOAD,
        **drop.row,
        "moved_bytes": moved_bytes,
        "exchange_s": done_s - drop.answered_s,
        "plain_s": plain_copy_s(moved_bytes),
        "parts": ended["parts"],
        "parts_done": ended["parts_done"],
        "gaps_before_s": gaps_within(gaps, began_s, drop.ordered_s),
        "gaps_meanwhile_s": gaps_within(gaps, drop.answered_s, done_s),
        "gaps_after_s": gaps_within(gaps, done_s, ends_s),
        "restore_s": restore.answered_s - restore.ordered_s,
    }


def _wait_for_all(controls: Controls, since_s: float) -> tuple[float, Json]:
    """Returns when the last transition was in the log, and what the status says then."""
    ends_at_s = time.perf_counter() + _DEADLINE_S
    count, changed_s = controls.ended_transitions(), since_s
    while True:
        now_s = time.perf_counter()
        if (ended := controls.ended_transitions()) != count:
            count, changed_s = ended, now_s
        elif now_s > changed_s + _QUIET_S:
            status: Json = controls.status()["exchange"]
            if not status["running"] and status["parts_done"] == status["parts"] > 0:
                return changed_s, status
            if status["last_failure"]:
                raise LoadError(f"the exchange failed: {status['last_failure']}")
            if not status["running"]:
                where = f"{status['parts_done']} of {status['parts']} parts"
                raise LoadError(f"the exchange has ended with {where}: fewer base slots, or more layers, are needed")
        if now_s > ends_at_s:
            raise LoadError(f"the exchange has not ended within {_DEADLINE_S:g} s")
        time.sleep(_POLL_S)


def report(rows: Sequence[Json]) -> str:
    """The tables of the rows that `measure` gave; empty where there are none."""
    mine = [row for row in rows if row["load"] == LOAD]
    if not mine:
        return ""
    costs, seen = [], []
    for key in dict.fromkeys((row["layers"], row["hidden"]) for row in mine):
        each = [row for row in mine if (row["layers"], row["hidden"]) == key]
        model = f"{key[0]} layers, hidden {key[1]}"
        seconds, plain = ([row[name] for row in each] for name in ("exchange_s", "plain_s"))
        size = each[0]["moved_bytes"] / 2**20
        costs.append(
            [
                *(model, len(each), each[0]["parts"], f"{size:.1f}"),
                *(milliseconds(seconds, p) for p in (50, 100)),
                f"{size / statistics.median(seconds):.0f}",
                f"{size / statistics.median(plain):.0f}",
                *(milliseconds([row["restore_s"] for row in each], p) for p in (50, 100)),
            ]
        )
        phases = ([gap for row in each for gap in row[f"gaps_{name}_s"]] for name in ("before", "meanwhile", "after"))
        changes = [_change(row) for row in each if row["gaps_meanwhile_s"] and row["gaps_after_s"]]
        seen.append(
            [
                *(model, *(milliseconds(gaps, p) for gaps in phases for p in (50, 99, 100))),
                *(f"{float(np.percentile(changes, p)):+.1%}" if changes else "-" for p in (50, 0, 100)),
            ]
        )
    titles = ["exchange", "n", "parts", "MiB", "ms P50", "max", "MiB/s", "plain copy", "restore ms P50", "max"]
    columns = [title for name in ("before", "meanwhile", "after") for title in (f"{name} P50", "P99", "max")]
    columns += ["TPOT meanwhile to after P50", "min", "max"]
    return f"{table(titles, costs)}\n\n{table(['gaps between tokens, ms', *columns], seen)}"


def _change(row: Json) -> float:
    """Compares the time per token meanwhile and after, in one round: both merged."""
    return statistics.mean(row["gaps_meanwhile_s"]) / statistics.mean(row["gaps_after_s"]) - 1
