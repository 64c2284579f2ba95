"""The frame of a benchmark in rounds: about the machine first, a line of JSON per round, a report at the end."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TextIO

import numpy as np

from servers.machine import describe_machine
from servers.streams import Json, LoadError


def run_rounds(
    command: str,
    output: Path | None,
    measure: Callable[[TextIO | None], list[Json]],
    report: Callable[[Sequence[Json]], str],
) -> int:
    """The exit code: 0, or 1 where the load of a round failed.

    `measure` returns the rounds, and writes each to the file that it is given; `report` makes the tables of them.
    """
    about = describe_machine()
    print("\n".join(f"{name:<10}{value}" for name, value in about.items()), flush=True)
    lines = None if output is None else output.open("w", encoding="utf-8")
    try:
        if lines is not None:
            lines.write(json.dumps(about) + "\n")
        rows = measure(lines)
    except LoadError as error:
        print(f"{command}: {error}", file=sys.stderr)
        return 1
    finally:
        if lines is not None:
            lines.close()
    print(f"\n{report(rows)}")
    return 0


def quartiles(ours: Sequence[Json], theirs: Sequence[Json], name: str) -> list[str]:
    """The ratios of one figure ours/theirs, of rounds in the same order: P25, P50 and P75, for a table."""
    ratios = [a[name] / b[name] for a, b in zip(ours, theirs, strict=True)]
    return [f"{value:.3f}" for value in np.percentile(ratios, (25, 50, 75))]
