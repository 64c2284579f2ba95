"""Captured graphs of single layers for decode steps: one for each layer and bucket of requests, for any plan.

A graph always reads and writes the same memory. So activations are copied into static buffers before the first layer of
a segment and out of them behind the last; in between, each layer finds there what the one before has left. They are
captured while all layers are here, and a transition changes nothing of them: parameters and KV come back to the same
addresses. This module knows neither CUDA nor SGLang's batches; `decode_graphs.py` is that side.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import Any, Protocol

import torch

from kunserve_sgl.errors import InvariantError
from kunserve_sgl.exchange.tensor_layout import Activations


class GraphBackend(Protocol):
    """Captures functions, and runs them again without Python. SGLang's backends are of this kind."""

    def capture_one(self, shape_key: Any, forward_fn: Callable[[], Any]) -> None:
        """Captures what `forward_fn` gives to the device, under `shape_key`. It may call it several times."""

    def replay(self, shape_key: Any, static_forward_batch: Any) -> Any:
        """Gives the device again what was captured under `shape_key`."""


class StaticBatches(Protocol):
    """Holds what a graph finds of the batch: rows, lengths, slots and positions at addresses that stay."""

    def load(self, batch: Any) -> int | None:
        """Copies what attention needs of the batch to where the graphs read it, padded to a bucket, and makes the
        attention backend's metadata. Returns the bucket; None, with nothing done, where it fits no bucket."""


RunLayers = Callable[[Any, Activations | None, int, int], Activations]
"""Runs layers [start, end) on a static batch, eagerly, on what came out of the layers before; on the embedding where
that is None."""


def buckets_of(sizes: Iterable[int]) -> tuple[int, ...]:
    """Returns the buckets of layers' graphs, ascending, of the batch sizes for which the engine has graphs of the whole
    model: each at least twice the one before, and the largest. A graph per layer costs memory and time at start, and a
    padded row of a decode step next to nothing."""
    ascending = sorted(set(sizes))
    buckets: list[int] = []
    for size in ascending:
        if not buckets or size >= 2 * buckets[-1]:
            buckets.append(size)
    if ascending and buckets[-1] != ascending[-1]:
        buckets.append(ascending[-1])
    return tuple(buckets)


class LayerGraphs:
    """Has the graphs of one rank."""

    def __init__(self, backend: GraphBackend, static: StaticBatches, layers: int, run: RunLayers) -> None:
        self._backend = backend
        self._static = static
        self._layers = layers
        self._run = run
        self._batches: dict[int, Any] = {}  # by bucket
        self._buffers: dict[str, torch.Tensor] = {}  # each (largest bucket, ...)
        # Before layer i, and behind the last: which tensors there are, and which of them the model has not made yet.
        self._states: list[dict[str, bool]] = []
        self._loaded: tuple[weakref.ref[Any], int] | None = None  # the batch that the static one holds, and its bucket

    @property
    def static_bytes(self) -> int:
        """Counts the bytes of the static buffers; what the graphs themselves take is the engine's to measure."""
        return sum(buffer.nbytes for buffer in self._buffers.values())

    def capture(self, bucket: int, batch: Any) -> None:
        """Captures all layers for the static batch of a bucket, the largest bucket first. All layers are here."""
        if not self._batches:
            self._make_buffers(batch)
        self._batches[bucket] = batch
        for layer in range(self._layers):
            self._backend.capture_one((bucket, layer), self._step(bucket, batch, layer))

    def run(self, batch: Any, state: Activations, start: int, end: int) -> Activations | None:
        """Runs layers [start, end) on a decode step by their graphs, on what came out of the layers before, each tensor
        (requests, ...). What is returned is the caller's. None, with nothing done, where there are no graphs for it."""
        if not self._batches or not self._is_state(start, state):
            return None
        bucket = self._load(batch)
        if bucket is None:
            return None
        rows = 0
        for name, tensor in state.items():
            if tensor is not None:
                rows = len(tensor)
                self._buffers[name][:rows].copy_(tensor)
        static = self._batches[bucket]
        for layer in range(start, end):
            self._backend.replay((bucket, layer), static)
        return {name: self._buffers[name][:rows].clone() if made else None for name, made in self._states[end].items()}

    def forget(self) -> None:
        """Takes note that the static batch, or the attention backend's metadata, is another one's now."""
        self._loaded = None

    def _load(self, batch: Any) -> int | None:
        if self._loaded is not None and self._loaded[0]() is batch:
            return self._loaded[1]
        self._loaded = None
        bucket = self._static.load(batch)
        if bucket is not None:
            if bucket not in self._batches:
                raise InvariantError(f"a batch was padded to {bucket}; there are graphs for {sorted(self._batches)}")
            self._loaded = weakref.ref(batch), bucket
        return bucket

    def _is_state(self, layer: int, state: Activations) -> bool:
        return self._states[layer] == {name: tensor is not None for name, tensor in state.items()}

    def _make_buffers(self, batch: Any) -> None:
        """Runs the layers once, to see what comes out of each, and makes room for it. Nothing is captured here."""
        state = self._run(batch, None, 0, 0)
        for layer in range(self._layers + 1):
            if layer:
                state = self._run(batch, state, layer - 1, layer)
            self._states.append({name: tensor is not None for name, tensor in state.items()})
            for name, tensor in state.items():
                if tensor is not None and name not in self._buffers:
                    self._buffers[name] = torch.zeros_like(tensor)

    def _inputs(self, bucket: int, layer: int) -> Activations:
        return {name: self._buffers[name][:bucket] if made else None for name, made in self._states[layer].items()}

    def _step(self, bucket: int, batch: Any, layer: int) -> Callable[[], None]:
        """Returns what is captured: a layer that reads and writes the static buffers."""

        def step() -> None:
            for name, tensor in self._run(batch, self._inputs(bucket, layer), layer, layer + 1).items():
                # Many layers work in place.
                if tensor is not None and tensor.data_ptr() != self._buffers[name].data_ptr():
                    self._buffers[name][:bucket].copy_(tensor)

        return step


class RepeatedCalls(GraphBackend):
    """Stands in for graphs where there are none: a replay is the call again. What it computes is what a graph would, if
    that reads and writes no other memory."""

    def __init__(self) -> None:
        self._captured: dict[Hashable, Callable[[], Any]] = {}

    @property
    def captured(self) -> Sequence[Hashable]:
        """Lists the keys in the order in which they were captured."""
        return list(self._captured)

    def capture_one(self, shape_key: Any, forward_fn: Callable[[], Any]) -> None:
        """Calls the function, as a capture does, and keeps it."""
        forward_fn()
        self._captured[shape_key] = forward_fn

    def replay(self, shape_key: Any, static_forward_batch: Any) -> Any:
        """Calls the function again."""
        return self._captured[shape_key]()
