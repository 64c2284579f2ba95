"""The checks by name, in order, with their deadlines: three commands of at most ten minutes together."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from gpu_checks.place import Place
from gpu_checks.runner import Check, Result

# A CPU takes longer, and has nobody who waits for it.
_CPU_DEADLINE_S = 900.0
COMMANDS_S = 600.0


@dataclass(frozen=True)
class Entry:
    """A check, by the command that runs it and by where its function is: "module:function" of this package. Its module
    is imported in the check's process only."""

    command: str
    name: str
    title: str
    deadline_s: float
    function: str

    def check(self, place: Place) -> Check:
        """What the runner needs of it."""
        return Check(self.name, self.title, self.deadline_s if place.is_cuda else _CPU_DEADLINE_S)

    def load(self) -> Callable[[Place], Result]:
        """The function that checks."""
        module, function = self.function.split(":")
        found: Callable[[Place], Result] = getattr(importlib.import_module(f"gpu_checks.{module}"), function)
        return found


ENTRIES: Sequence[Entry] = (
    Entry("memory", "F0", "modules, limits, a frame shared by two processes", 10, "memory:check_machine"),
    Entry("memory", "F1", "what the driver's calls take", 30, "memory:check_call_costs"),
    Entry("memory", "F2", "pytest tests/gpu", 80, "kernels:check_gpu_tests"),
    Entry("memory", "F3", "kernels on a virtual tensor with holes", 20, "kernels:check_holes"),
    Entry("tokens", "F4", "one replica with graphs: log probabilities as stock", 60, "tokens:check_one_replica"),
    Entry("tokens", "F5", "two replicas, eager: tokens before, merged, restored", 65, "tokens:check_two_replicas"),
    Entry("tokens", "F6", "two replicas with graphs: drops and restores under load", 65, "tokens:check_under_load"),
    Entry("speed", "F7", "transitions: seconds and pauses per phase", 70, "speed:check_transitions"),
    Entry("speed", "F8", "time per output token, merged and not", 80, "speed:check_decoding"),
    Entry("speed", "F9", "a burst", 85, "speed:check_burst"),
    Entry("speed", "F10", "parts of attention, merged, against the whole", 35, "parts:check_parts"),
)
COMMANDS: Mapping[str, Sequence[Entry]] = {
    command: [entry for entry in ENTRIES if entry.command == command] for command in ("memory", "tokens", "speed")
}
