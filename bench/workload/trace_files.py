"""Recorded traces on disk: reads Azure CSV, BurstGPT CSV and Mooncake JSONL, names every unusable row."""

from __future__ import annotations

import contextlib
import csv
import enum
import json
import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import datetime, timedelta, timezone
from pathlib import Path

from workload.traces import DEFAULT_HASH_BLOCK_TOKENS, Trace, TraceError, TraceRequest

_EXAMPLES_KEPT = 3
_EPOCH = datetime(1970, 1, 1, tzinfo=timezone.utc)
_WHOLE = re.compile(r"[0-9]+", re.ASCII)
_DATE_TIME = re.compile(r"(\d{4}-\d\d-\d\d[ T]\d\d:\d\d:\d\d)(\.\d+)?(Z|[+-]\d\d:\d\d)?", re.ASCII)


class TraceFormat(enum.Enum):
    """Recorded formats and the columns (or keys) that identify them."""

    AZURE = "azure"
    BURSTGPT = "burstgpt"
    MOONCAKE = "mooncake"


_CSV_COLUMNS = {
    TraceFormat.AZURE: ("TIMESTAMP", "ContextTokens", "GeneratedTokens"),
    TraceFormat.BURSTGPT: ("Timestamp", "Request tokens", "Response tokens"),
}


class _RowError(ValueError):
    """One row cannot be used; the reader adds file and line."""


@dataclass
class _Row:
    """One parsed row; `time_s` is absolute."""

    time_s: float
    prompt_tokens: int
    output_tokens: int
    hash_ids: tuple[int, ...] = ()


@dataclass
class _Counts:
    """What the reader did not keep, for the notes."""

    rows: int = 0
    without_output: int = 0
    out_of_order: int = 0
    malformed: int = 0
    examples: list[str] = field(default_factory=list)


def read_trace(
    path: Path,
    trace_format: TraceFormat | None = None,
    *,
    skip_malformed: bool = False,
    hash_block_tokens: int = DEFAULT_HASH_BLOCK_TOKENS,
) -> Trace:
    """Read a recorded trace; the format is taken from the first line unless given.

    Requests that generated nothing in the recording (BurstGPT marks failed requests so) are left out and
    counted in the notes. Rows out of order are sorted and counted.

    Raises:
        TraceError: the file cannot be read, its format is unknown, or a row is malformed (file and line are
            named) and `skip_malformed` is not set.
    """
    if hash_block_tokens < 1:
        raise TraceError(f"hash_block_tokens is {hash_block_tokens}; accepted is a whole number of at least 1")
    found = trace_format if trace_format is not None else detect_format(path)
    counts = _Counts()
    requests: list[TraceRequest] = []
    origin_s: float | None = None
    latest_s = -math.inf
    for line, parsed in _rows(path, found, hash_block_tokens):
        counts.rows += 1
        if isinstance(parsed, _RowError):
            message = f"{path}:{line}: {parsed}"
            if not skip_malformed:
                raise TraceError(f"{message} (--skip-malformed leaves such rows out and counts them)")
            counts.malformed += 1
            if len(counts.examples) < _EXAMPLES_KEPT:
                counts.examples.append(message)
            continue
        if origin_s is None:
            origin_s = parsed.time_s
        arrival_s = parsed.time_s - origin_s
        counts.out_of_order += arrival_s < latest_s
        latest_s = max(latest_s, arrival_s)
        if parsed.output_tokens == 0:
            counts.without_output += 1
            continue
        requests.append(
            TraceRequest(arrival_s, parsed.prompt_tokens, parsed.output_tokens, line, hash_ids=parsed.hash_ids)
        )
    if not requests:
        raise TraceError(f"{path}: holds no request to replay ({'; '.join(_notes(counts)) or 'no row'})")
    requests.sort(key=lambda request: request.arrival_s)
    return Trace(f"{path.name} ({found.value})", tuple(requests), _notes(counts), hash_block_tokens)


def detect_format(path: Path) -> TraceFormat:
    """The format the first line shows.

    Raises:
        TraceError: the file cannot be read, is empty, or its first line is none of the known ones.
    """
    with _opened(path) as lines:
        first = next(lines, "").strip()
    if not first:
        raise TraceError(f"{path}:1: the first line is empty; accepted is {_accepted()}")
    if first.startswith("{"):
        try:
            keys = set(json.loads(first))
        except ValueError as error:
            raise TraceError(f"{path}:1: is not valid JSON ({error})") from error
        if {"timestamp", "input_length", "output_length"} <= keys:
            return TraceFormat.MOONCAKE
    else:
        columns = {name.strip() for name in first.split(",")}
        for candidate, names in _CSV_COLUMNS.items():
            if set(names) <= columns:
                return candidate
    raise TraceError(f"{path}:1: unknown trace format, the first line is {first[:120]!r}; accepted is {_accepted()}")


def _notes(counts: _Counts) -> tuple[str, ...]:
    notes = []
    if counts.without_output:
        notes.append(f"{counts.without_output} of {counts.rows} rows left out: no token generated (failed requests)")
    if counts.malformed:
        notes.append(f"{counts.malformed} of {counts.rows} rows left out as malformed: {'; '.join(counts.examples)}")
    if counts.out_of_order:
        notes.append(f"{counts.out_of_order} rows were out of order and have been sorted")
    return tuple(notes)


