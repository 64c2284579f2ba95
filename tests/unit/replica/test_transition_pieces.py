"""Transitions over the modelled driver of CUDA, where memory is in pieces: whichever call fails, nothing is lost."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from cuda_model.costs import CallCosts
from cuda_model.ranks import Deployment, Rank
from cuda_model.shapes import Shape
from kunserve_sgl.policy.drop_plan import DropWish, drop_plan, restore_plan
from kunserve_sgl.policy.plan import Plan


@dataclass(frozen=True)
class _SmallShape(Shape):
    @property
    def base_tokens(self) -> int:
        return 40_000


SHAPE = _SmallShape("small", 1024, 4096, 8, 8, 128, 4, 1000, 4096)
NEW_MEMORY = ("cuMemCreate", "cuMemMap", "cuMemSetAccess")
SHARING = ("cuMemExportToShareableHandle", "cuMemImportFromShareableHandle")


@pytest.fixture
def deployment(tmp_path: Path) -> Iterator[Deployment]:
    deployment = Deployment(tmp_path, SHAPE, CallCosts())
    yield deployment
    deployment.close()


def drop(deployment: Deployment) -> Plan:
    return drop_plan(deployment.plan, deployment.facts, DropWish(((0, 1),)))


def state(rank: Rank) -> object:
    """Which addresses have memory, and how much of it there is; not in which pieces what is free lies."""
    mappings = {at: mapping.size_bytes for at, mapping in rank.bindings.mappings.items()}
    parameters = [rank.memory.parameters.state(layer) for layer in range(SHAPE.layers)]
    handles = {handle for handle, each in rank.bindings.allocations.items() if each.imported and not each.released}
    return mappings, rank.memory.frames.snapshot(), parameters, len(handles), rank.engine.allocator.slot_ranges


def attempt(deployment: Deployment, new: Plan) -> str | None:
    """Returns why the way to a plan was not gone to its end."""
    try:
        deployment.run(new)
    except RuntimeError as error:
        return str(error)
    return None


def fail_each(deployment: Deployment, rank: Rank, names: tuple[str, ...], new: Callable[[], Plan]) -> int:
    """Tries a transition again and again, each time with a later call of `rank` failing, until none is left to fail.
    Returns how many failed."""
    before = [state(each) for each in deployment.ranks]
    for failing in range(1000):
        seen = 0

        def fail(name: str, number: int, failing: int = failing) -> bool:
            nonlocal seen
            seen += name in names
            # A GPU without memory is asked twice.
            return name in names and (seen == failing + 1 or (seen == failing + 2 and name == "cuMemCreate"))

        rank.bindings.fail_when(fail)
        failure = attempt(deployment, new())
        rank.bindings.fail_when(lambda name, number: False)
        for each in deployment.ranks:
            each.memory.frames.check()
        if failure is None:
            return failing
        assert "failed" in failure
        assert [state(each) for each in deployment.ranks] == before
    raise AssertionError("there is always one more call to fail")


@pytest.mark.parametrize("replica", [0, 1])
def test_a_restore_goes_back_whichever_call_fails_and_works_afterwards(deployment: Deployment, replica: int) -> None:
    at_start, before = deployment.plan, [state(rank) for rank in deployment.ranks]
    deployment.run(drop(deployment))
    sums = [rank.memory.parameters.report(0).checksum for rank in deployment.ranks]
    rank = deployment.ranks[replica]
    failed = fail_each(deployment, rank, NEW_MEMORY + SHARING, lambda: restore_plan(deployment.plan, at_start, (0, 1)))
    assert failed > 2 * SHAPE.layers
    assert [state(each) for each in deployment.ranks] == before
    for each, checksum in zip(deployment.ranks, sums, strict=True):
        assert each.memory.parameters.report(0).checksum == checksum
        for layer in range(SHAPE.layers):
            each.memory.parameters.verify(layer)
        assert each.bindings.broken_rules == []


def test_a_drop_goes_back_whichever_call_of_sharing_fails(deployment: Deployment) -> None:
    failed = fail_each(deployment, deployment.ranks[0], SHARING, lambda: drop(deployment))
    assert failed == 2 * 2 * SHAPE.layers // 2  # K and V of half of the layers, each way
    assert all(rank.memory.frames.snapshot().borrowed for rank in deployment.ranks)
