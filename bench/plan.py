"""Times the choice of which groups to merge, for many replicas.

    python bench/plan.py --replicas 10000

Printed are the median and the largest of several runs per share of replicas that are short of memory.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from collections.abc import Sequence

from kunserve_sgl.policy.merges import GroupNeed, choose_merges

COPY_TOKENS = 10_000
SHARES_SHORT = (0.01, 0.1, 0.5, 1.0)


def deployment(replicas: int, share_short: float, chance: random.Random) -> list[GroupNeed]:
    """Replicas on their own; those that are short miss up to what one copy of the parameters makes room for."""
    return [
        GroupNeed((replica,), chance.randrange(1, COPY_TOKENS) if chance.random() < share_short else 0)
        for replica in range(replicas)
    ]


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--replicas", type=int, default=10_000)
    parser.add_argument("--largest-group", type=int, default=8)
    parser.add_argument("--runs", type=int, default=9)
    arguments = parser.parse_args(argv)
    chance = random.Random(0)
    print(f"{arguments.replicas} replicas, groups of up to {arguments.largest_group}, {arguments.runs} runs")
    print(f"{'short':>6} {'groups':>7} {'merges':>7} {'median ms':>10} {'largest ms':>11}")
    for share in SHARES_SHORT:
        groups = deployment(arguments.replicas, share, chance)
        times_ms = []
        for _ in range(arguments.runs):
            started_s = time.perf_counter()
            chosen = choose_merges(groups, COPY_TOKENS, arguments.largest_group)
            times_ms.append(1000 * (time.perf_counter() - started_s))
        merges = sum(group.merges for group in chosen)
        print(f"{share:>6.0%} {len(chosen):>7} {merges:>7} {statistics.median(times_ms):>10.1f} {max(times_ms):>11.1f}")


if __name__ == "__main__":
    main()