def _accepted() -> str:
    csv_headers = ", ".join(f"{name.value} CSV ({','.join(cols)})" for name, cols in _CSV_COLUMNS.items())
    return f"{csv_headers}, mooncake JSONL (timestamp, input_length, output_length, hash_ids)"


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[Iterator[str]]:
    """The lines of a trace. Bytes that are no text are escaped, and the row's parser then names them."""
    try:
        file = path.open(encoding="utf-8-sig", errors="backslashreplace", newline="")
    except OSError as error:
        raise TraceError(f"{path}: cannot be read ({error.strerror})") from error
    with file:
        yield iter(file)


def _rows(path: Path, found: TraceFormat, hash_block_tokens: int) -> Iterator[tuple[int, _Row | _RowError]]:
    """Every row after the header with its line number, parsed or with the reason why not."""
    with _opened(path) as lines:
        if found is TraceFormat.MOONCAKE:
            for line, text in enumerate(lines, start=1):
                try:
                    yield line, _mooncake_row(text, hash_block_tokens)
                except _RowError as error:
                    yield line, error
        else:
            yield from _csv_rows(path, lines, found)


def _csv_rows(path: Path, lines: Iterator[str], found: TraceFormat) -> Iterator[tuple[int, _Row | _RowError]]:
    # By line and strict: a stray quote is an error of its row, not the start of a field that swallows rows.
    header = [name.strip() for name in next(lines, "").rstrip("\r\n").split(",")]
    missing = [name for name in _CSV_COLUMNS[found] if name not in header]
    if missing:
        raise TraceError(f"{path}:1: a {found.value} trace needs the columns {missing}; the header is {header}")
    time_at, prompt_at, output_at = (header.index(name) for name in _CSV_COLUMNS[found])
    time_name, prompt_name, output_name = _CSV_COLUMNS[found]
    parse_time: Callable[[str, str], float] = _date_time_s if found is TraceFormat.AZURE else _seconds
    for line, text in enumerate(lines, start=2):
        try:
            fields = next(csv.reader([text], strict=True), [])
            if len(fields) != len(header):
                raise _RowError(f"has {len(fields)} fields, the header has {len(header)}: {text.strip()[:120]!r}")
            yield (
                line,
                _Row(
                    parse_time(time_name, fields[time_at]),
                    _tokens(prompt_name, fields[prompt_at], least=1),
                    _tokens(output_name, fields[output_at], least=0),
                ),
            )
        except csv.Error as error:
            yield line, _RowError(f"is not valid CSV ({error})")
        except _RowError as error:
            yield line, error


def _mooncake_row(text: str, block_tokens: int) -> _Row:
    try:
        row = json.loads(text)
    except ValueError as error:
        raise _RowError(f"is not valid JSON ({error})") from error
    if not isinstance(row, dict):
        raise _RowError(f"is not a JSON object: {text.strip()[:120]!r}")
    missing = [key for key in ("timestamp", "input_length", "output_length", "hash_ids") if key not in row]
    if missing:
        raise _RowError(f"lacks {', '.join(missing)}")
    stamp_ms = row["timestamp"]
    if isinstance(stamp_ms, bool) or not isinstance(stamp_ms, (int, float)) or not math.isfinite(stamp_ms):
        raise _RowError(f"timestamp is {stamp_ms!r}; accepted is a finite number of milliseconds")
    for key, least in (("input_length", 1), ("output_length", 0)):
        value = row[key]
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise _RowError(f"{key} is {value!r}; accepted is a whole number of at least {least}")
    prompt_tokens, hash_ids = row["input_length"], row["hash_ids"]
    if not isinstance(hash_ids, list) or not all(type(i) is int and i >= 0 for i in hash_ids):
        raise _RowError("hash_ids is no list of whole numbers of at least 0")
    # Writers differ in whether the last, partial block gets an id; anything else means another block size,
    # and the prompts would share other prefixes than the recorded ones did.
    full_blocks, rest = divmod(prompt_tokens, block_tokens)
    if len(hash_ids) not in (full_blocks, full_blocks + (rest > 0)):
        raise _RowError(
            f"has {len(hash_ids)} hash_ids for input_length {prompt_tokens}, which is "
            f"{full_blocks + (rest > 0)} blocks of {block_tokens} tokens "
            "(--hash-block-tokens sets another block size)"
        )
    return _Row(stamp_ms / 1000.0, prompt_tokens, row["output_length"], tuple(hash_ids))


def _date_time_s(name: str, text: str) -> float:
    match = _DATE_TIME.fullmatch(text.strip())
    if match is None:
        raise _RowError(f"{name} is {text!r}; accepted is YYYY-MM-DD hh:mm:ss[.fraction][+hh:mm]")
    whole, fraction, zone = match.groups()
    try:
        # The recordings have 7 fractional digits, more than datetime takes.
        moment = datetime.fromisoformat(whole).replace(tzinfo=timezone.utc)
    except ValueError as error:
        raise _RowError(f"{name} is {text!r}: {error}") from error
    seconds = (moment - _EPOCH) / timedelta(seconds=1) + float(fraction or 0)
    if zone not in (None, "Z"):
        offset_s = 3600 * int(zone[1:3]) + 60 * int(zone[4:6])
        seconds -= -offset_s if zone[0] == "-" else offset_s
    return seconds


def _seconds(name: str, text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise _RowError(f"{name} is {text!r}; accepted is a finite number of seconds")
    return value


def _tokens(name: str, text: str, *, least: int) -> int:
    stripped = text.strip()
    if _WHOLE.fullmatch(stripped) is None or int(stripped) < least:
        raise _RowError(f"{name} is {text!r}; accepted is a whole number of tokens, at least {least}")
    return int(stripped)
