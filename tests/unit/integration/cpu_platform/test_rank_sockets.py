"""Ranks in threads that add up, gather and broadcast over real sockets, without a server."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier
from typing import TypeVar

import pytest
import torch

from kunserve_sgl.integration.cpu_platform.rank_sockets import RankEndedError, RankSockets, connect

TIMEOUT_S = 120.0
T = TypeVar("T")


def on_all(calls: list[Callable[[], T]]) -> list[T]:
    """What the calls return, each in a thread of its own."""
    with ThreadPoolExecutor(len(calls)) as threads:
        return [each.result(TIMEOUT_S) for each in [threads.submit(call) for call in calls]]


def connected(count: int) -> list[RankSockets]:
    texts, met = {}, Barrier(count, timeout=TIMEOUT_S)

    def join(rank: int) -> RankSockets:
        def share(text: str) -> list[str]:
            texts[rank] = text
            met.wait()
            return [texts[each] for each in range(count)]

        return connect(rank, share, TIMEOUT_S)

    ranks = on_all([lambda rank=rank: join(rank) for rank in range(count)])  # type: ignore[misc]
    assert not any(Path(text).parent.exists() for text in texts.values())
    return ranks


@pytest.fixture(params=[2, 3])
def ranks(request: pytest.FixtureRequest) -> Iterator[list[RankSockets]]:
    made = connected(request.param)
    yield made
    for each in made:
        each.close()


@pytest.mark.parametrize("shape", [(0, 8), (1, 3), (5, 256), (700, 256)])  # the last in several pieces
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_all_ranks_get_the_sum_in_the_order_of_ranks(
    ranks: list[RankSockets], shape: tuple[int, int], dtype: torch.dtype
) -> None:
    chance = torch.Generator().manual_seed(1)
    for _ in range(3):
        tensors = [torch.randn(shape, generator=chance).to(dtype) for _ in ranks]
        total = tensors[0].clone()
        for term in tensors[1:]:
            total += term
        on_all([lambda r=r, t=t: r.all_reduce(t) for r, t in zip(ranks, tensors, strict=True)])  # type: ignore[misc]
        assert all(torch.equal(tensor, total) for tensor in tensors)


def test_gathered_are_the_tensors_of_all_ranks_also_such_that_are_no_block_of_memory(ranks: list[RankSockets]) -> None:
    tensors = [torch.arange(12).view(3, 4).t() + 100 * rank for rank in range(len(ranks))]
    gathered = on_all([lambda r=r, t=t: r.all_gather(t) for r, t in zip(ranks, tensors, strict=True)])  # type: ignore[misc]
    for found in gathered:
        assert all(torch.equal(one, other) for one, other in zip(found, tensors, strict=True))


@pytest.mark.parametrize("size", [0, 1, 3_000_000])
def test_a_broadcast_comes_to_all_ranks_from_any(ranks: list[RankSockets], size: int) -> None:
    for source in range(len(ranks)):
        tensors = [torch.full((size,), rank, dtype=torch.uint8) for rank in range(len(ranks))]
        on_all([lambda r=r, t=t: r.broadcast(t, source) for r, t in zip(ranks, tensors, strict=True)])  # type: ignore[misc]  # noqa: B023 - runs at once
        assert all(torch.equal(tensor, torch.full_like(tensor, source)) for tensor in tensors)


def test_a_rank_that_has_ended_or_does_nothing_is_named() -> None:
    first, second, third = connected(3)
    for other in first._others:
        other.settimeout(0.3)
    with pytest.raises(RankEndedError, match=r"rank 1 of this replica does not answer: timed out"):
        first.all_reduce(torch.ones(4))
    third.close()
    with pytest.raises(RankEndedError, match=r"rank 2 of this replica does not answer"):
        second.broadcast(torch.ones(4), 2)
    for each in (first, second):
        each.close()
