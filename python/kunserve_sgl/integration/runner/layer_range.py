"""Runs a part of a loaded model: some of its layers, with or without the embedding before and the logits behind.

SGLang's models that support pipeline stages read at call time which layers are theirs, and whether they are the
first or last stage. So a full model runs any range of its layers, with the same results bit for bit.
"""

from __future__ import annotations

import inspect
from types import TracebackType
from typing import Any

from kunserve_sgl.errors import ConfigurationError


class _StageView:
    """Stands in for the pipeline group of a model: everything is the group's, except which stage this is."""

    def __init__(self, group: Any) -> None:
        self._group = group
        self.is_first_rank = True
        self.is_last_rank = True

    def __getattr__(self, name: str) -> Any:
        return getattr(self._group, name)


class LayerRange:
    """Sets which layers a forward pass of one loaded model runs."""

    def __init__(self, model: Any) -> None:
        """Raises ConfigurationError for a model that cannot run a range of its layers."""
        inner: Any = getattr(model, "model", None)
        parts = [part for part in (model, inner) if hasattr(part, "pp_group")]
        has_stages = "pp_proxy_tensors" in inspect.signature(model.forward).parameters
        if not has_stages or inner not in parts or not {"start_layer", "end_layer"} <= vars(inner).keys():
            raise ConfigurationError(
                f"{type(model).__name__} has no pipeline stages in SGLang, so replicas cannot host its layers for each "
                "other; run it with --kunserve off"
            )
        # Written to past torch's Module, which takes a hundred times as long, several times per segment.
        self._attributes = vars(inner)
        self._whole = (inner.start_layer, inner.end_layer)
        self._view = _StageView(inner.pp_group)
        for part in parts:
            part.pp_group = self._view

    @property
    def layer_count(self) -> int:
        """Counts the decoder layers of the whole model."""
        return int(self._whole[1])

    def only(self, start: int, end: int, *, first: bool, last: bool) -> LayerRange:
        """Lets a forward pass run layers [start, end), with the embedding before them if `first`, norm and logits
        behind them if `last`, until the block that this opens ends: `with layer_range.only(...)`. It does not nest."""
        self._set(start, end, first, last)
        return self

    def __enter__(self) -> None:
        pass

    def __exit__(
        self, _type: type[BaseException] | None, _error: BaseException | None, _traceback: TracebackType | None
    ) -> None:
        self._set(*self._whole, True, True)

    def _set(self, start: int, end: int, first: bool, last: bool) -> None:
        self._attributes["start_layer"], self._attributes["end_layer"] = start, end
        self._view.is_first_rank, self._view.is_last_rank = first, last
