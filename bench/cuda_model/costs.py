"""What a call of the CUDA driver takes, from a file: published, assumed, or measured by the first check on a GPU."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

TABLE = Path(__file__).with_name("call_costs.json")
# Of a log entry's arguments, the one that says how many bytes a call is about.
_SIZE_AT = {"cuMemMap": 1, "cuMemUnmap": 1, "cuMemSetAccess": 1, "fill": 1, "cuMemCreate": 0}


@dataclass(frozen=True)
class CallCost:
    """`further_frame_us` is for each frame of a call after the first. `source` says where the figures are from."""

    call_us: float
    further_frame_us: float
    source: str


class CallCosts:
    """The costs of all calls, by name."""

    def __init__(self, path: Path = TABLE) -> None:
        """Raises ValueError that names the call and the field that is wrong."""
        table = json.loads(path.read_text(encoding="utf-8"))
        self.by_call: dict[str, CallCost] = {}
        for name, entry in table["calls"].items():
            for column in ("call_us", "further_frame_us"):
                value = entry.get(column)
                if not isinstance(value, (int, float)) or isinstance(value, bool) or value < 0:
                    raise ValueError(f"{path}: {name}: {column} is {value!r}; accepted: microseconds, 0 or more")
            self.by_call[name] = CallCost(entry["call_us"], entry["further_frame_us"], str(entry["source"]))

    def frames(self, name: str, arguments: Sequence[Any], frame_bytes: int) -> int:
        """Counts the frames that a logged call is about."""
        at = _SIZE_AT.get(name)
        return 1 if at is None else int(arguments[at]) // frame_bytes

    def seconds(self, name: str, frames: int) -> float:
        """Raises ValueError for a call that the table lacks."""
        if name not in self.by_call:
            raise ValueError(f"the table of call costs has no {name}")
        cost = self.by_call[name]
        return (cost.call_us + max(0, frames - 1) * cost.further_frame_us) / 1e6
