"""A restore takes its layers from the peer that keeps them, and where that has other bytes, from another source."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from transition_world import World, one_step_per_boundary

from kunserve_sgl.control.transition import End
from kunserve_sgl.memory.layer_sources import BufferSource
from kunserve_sgl.memory.source_chain import NamedSource
from kunserve_sgl.policy.drop_plan import DropWish, drop_plan, restore_plan
from kunserve_sgl.policy.plan import steps_of


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    one_step_per_boundary(monkeypatch)
    world = World(tmp_path, 2)
    yield world
    world.close()


@pytest.fixture
def restored(world: World) -> Callable[[bool], tuple[End | None, str]]:
    """Merges, spoils a layer where it is kept, and restores, with a second source or without. Returns how that
    ended."""

    def run(has_second_source: bool) -> tuple[End | None, str]:
        rng = random.Random(5)
        normal, copies = world.plan, {}
        new = drop_plan(world.plan, world.facts, DropWish(((0, 1),)))
        (dropped, *_) = steps_of(world.plan, new, 1).drop
        for layer in steps_of(world.plan, new, 1).drop:
            copies[layer] = world.ranks[1][0].parameters.region(layer).clone()
        if has_second_source:
            world.ranks[1][0].memory.sources.append(NamedSource("a copy", BufferSource(copies)))
        assert world.run(new, rng).end is End.SUCCEEDED
        with torch.no_grad():
            world.ranks[0][0].model.layers[dropped].weight[0, 0] += 1
        transition = world.run(restore_plan(world.plan, normal, (0, 1)), rng)
        return transition.end, transition.reason

    return run


def test_a_layer_that_the_peer_has_spoiled_comes_from_elsewhere(
    world: World, restored: Callable[[bool], tuple[End | None, str]], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    end, _ = restored(True)
    assert end is End.SUCCEEDED
    lines = [record.getMessage() for record in caplog.records if "come" in record.getMessage()]
    assert "does not come from parameters of layer" in lines[0]
    assert lines[0].count("checksum") == 1
    assert lines[1].endswith("comes from a copy")
    assert len(lines) == 2  # the others came from the peer


def test_a_restore_that_no_source_has_the_bytes_for_is_taken_back(
    world: World, restored: Callable[[bool], tuple[End | None, str]]
) -> None:
    end, reason = restored(False)
    assert end is End.ROLLED_BACK
    assert "cannot be restored: parameters of layer" in reason
    assert "at replica 0: layer" in reason
