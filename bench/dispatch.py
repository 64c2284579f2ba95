"""Times the choice of a replica for a request, and a replica's report, by the number of replicas.

    python bench/dispatch.py --replicas 256

The controller makes the choice once per request; the aim is less than 1 ms with 256 replicas.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from collections.abc import Sequence

from kunserve_sgl.policy.demand import ReplicaLoad
from kunserve_sgl.policy.dispatch import Dispatcher

_CAPACITY_TOKENS = 100_000
_GROUP = 4


def deployment(replicas: int, chance: random.Random) -> Dispatcher:
    """Half of the replicas are merged in groups of four; all have work."""
    merged = replicas // 2 // _GROUP * _GROUP
    groups = [tuple(range(first, first + _GROUP)) for first in range(0, merged, _GROUP)]
    dispatcher = Dispatcher(replicas)
    dispatcher.set_groups([*groups, *((replica,) for replica in range(merged, replicas))], ())
    for replica in range(replicas):
        dispatcher.on_report(replica, report(0, chance))
    return dispatcher


def report(received: int, chance: random.Random) -> ReplicaLoad:
    used, growth, queued = (chance.randrange(_CAPACITY_TOKENS // 2) for _ in range(3))
    return ReplicaLoad(_CAPACITY_TOKENS, used, growth, queued, received_requests=received, mean_answer_tokens=200)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--replicas", type=int, nargs="+", default=[2, 16, 256, 1024])
    parser.add_argument("--requests", type=int, default=2000)
    arguments = parser.parse_args(argv)
    print(f"{arguments.requests} requests, a report after each")
    print(f"{'replicas':>8} {'request: median ms':>19} {'99th %':>8} {'report: median ms':>18}")
    for replicas in arguments.replicas:
        chance = random.Random(0)
        dispatcher = deployment(replicas, chance)
        sent = [0] * replicas
        request_ms, report_ms = [], []
        for _ in range(arguments.requests):
            prompt = chance.randrange(4000)
            started_s = time.perf_counter()
            tokens = dispatcher.tokens_of(prompt, 1000, goes_to_the_end=False)
            replica = dispatcher.pick(tokens)
            dispatcher.record(replica, tokens)
            request_ms.append(1000 * (time.perf_counter() - started_s))
            sent[replica] += 1
            load = report(sent[replica], chance)
            started_s = time.perf_counter()
            dispatcher.on_report(replica, load)
            report_ms.append(1000 * (time.perf_counter() - started_s))
        late = statistics.quantiles(request_ms, n=100)[-1]
        print(
            f"{replicas:>8} {statistics.median(request_ms):>19.3f} {late:>8.3f} {statistics.median(report_ms):>18.4f}"
        )


if __name__ == "__main__":
    main()
