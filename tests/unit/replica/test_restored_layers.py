"""A restore takes its layers from the peer that keeps them, and where that has other bytes, from another source."""

from __future__ import annotations

import mmap
import os
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from transition_world import LAYERS, ONE_EACH, ONE_MACHINE, World, one_step_per_boundary

from kunserve_sgl.args import KunserveOptions
from kunserve_sgl.control.addresses import host_copy_path, make_host_copies
from kunserve_sgl.control.transition import End
from kunserve_sgl.errors import ConfigurationError
from kunserve_sgl.memory.errors import RestoreSourceError
from kunserve_sgl.memory.layer_sources import BufferSource
from kunserve_sgl.memory.source_chain import NamedSource
from kunserve_sgl.policy.drop_plan import DropWish, drop_plan, restore_plan
from kunserve_sgl.policy.plan import steps_of
from kunserve_sgl.replica import replica_memory


@pytest.fixture(params=["mapped", "read by messages"])
def world(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    one_step_per_boundary(monkeypatch)
    world = World(tmp_path, 2, machines=ONE_MACHINE if request.param == "mapped" else ONE_EACH)
    yield world
    world.close()


@dataclass(frozen=True)
class Shared:
    """A deployment with files for copies in host memory, and the file of rank 0."""

    options: KunserveOptions
    fd: int


@pytest.fixture
def shared(tmp_path: Path) -> Iterator[Shared]:
    options = KunserveOptions(kunserve_directory=str(tmp_path))
    make_host_copies(options, 1)
    fd = int(os.readlink(host_copy_path(options, 0)).rpartition("/")[2])
    yield Shared(options, fd)
    os.close(fd)


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


def test_replicas_share_one_copy_in_host_memory(
    world: World, shared: Shared, restored: Callable[[bool], tuple[End | None, str]], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    for rank in world.everybody:
        rank.memory.share_host_copy(shared.options, 0)
    written = [record.args[1] for record in caplog.records if "copy of the layers" in record.getMessage()]
    assert written == [LAYERS, 0]
    parameters = world.ranks[0][0].parameters
    regions = sum(parameters.region(layer).numel() for layer in range(LAYERS))
    pages = -(-os.fstat(shared.fd).st_size // mmap.PAGESIZE)
    assert regions < pages * mmap.PAGESIZE < regions + (LAYERS + 2) * mmap.PAGESIZE
    assert restored(False)[0] is End.SUCCEEDED
    assert "comes from the copy in host memory" in caplog.text


def test_new_weights_renew_the_copy(world: World, shared: Shared, caplog: pytest.LogCaptureFixture) -> None:
    memories = [rank.memory for rank in world.everybody]
    for memory in memories:
        memory.share_host_copy(shared.options, 0)
    for rank in world.everybody:
        with torch.no_grad():
            rank.model.layers[1].weight += 1
        rank.memory.renew_parameters()
    caplog.set_level("INFO")
    for memory in memories:
        memory.drop_layer(1)
        assert memory.restore_layer(1) == "the copy in host memory"
    # What a writer that died has left is made whole by whoever has the bytes.
    os.pwrite(shared.fd, bytes(64), 64)
    memories[0].drop_layer(1)
    with pytest.raises(RestoreSourceError, match="the copy in host memory: it has no layer 1"):
        memories[0].restore_layer(1)
    copies = {1: memories[1].parameters.region(1).clone()}
    assert memories[0].restore_layer(1, NamedSource("a peer", BufferSource(copies))) == "a peer"
    memories[1].drop_layer(1)
    assert memories[1].restore_layer(1) == "the copy in host memory"


def test_a_copy_without_memory_names_the_flag(world: World, shared: Shared, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replica_memory, "free_host_bytes", lambda: 1000)
    with pytest.raises(ConfigurationError, match=r"--kunserve-host-copy: the copy takes .* 1000 are free"):
        world.ranks[0][0].memory.share_host_copy(shared.options, 0)


def test_a_restore_that_no_source_has_the_bytes_for_is_taken_back(
    world: World, restored: Callable[[bool], tuple[End | None, str]]
) -> None:
    end, reason = restored(False)
    assert end is End.ROLLED_BACK
    assert "cannot be restored: parameters of layer" in reason
    assert "at replica 0: layer" in reason
