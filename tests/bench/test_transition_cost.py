"""The predicted cost of transitions: real code over the modelled driver at real size, and the table of call costs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import transition_cost
from cuda_model.costs import TABLE, CallCosts
from cuda_model.shapes import SHAPES


def test_counts_of_a_drop_follow_from_the_shape() -> None:
    """A layer of Llama-3.1-8B is 208 frames and 2 norms, half of the layers go, and a granule is a frame per buffer."""
    shape = SHAPES[0]
    result = transition_cost.cost_of(shape, CallCosts())
    assert list(result) == ["first drop", "first restore", "second drop", "second restore"]
    drop, restore = result["second drop"], result["second restore"]
    dropped = 16 * 209
    assert drop["release"].frames["cuMemUnmap"] == dropped
    assert 0.9 * dropped <= drop["release"].frames["cuMemMap"] <= dropped
    assert restore["load"].frames["cuMemMap"] == dropped
    assert restore["load"].frames["cuMemUnmap"] == drop["release"].frames["cuMemMap"] + dropped  # and the lender's
    assert transition_cost.total_s(drop) > drop["prepare"].predicted_s > drop["prepare"].longest_step_s > 0
    text = transition_cost.report(shape, result)
    assert "first drop: " in text
    assert "prepare" in text


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
