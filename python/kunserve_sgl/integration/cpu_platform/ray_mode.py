"""What SGLang's Ray mode assumes of a machine and a CPU does not have: a GPU for every actor."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Any


class _WithoutGpu:
    """Stands in for an actor class of Ray whose actors ask for a GPU."""

    def __init__(self, upstream: Any) -> None:
        self.upstream = upstream

    def options(self, **options: Any) -> Any:
        return self.upstream.options(**{**options, "num_gpus": 0})


def install() -> None:
    """Lets actors and placement groups that SGLang asks for in this process do without GPUs: Ray would wait for some
    for ever. Idempotent; also after something else has been put in the place of SGLang's actor."""
    from sglang.srt.ray import engine

    if not isinstance(engine.SchedulerActor, _WithoutGpu):
        engine.SchedulerActor = _WithoutGpu(engine.SchedulerActor)
    # Of its name `ray.util` has the function.
    module: Any = importlib.import_module("ray.util.placement_group")
    make = module.placement_group
    if getattr(make, "asks_for_gpus", True):

        def make_without_gpus(bundles: Sequence[dict[str, float]], *args: Any, **kwargs: Any) -> Any:
            without = [{what: count for what, count in bundle.items() if what != "GPU"} for bundle in bundles]
            return make(without, *args, **kwargs)

        make_without_gpus.asks_for_gpus = False  # type: ignore[attr-defined]
        module.placement_group = make_without_gpus
