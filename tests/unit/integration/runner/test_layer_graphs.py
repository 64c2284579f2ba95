"""Graphs of single layers, with calls in their place: which there are, what goes in and out, and what runs without."""

from __future__ import annotations

import weakref
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from sglang.srt.model_executor.forward_batch_info import CaptureHiddenMode
from sglang.srt.model_executor.runner.decode_cuda_graph_runner import DecodeCudaGraphRunner

from kunserve_sgl.errors import InvariantError
from kunserve_sgl.exchange.tensor_layout import Activations
from kunserve_sgl.integration.runner import decode_graphs
from kunserve_sgl.integration.runner.decode_graphs import LayerDecodeGraphRunner
from kunserve_sgl.integration.runner.layer_graphs import LayerGraphs, RepeatedCalls, buckets_of

LAYERS, HIDDEN = 4, 6
BUCKETS = (8, 4, 2)


@dataclass(eq=False)
class Batch:
    """What attention of the toy model needs: a number per request."""

    numbers: torch.Tensor


def run(batch: Batch, state: Activations | None, start: int, end: int) -> Activations:
    """A toy model: layers that work in place on what they get, as many of SGLang's do."""
    if state is None:
        state = {"hidden_states": batch.numbers[:, None].repeat(1, HIDDEN), "residual": None}
    hidden, residual = state["hidden_states"], state["residual"]
    assert hidden is not None
    for layer in range(start, end):
        if residual is None:
            residual = hidden.clone()
        else:
            residual += hidden
        hidden = residual * (layer + 2) + batch.numbers[:, None]
    return {"hidden_states": hidden, "residual": residual}


@dataclass
class Static:
    """The static batches, by bucket."""

    loads: int = 0
    batches: dict[int, Batch] = field(default_factory=lambda: {size: Batch(torch.zeros(size)) for size in BUCKETS})
    loaded_bucket: int | None = None

    def load(self, batch: Batch) -> int | None:
        count = len(batch.numbers)
        bucket = min((size for size in self.batches if size >= count), default=None)
        if bucket is None:
            return None
        self.loads += 1
        self.batches[bucket].numbers[:count] = batch.numbers
        self.batches[bucket].numbers[count:] = torch.nan  # nobody reads what comes of padding
        return bucket


def captured() -> tuple[LayerGraphs, Static, RepeatedCalls]:
    backend, static = RepeatedCalls(), Static()
    graphs = LayerGraphs(backend, static, LAYERS, run)
    for size in BUCKETS:
        graphs.capture(size, static.batches[size])
    return graphs, static, backend


def test_there_is_a_graph_of_each_layer_and_bucket() -> None:
    graphs, _, backend = captured()
    assert backend.captured == [(size, layer) for size in BUCKETS for layer in range(LAYERS)]
    assert graphs.static_bytes == 2 * max(BUCKETS) * HIDDEN * 4


@pytest.mark.parametrize(
    ("sizes", "buckets"),
    [
        ([], ()),
        ([4], (4,)),
        ([1, 2, 4, 8, 12, 16, 24, 32], (1, 2, 4, 8, 16, 32)),
        ([160, 1, 3, 5, 80, 7], (1, 3, 7, 80, 160)),
        ([8, 16, 24], (8, 16, 24)),
    ],
)
def test_few_buckets_hold_all_sizes(sizes: list[int], buckets: tuple[int, ...]) -> None:
    assert buckets_of(sizes) == buckets
    assert max(sizes, default=0) == max(buckets, default=0)


@pytest.mark.parametrize("requests", range(1, 9))
def test_any_segment_gives_what_it_gives_without_graphs(requests: int) -> None:
    graphs, _, _ = captured()
    batch = Batch(torch.arange(1.0, requests + 1))
    for start in range(LAYERS):
        for end in range(start + 1, LAYERS + 1):
            expected = run(batch, None, 0, end)
            found = graphs.run(batch, run(batch, None, 0, start), start, end)
            assert found is not None
            for name, tensor in expected.items():
                assert tensor is not None
                assert torch.equal(found[name], tensor), (name, start, end)  # type: ignore[arg-type]


def test_a_batch_is_loaded_once() -> None:
    graphs, static, _ = captured()
    batch, other = Batch(torch.ones(3)), Batch(torch.ones(3))
    first = graphs.run(batch, run(batch, None, 0, 0), 0, 2)
    assert first is not None
    graphs.run(batch, first, 2, 4)
    assert static.loads == 1
    graphs.run(other, first, 2, 4)
    assert static.loads == 2
    graphs.forget()  # SGLang has run a batch of its own meanwhile
    graphs.run(other, first, 2, 4)
    assert static.loads == 3


def test_what_has_come_out_is_not_written_over() -> None:
    graphs, _, _ = captured()
    batch, other = Batch(torch.ones(3)), Batch(torch.full((3,), 7.0))
    found = graphs.run(batch, run(batch, None, 0, 0), 0, 2)
    graphs.run(other, run(other, None, 0, 0), 0, 2)
    assert found is not None
    assert torch.equal(found["hidden_states"], run(batch, None, 0, 2)["hidden_states"])  # type: ignore[arg-type]


