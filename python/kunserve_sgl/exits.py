"""How long a process that was killed may take to be gone, and how that is waited for."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

# It takes a while to give a GPU's memory back. The controller does nothing else meanwhile, so whoever waits for the
# controller waits for longer.
EXIT_DEADLINE_S = 30.0
# What the controller says or does may come so late although nothing has failed.
CONTROLLER_PATIENCE_S = EXIT_DEADLINE_S + 5.0
_LOOK_S = 0.01  # between two looks at them: waiting for one in the kernel has no deadline


def is_gone_in_time(is_there: Callable[[], object]) -> bool:
    """Waits until `is_there` does not hold any more, for `EXIT_DEADLINE_S`. Returns False where it still does then."""
    ends_at_s = time.monotonic() + EXIT_DEADLINE_S
    while is_there():
        if time.monotonic() >= ends_at_s:
            return False
        time.sleep(_LOOK_S)
    return True


def await_exits(processes: Sequence[Any]) -> list[Any]:
    """Waits until processes, of whatever kind, are gone, for `EXIT_DEADLINE_S` for all of them together. Returns those
    that are not."""
    left = list(processes)

    def look() -> list[Any]:
        left[:] = [each for each in left if each.is_alive()]
        return left

    is_gone_in_time(look)
    return left
