"""The kinds of things that happen in a soak, and how often each comes."""

from __future__ import annotations

from dataclasses import dataclass

from long_run.disturbances import Disturbance

LULL = "lull"


@dataclass(frozen=True)
class Kind:
    """What is ordered, what is done to processes meanwhile, and how often it comes. `automatic` is of servers in
    automatic mode only. `in_exchange` is of servers that exchange KV: replicas are merged before, and it comes while
    the exchange that follows is under way."""

    order: str
    disturbance: Disturbance
    weight: int
    automatic: bool = False
    in_exchange: bool = False


KINDS: dict[str, Kind] = {
    "drop": Kind("drop", Disturbance.NONE, 10),
    "partial drop": Kind("partial drop", Disturbance.NONE, 5),
    "drop of layers": Kind("drop of layers", Disturbance.NONE, 5),
    "restore": Kind("restore", Disturbance.NONE, 10),
    "partial restore": Kind("partial restore", Disturbance.NONE, 5),
    "forced restore": Kind("forced restore", Disturbance.NONE, 3),
    "resize": Kind("resize", Disturbance.NONE, 6),
    "lull": Kind(LULL, Disturbance.NONE, 8, automatic=True),
    "lend": Kind("lend", Disturbance.NONE, 6),
    "kill": Kind("", Disturbance.KILL, 8),
    "two kills": Kind("", Disturbance.TWO_KILLS, 4),
    "stall": Kind("", Disturbance.STALL, 2),
    "long stall": Kind("", Disturbance.LONG_STALL, 1),
    "kill in a drop": Kind("drop", Disturbance.KILL, 6),
    "kill in a partial drop": Kind("partial drop", Disturbance.KILL, 3),
    "kill in a loan": Kind("lend", Disturbance.KILL, 3),
    "kill in a restore": Kind("restore", Disturbance.KILL, 5),
    "kill in a partial restore": Kind("partial restore", Disturbance.KILL, 2),
    "two kills in a drop": Kind("drop", Disturbance.TWO_KILLS, 2),
    "two kills in a restore": Kind("restore", Disturbance.TWO_KILLS, 2),
    "stall in a drop": Kind("drop", Disturbance.STALL, 2),
    "stall in a restore": Kind("restore", Disturbance.STALL, 2),
    "long stall in a drop": Kind("drop", Disturbance.LONG_STALL, 1),
    "long stall in a restore": Kind("restore", Disturbance.LONG_STALL, 1),
    "exchange": Kind("", Disturbance.NONE, 4, in_exchange=True),
    "drop in an exchange": Kind("drop", Disturbance.NONE, 6, in_exchange=True),
    "restore in an exchange": Kind("restore", Disturbance.NONE, 8, in_exchange=True),
    "partial restore in an exchange": Kind("partial restore", Disturbance.NONE, 6, in_exchange=True),
    "forced restore in an exchange": Kind("forced restore", Disturbance.NONE, 4, in_exchange=True),
    "resize in an exchange": Kind("resize", Disturbance.NONE, 4, in_exchange=True),
    "kill in an exchange": Kind("", Disturbance.KILL, 12, in_exchange=True),
    "two kills in an exchange": Kind("", Disturbance.TWO_KILLS, 4, in_exchange=True),
    "stall in an exchange": Kind("", Disturbance.STALL, 6, in_exchange=True),
    "long stall in an exchange": Kind("", Disturbance.LONG_STALL, 2, in_exchange=True),
    "kill in a restore in an exchange": Kind("restore", Disturbance.KILL, 6, in_exchange=True),
}
