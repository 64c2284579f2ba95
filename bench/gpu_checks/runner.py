"""Runs checks one after the other, each in a process of its own with a deadline, and makes a table of what they found.

A check's process writes its result as JSON (`Result`) before it ends. What such a process has started ends with it,
also where it is killed at its deadline.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any

from servers.server import GuardedProcess, ServerError

_GRACE_S = 3.0


class Status(str, Enum):
    """How a check has ended."""

    PASSED = "passed"
    FAILED = "failed"
    SKIPPED = "skipped"


@dataclass(frozen=True)
class Check:
    """What a check is called, what it is about, and after how many seconds it is killed."""

    name: str
    title: str
    deadline_s: float


@dataclass(frozen=True)
class Table:
    """Figures for the report, below a title."""

    title: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True)
class Result:
    """What a check has found. `reason` says why it failed or was skipped. `figures` are one line of the report;
    `skipped` are parts that make no sense on this device, by name, with the reason."""

    status: Status
    reason: str = ""
    figures: Mapping[str, str] = field(default_factory=dict)
    tables: Sequence[Table] = ()
    skipped: Mapping[str, str] = field(default_factory=dict)
    data: Mapping[str, Any] = field(default_factory=dict)

    def write(self, path: Path, **more: Any) -> None:
        """Write it to `path` as JSON, with `more` fields, entirely or not at all."""
        partial = path.with_suffix(".partial")
        partial.write_text(json.dumps({**asdict(self), **more}, indent=1) + "\n", encoding="utf-8")
        partial.replace(path)


@dataclass(frozen=True)
class Run:
    """A check that has been run: a result, and the seconds that it took."""

    check: Check
    result: Result
    seconds: float


def result_path(output: Path, name: str) -> Path:
    """The file with the result of the check of that name."""
    return output / f"{name}.json"


def run_checks(
    checks: Sequence[Check], command: Callable[[Check], Sequence[str]], env: Mapping[str, str], output: Path
) -> list[Run]:
    """Run the checks in order, up to the first that fails, which is the last of those returned.

    `command` makes the command that runs one check; `env` is added to the environment. Each leaves NAME.json and
    NAME.log in `output`; what an earlier run of the same checks has left there is removed first.
    """
    for check in checks:
        result_path(output, check.name).unlink(missing_ok=True)
    runs: list[Run] = []
    for check in checks:
        print(f"{check.name} {check.title} (at most {check.deadline_s:g} s)", flush=True)
        run = _run(check, command(check), env, output)
        runs.append(run)
        said = " ".join(filter(None, [run.result.status.value, run.result.reason]))
        print(f"{check.name} {said}, {run.seconds:.1f} s", flush=True)
        if run.result.status is Status.FAILED:
            break
    return runs


def _run(check: Check, command: Sequence[str], env: Mapping[str, str], output: Path) -> Run:
    log, path = output / f"{check.name}.log", result_path(output, check.name)
    log.unlink(missing_ok=True)
    process = GuardedProcess(command, env=env, log_path=log, grace_s=_GRACE_S)
    began_s = time.monotonic()
    problem = ""
    try:
        with process:
            status = process.wait_end(check.deadline_s)
            if status is None:
                problem = f"it has not ended after {check.deadline_s:g} s, and was killed"
            elif status:
                problem = f"it ended with status {status}: {process.log_tail(1)}"
    except ServerError as error:
        problem = str(error)
    seconds = time.monotonic() - began_s
    result = read_result(path)
    if result is None:
        result = Result(Status.FAILED, problem or "it ended without a result")
    elif problem and result.status is not Status.FAILED:
        result = Result(Status.FAILED, problem, result.figures, result.tables, result.skipped, result.data)
    result.write(path, check=check.name, title=check.title, deadline_s=check.deadline_s, seconds=seconds)
    return Run(check, result, seconds)


def read_result(path: Path) -> Result | None:
    """The result in `path`; None where no check has written one.

    Raises:
        ValueError: the file holds something else.
    """
    if not path.exists():
        return None
    found = json.loads(path.read_text(encoding="utf-8"))
    try:
        return Result(
            Status(found["status"]),
            found["reason"],
            found["figures"],
            tuple(Table(**table) for table in found["tables"]),
            found["skipped"],
            found["data"],
        )
    except (KeyError, TypeError) as error:
        raise ValueError(f"{path}: not the result of a check: {type(error).__name__}: {error}") from error


def read_runs(checks: Iterable[Check], output: Path) -> list[Run]:
    """Those of `checks` that have been run with results in `output`, by whatever command."""
    runs = []
    for check in checks:
        path = result_path(output, check.name)
        result = read_result(path)
        if result is not None:
            runs.append(Run(check, result, float(json.loads(path.read_text(encoding="utf-8"))["seconds"])))
    return runs


def markdown(runs: Sequence[Run], checks: Sequence[Check], about: Mapping[str, str]) -> str:
    """The report: where it was measured, a table with a row per check, then the checks' own tables."""
    done = {run.check.name: run for run in runs}
    rows = []
    for check in checks:
        run = done.get(check.name)
        if run is None:
            rows.append([check.name, check.title, "not run", "", ""])
        else:
            found = [f"{name} {value}" for name, value in run.result.figures.items()]
            found += [f"{name} skipped: {why}" for name, why in run.result.skipped.items()]
            rows.append(
                [
                    *(check.name, check.title, run.result.status.value, f"{run.seconds:.1f}"),
                    "; ".join([*([run.result.reason] if run.result.reason else []), *found]),
                ]
            )
    parts = [
        "\n".join(f"- {name}: {value}" for name, value in about.items()),
        _table(["check", "what", "result", "s", "found"], rows),
    ]
    for run in runs:
        parts += [
            f"### {run.check.name}: {table.title}\n\n{_table(table.head, table.rows)}" for table in run.result.tables
        ]
    return "\n\n".join(parts) + "\n"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(" ".join(cell.split()).replace("|", "\\|") for cell in cells) + " |"

    return "\n".join([line(head), line(["---"] * len(head)), *map(line, rows)])
