"""What a drop gains of the tiny models where a frame has 2 MiB, as on CUDA."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from kunserve_sgl.errors import TransientError
from kunserve_sgl.memory.slot_space import KvBuffer, granule_slots
from kunserve_sgl.policy.drop_plan import DropWish, drop_plan, plan_cost
from kunserve_sgl.policy.gain import why_nothing_is_gained
from kunserve_sgl.policy.plan import ReplicaFacts, normal_plan
from kunserve_sgl.tiny_model import write_tiny_model
from kunserve_sgl.tiny_model_spec import DTYPE_BYTES, PRESETS, TinyModelSpec

FRAME_BYTES = 2 << 20
BASE_TOKENS = 16384


def facts_of(preset: str, dtype: str, directory: Path, replicas: int = 2, free: int = 0) -> tuple[ReplicaFacts, ...]:
    """What replicas of the model report with such frames: of the parameters, the sizes that were written."""
    spec = TinyModelSpec(dtype=dtype, **PRESETS[preset])
    layer_bytes = write_tiny_model(spec, directory / preset, weights=False).layer_bytes
    row_bytes = spec.kv_elements_per_token // 2 * DTYPE_BYTES[dtype]
    slots = granule_slots([KvBuffer(0, name, row_bytes) for name in "kv"], FRAME_BYTES, page_size=1)
    return tuple(
        ReplicaFacts(
            replica=replica,
            frame_bytes=FRAME_BYTES,
            granule_slots=slots,
            base_granules=-(-BASE_TOKENS // slots),
            max_granules=1000,
            free_frames=free,
            layer_frames=tuple(-(-size // FRAME_BYTES) for size in layer_bytes),
            granule_frames=(2 * slots * row_bytes // FRAME_BYTES,) * spec.layers,
        )
        for replica in range(replicas)
    )


def test_the_tiny_model_gains_nothing_and_the_reason_has_the_numbers(tmp_path: Path) -> None:
    facts = facts_of("tiny", "bfloat16", tmp_path)
    plan = normal_plan(facts)
    with pytest.raises(TransientError, match="no slots would be gained"):
        drop_plan(plan, facts, DropWish(((0, 1),)))
    reason = why_nothing_is_gained(plan, facts, [frozenset({0, 1})])
    assert reason is not None
    assert "a layer take 1 frames of 2097152 bytes, and the KV cache grows by granules of 8192 slots" in reason
    assert "which take 2 frames in a layer; no slots would be gained: replica 0 would have 2 free frames" in reason


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_the_preset_for_gpus_gains_several_granules_for_each_replica(tmp_path: Path, dtype: str) -> None:
    facts = facts_of("gpu", dtype, tmp_path)
    plan = normal_plan(facts)
    assert why_nothing_is_gained(plan, facts, [frozenset({0, 1})]) is None
    new = drop_plan(plan, facts, DropWish(((0, 1),)))
    granules = facts[0].layer_frames[0] // facts[0].granule_frames[0]  # of both together
    gained = plan_cost(plan, new, facts).gained_tokens_of
    assert sum(gained) == granules * facts[0].granule_slots
    assert min(gained) >= 3 * facts[0].granule_slots


def test_larger_groups_and_free_frames_count(tmp_path: Path) -> None:
    four = facts_of("tiny", "bfloat16", tmp_path, replicas=4)
    plan = normal_plan(four)
    assert why_nothing_is_gained(plan, four, [range(4)]) is None, "one keeps a layer of four, and has room for one more"
    assert why_nothing_is_gained(plan, four, [{0, 1}, {2, 3}]) is not None
    assert why_nothing_is_gained(plan, four, [{0}, {1}, {2}, {3}]) is None, "they cannot be merged at all"
    reserve = facts_of("tiny", "bfloat16", tmp_path / "reserve", free=2)
    assert why_nothing_is_gained(normal_plan(reserve), reserve, [{0, 1}]) is None


def test_the_address_space_can_be_the_reason(tmp_path: Path) -> None:
    facts = tuple(replace(each, max_granules=each.base_granules) for each in facts_of("gpu", "bfloat16", tmp_path))
    reason = why_nothing_is_gained(normal_plan(facts), facts, [{0, 1}])
    assert reason is not None
    assert "the address space of replica 0 is full: --kunserve-max-slots" in reason
