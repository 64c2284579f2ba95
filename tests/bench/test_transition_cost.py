"""The predicted cost of transitions: real code over the modelled driver at real size, and the table of call costs."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

import pytest

import transition_cost
from cuda_model.costs import TABLE, CallCosts
from cuda_model.ranks import PhaseCost
from cuda_model.shapes import SHAPES, Shape

# What a transition may take, less the copying of parameters and the waiting for batches.
MOST_S, MOST_STEP_S = 0.1, 0.005
MOST_DESCRIPTORS = 64

Costs = dict[str, dict[str, PhaseCost]]


@cache
def predicted(shape: Shape) -> Costs:
    return transition_cost.cost_of(shape, CallCosts(), ("first",))


def test_counts_of_a_transition_follow_from_the_shape() -> None:
    """A layer of Llama-3.1-8B is 208 frames and 2 norms, half of the layers go, and a granule is a frame per buffer."""
    shape = SHAPES[0]
    result = predicted(shape)
    assert list(result) == ["first drop", "first restore"]
    drop, restore = result.values()
    dropped, lent = 16 * 209, 2 * 16
    assert drop["prepare"].calls["cuMemExportToShareableHandle"] == lent  # K and V of each layer that goes
    assert drop["release"].frames["cuMemUnmap"] == dropped
    mapped = drop["release"].frames["cuMemMap"]
    assert 0.9 * dropped <= mapped <= dropped
    assert drop["release"].calls["cuMemMap"] == 2 * lent  # of the slots of both replicas
    assert restore["prepare"].calls["cuMemExportToShareableHandle"] == 16
    assert restore["load"].frames["cuMemMap"] == dropped
    assert restore["load"].frames["cuMemUnmap"] == mapped + dropped  # and the lender's
    assert transition_cost.total_s(drop) > drop["prepare"].predicted_s > drop["prepare"].longest_step_s > 0
    text = transition_cost.report(shape, result)
    assert "first drop: " in text
    assert "prepare" in text


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.name)
def test_transitions_are_predicted_within_their_bounds(shape: Shape) -> None:
    """A lent layer is a descriptor for K and one for V, so 40 of them are more than the bound for descriptors."""
    for name, phases in predicted(shape).items():
        assert transition_cost.total_s(phases) < MOST_S, name
        for phase, cost in phases.items():
            assert cost.longest_step_s <= MOST_STEP_S, f"{name}, {phase}: {cost.longest_step}"
        assert transition_cost.descriptors(phases) <= max(MOST_DESCRIPTORS, shape.layers), name


def test_all_memory_is_there_again_after_a_restore() -> None:
    """Frames are made anew in other sizes, never more or fewer of them."""
    load = predicted(SHAPES[0])["first restore"]["load"]
    assert load.frames["cuMemCreate"] >= 16 * 209
    assert load.calls["cuMemCreate"] < 2 * 16 + 1


def test_what_is_printed_can_be_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shape, path = SHAPES[0], tmp_path / "costs.json"
    result = predicted(shape)
    monkeypatch.setattr(transition_cost, "cost_of", lambda shape, costs: result)
    assert transition_cost.main(["--models", shape.name, "--json", str(path)]) == 0
    saved = json.loads(path.read_text())["models"][shape.name]["first drop"]["release"]
    assert saved["calls"] == result["first drop"]["release"].calls


@pytest.mark.parametrize("value", [None, -1, "2", True])
def test_wrong_figures_of_the_table_are_named(tmp_path: Path, value: object) -> None:
    table = json.loads(TABLE.read_text())
    table["calls"]["cuMemMap"]["call_us"] = value
    path = tmp_path / "costs.json"
    path.write_text(json.dumps(table))
    with pytest.raises(ValueError, match="cuMemMap: call_us is "):
        CallCosts(path)


def test_a_call_that_the_table_lacks_is_no_free_call() -> None:
    with pytest.raises(ValueError, match="has no cuMemFly"):
        CallCosts().seconds("cuMemFly", 1)
    assert CallCosts().seconds("cuMemUnmap", 11) == pytest.approx((34 + 10 * 2) / 1e6)
