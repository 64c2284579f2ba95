"""Runs segments once before the replica is ready, so that no batch of a merged group waits for kernels.

On CUDA the first batches of a kind have their Triton kernels compiled, and their modules loaded, in the middle of the
batch, while the replicas of the group wait. Own batches have been through that when graphs were captured; segments run
without graphs.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator

import numpy as np
import torch

from kunserve_sgl.replica.batch_shape import BatchShape
from kunserve_sgl.replica.layer_runner import LayerRunner

logger = logging.getLogger(__name__)

# Triton compiles a kernel anew for a number that is 1, and for one that 16 divides.
_NUMBERS = (1, 3, 16)
_PADDING_ROW, _SINK_SLOT = 0, 0  # what they hold is nobody's


def warm_up(runner: LayerRunner, most_requests: int, most_tokens: int) -> None:
    """Runs all layers on a batch of each kind, where kernels are compiled. `most_requests` and `most_tokens` are what a
    batch may have. All ranks of a replica call it at the same point, before the first batch."""
    if runner.device.type != "cuda":
        return
    began_s = time.perf_counter()
    batches = run_each_kind(runner, most_requests, most_tokens)
    logger.info(
        "KunServe: kernels of merged segments are ready: %d batches in %.1f s", batches, time.perf_counter() - began_s
    )


def run_each_kind(runner: LayerRunner, most_requests: int, most_tokens: int) -> int:
    """Runs them, on any device, and waits until they have run. Returns how many. It leaves nothing: their rows are the
    padding row, and their KV goes to the sink."""
    batches = 0
    with torch.no_grad(), runner.batch_stream():
        for shape in shapes(runner, most_requests, most_tokens):
            batch = runner.rebuild(shape)
            runner.run_layers(batch, runner.blank_state(shape.tokens), 0, runner.layer_count)
            batches += 1
        runner.synchronize()
    return batches


def shapes(runner: LayerRunner, most_requests: int, most_tokens: int) -> Iterator[BatchShape]:
    """Yields the batches: decode steps, and prefills with and without a cached prefix, of several sizes."""
    decode, prefills = runner.modes
    longest = runner.rows.row_width
    for requests in sorted({min(each, most_requests) for each in _NUMBERS}):
        for length in sorted({min(each, longest) for each in _NUMBERS}):
            yield _shape(decode, requests, cached=length - 1, new=None)
            if requests * length <= most_tokens:
                for cached in sorted({0, min(length, longest - length)}):
                    yield _shape(min(prefills), requests, cached, length)  # others of them run the same kernels


def _shape(mode: int, requests: int, cached: int, new: int | None) -> BatchShape:
    tokens = 1 if new is None else new
    return BatchShape(
        mode,
        np.full(requests, _PADDING_ROW, np.int32),
        np.full(requests, cached + tokens, np.int32),
        None if new is None else np.full(requests, new, np.int32),
        np.full(requests * tokens, _SINK_SLOT, np.int64),
    )
