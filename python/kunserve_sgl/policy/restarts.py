"""When a replica that has ended is started again, and when it is given up. Pure: time comes in as data.

Between an end and the next start there is a pause, which doubles with every further end: what keeps a replica from
serving may take a while to pass. Ends are counted until it has served for long enough to call it well again, so a
replica that takes minutes to load is given up after as many tries as one that takes seconds.
"""

from __future__ import annotations

from dataclasses import dataclass

from kunserve_sgl.policy.back_off import back_off_s

FIRST_PAUSE_S = 1.0
# Who has served for so long starts with a clean slate. Several times what it takes to load a large model.
CALM_S = 600.0


@dataclass(slots=True)
class RestartHistory:
    """Knows how often one replica has ended, and has been started again, since it last was well. `most_tries` is how
    often it may be started again meanwhile, after a pause of `longest_pause_s` at most."""

    most_tries: int
    longest_pause_s: float
    ends: int = 0
    since_s: float = 0.0  # of the first of these ends
    serves_since_s: float | None = 0.0  # None while it does not
    last: str = ""  # how it ended last

    def on_serving(self, now_s: float) -> None:
        """Takes note that the replica serves from now on."""
        self.serves_since_s = now_s

    def on_ended(self, how: str, now_s: float) -> float | None:
        """Takes note of an end, of a replica that served or of one that was being started. Returns when to start it
        again; None where that makes no sense any more, see `why_given_up`."""
        served_s = 0.0 if self.serves_since_s is None else now_s - self.serves_since_s
        if not self.ends or served_s >= CALM_S:
            self.ends, self.since_s = 0, now_s
        self.serves_since_s, self.last = None, how
        self.ends += 1
        if self.ends > self.most_tries:
            return None
        return now_s + back_off_s(FIRST_PAUSE_S, self.longest_pause_s, self.ends - 1)

    def on_node_lost(self, how: str, now_s: float) -> float:
        """Takes note that a start has ended because its node had, which counts for nothing: it says nothing of the next
        one. Returns when to start the replica again."""
        self.last = how
        return now_s + back_off_s(FIRST_PAUSE_S, self.longest_pause_s, 0)

    def why_given_up(self, now_s: float) -> str:
        """Says so, after the last end."""
        times = "once" if self.ends == 1 else f"{self.ends} times"
        return f"given up: ended {times} in {now_s - self.since_s:.0f} s; the last one: {self.last}"
