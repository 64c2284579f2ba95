"""What a transition and a recovery have in common: phases that all ranks of the members take together."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from kunserve_sgl.control.messages import Phase

# A rank gives up at the deadline that its order names, and says why. Its answer is still waited for, this long.
REPLY_GRACE_S = 1.0


class Phased:
    """Keeps who has not finished the phase that is under way, and until when. `clock` is monotonic, in seconds."""

    def __init__(self, ranks: int, clock: Callable[[], float], first: Phase) -> None:
        """`ranks` are those of each replica; `first` is the phase that comes first."""
        self.phase = first
        self.deadline_s = 0.0  # on the clock's scale
        self.phase_seconds: dict[Phase, float] = {}  # of those that have ended
        self._ranks = ranks
        self._clock = clock
        self._phase_started_s = 0.0
        self._waiting: set[tuple[int, int]] = set()

    @property
    def waiting_for(self) -> list[tuple[int, int]]:
        """Lists (replica, rank) of those that have not finished the phase."""
        return sorted(self._waiting)

    def _await(self, phase: Phase, members: Iterable[int], limit_s: float) -> None:
        """Takes note that a phase begins, which all ranks of `members` have to finish within `limit_s` seconds."""
        self.phase = phase
        self._phase_started_s = self._clock()
        self.deadline_s = self._phase_started_s + limit_s + REPLY_GRACE_S
        self._waiting = {(member, rank) for member in members for rank in range(self._ranks)}

    def _note_end(self) -> None:
        """Takes note that all have finished the phase."""
        self.phase_seconds[self.phase] = self._clock() - self._phase_started_s

    @property
    def _limit_s(self) -> float:
        return self.deadline_s - self._phase_started_s - REPLY_GRACE_S

    @property
    def _is_late(self) -> bool:
        return self._clock() >= self.deadline_s

    @property
    def _phase_times(self) -> str:
        return ", ".join(f"{phase.value} {1000 * s:.1f} ms" for phase, s in self.phase_seconds.items())
