"""Runs a part of a loaded model: some of its layers, with or without the embedding before and the logits behind.

SGLang's models that support pipeline stages read at call time which layers are theirs, and whether they are the
first or last stage. So a full model runs any range of its layers, with the same results bit for bit.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
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
        if not has_stages or inner not in parts or not hasattr(inner, "start_layer"):
            raise ConfigurationError(
                f"{type(model).__name__} has no pipeline stages in SGLang, so replicas cannot host its layers for each "
                "other; run it with --kunserve off"
            )
        self._inner = inner
        self._whole = (inner.start_layer, inner.end_layer)
        self._view = _StageView(inner.pp_group)
        for part in parts:
            part.pp_group = self._view

    @property
    def layer_count(self) -> int:
        """Counts the decoder layers of the whole model."""
        return int(self._whole[1])

    @contextmanager
    def only(self, start: int, end: int, *, first: bool, last: bool) -> Iterator[None]:
        """Lets a forward pass inside the block run layers [start, end); the embedding before them if `first`, norm and
        logits behind them if `last`."""
        self._inner.start_layer, self._inner.end_layer = start, end
        self._view.is_first_rank, self._view.is_last_rank = first, last
        try:
            yield
        finally:
            self._inner.start_layer, self._inner.end_layer = self._whole
            self._view.is_first_rank = self._view.is_last_rank = True
