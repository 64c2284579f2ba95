"""The range that a model runs next; what SGLang's models do with it is tested on servers."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from kunserve_sgl.errors import ConfigurationError
from kunserve_sgl.integration.runner.layer_range import LayerRange


class Inner:
    def __init__(self) -> None:
        self.pp_group = SimpleNamespace(is_first_rank=True, is_last_rank=True, world_size=1)
        self.start_layer, self.end_layer = 0, 6


class Model:
    def __init__(self) -> None:
        self.model = Inner()
        self.pp_group = self.model.pp_group

    def forward(self, input_ids: Any, pp_proxy_tensors: Any = None) -> tuple[int, int, bool, bool, int]:
        group = self.model.pp_group
        assert self.pp_group is group
        return self.model.start_layer, self.model.end_layer, group.is_first_rank, group.is_last_rank, group.world_size


class NoStages:
    def __init__(self) -> None:
        self.model = Inner()

    def forward(self, input_ids: Any) -> None: ...


def test_a_range_holds_for_the_block_and_no_longer() -> None:
    model = Model()
    layers = LayerRange(model)
    assert layers.layer_count == 6
    whole = (0, 6, True, True, 1)
    assert model.forward(None) == whole
    for first, last in [(False, False), (True, False), (False, True)]:
        with layers.only(2, 4, first=first, last=last):
            assert model.forward(None) == (2, 4, first, last, 1)
        assert model.forward(None) == whole


def test_a_failed_run_leaves_the_whole_model() -> None:
    model = Model()
    with pytest.raises(ZeroDivisionError), LayerRange(model).only(1, 1, first=True, last=False):
        _ = 1 / 0
    assert model.forward(None) == (0, 6, True, True, 1)


def test_a_model_without_stages_is_refused() -> None:
    with pytest.raises(ConfigurationError, match=r"NoStages has no pipeline stages in SGLang.*--kunserve off"):
        LayerRange(NoStages())