def test_what_fits_no_graph_is_left_to_others() -> None:
    graphs, static, backend = captured()
    large = Batch(torch.ones(max(BUCKETS) + 1))
    assert graphs.run(large, run(large, None, 0, 0), 0, 2) is None
    batch = Batch(torch.ones(2))
    complete = run(batch, None, 0, 1)
    assert graphs.run(batch, complete, 0, 1) is None  # layer 0 has never seen a residual
    assert graphs.run(batch, {"hidden_states": complete["hidden_states"]}, 1, 2) is None
    assert static.loads == 0
    empty = LayerGraphs(backend, static, LAYERS, run)
    assert empty.run(batch, complete, 1, 2) is None


def test_a_bucket_without_graphs_is_an_error() -> None:
    graphs, static, _ = captured()
    static.batches = {3: Batch(torch.zeros(3))}
    batch = Batch(torch.ones(3))
    with pytest.raises(InvariantError, match=r"padded to 3; there are graphs for \[2, 4, 8\]"):
        graphs.run(batch, run(batch, None, 0, 0), 0, 1)


class Attention:
    """Counts what SGLang's graph runner asks of the attention backend."""

    def __init__(self) -> None:
        self.in_graph: list[int] = []

    def init_forward_metadata_in_graph(self, batch: Any) -> None:
        self.in_graph.append(len(batch.numbers))


@pytest.fixture
def runner(monkeypatch: pytest.MonkeyPatch) -> Any:
    """SGLang's runner of decode graphs with ours on top, without what needs a GPU."""
    made = LayerDecodeGraphRunner.__new__(LayerDecodeGraphRunner)
    made.capture_bs, made.backend, made.attn_backend, made.calls = [1, 2, 3, 4], RepeatedCalls(), Attention(), []
    made.model_runner = SimpleNamespace(layer_count=LAYERS, run_static=run)

    def prepare(self: Any, size: int) -> Any:
        batch = Batch(torch.zeros(size))
        batch.dp_padding_mode = SimpleNamespace(is_max_len=lambda: False)  # type: ignore[attr-defined]
        return batch, self.attn_backend, None

    def load_batch(self: Any, batch: Any) -> None:
        self.bs = min(size for size in self.capture_bs if size >= len(batch.numbers))
        self.calls.append(("load", self.bs))
        self._static[self.bs].numbers[: len(batch.numbers)] = batch.numbers

    replaced = {
        "capture_one_shape": lambda self, size, *_: self.calls.append(("whole", size)),
        "capture_prepare": prepare,
        "can_run_graph": lambda self, batch: len(batch.numbers) <= max(self.capture_bs),
        "load_batch": load_batch,
    }
    for name, function in replaced.items():
        monkeypatch.setattr(DecodeCudaGraphRunner, name, function)
    monkeypatch.setattr(decode_graphs, "set_dp_buffer_len", lambda *_: None)
    for size in reversed(made.capture_bs):
        made.capture_one_shape(size, forward=None)
    return made


def decode_step(requests: int, hidden: CaptureHiddenMode = CaptureHiddenMode.NULL) -> Batch:
    batch = Batch(torch.arange(1.0, requests + 1))
    batch.capture_hidden_mode = hidden  # type: ignore[attr-defined]
    return batch


def test_layers_are_captured_beside_the_whole_model(runner: Any) -> None:
    assert runner.calls == [("whole", size) for size in (4, 3, 2, 1)]
    assert runner.backend.captured == [(size, layer) for size in (4, 2, 1) for layer in range(LAYERS)]


def test_a_step_is_padded_to_a_bucket_of_the_layers(runner: Any) -> None:
    batch = decode_step(3)
    found = runner.layer_graphs.run(batch, run(batch, None, 0, 0), 0, LAYERS)
    assert runner.calls[-1] == ("load", 4)  # SGLang's own graph would have been for 3
    assert runner.attn_backend.in_graph == [4]
    assert runner.capture_bs == [1, 2, 3, 4]
    assert torch.equal(found["hidden_states"], run(batch, None, 0, LAYERS)["hidden_states"])  # type: ignore[arg-type]


def test_what_sglang_runs_without_graphs_has_none_here(runner: Any) -> None:
    for batch in (decode_step(5), decode_step(2, CaptureHiddenMode.FULL)):
        assert runner.layer_graphs.run(batch, run(batch, None, 0, 0), 0, 1) is None
    assert all(what != "load" for what, _ in runner.calls)


def test_a_loaded_batch_is_not_kept(runner: Any) -> None:
    batch = decode_step(2)
    runner.layer_graphs.run(batch, run(batch, None, 0, 0), 0, 1)
    gone = weakref.ref(batch)
    del batch
    assert gone() is None
