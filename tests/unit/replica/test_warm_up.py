"""What runs before a replica is ready: every kind of batch once, and nothing of it stays."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from fake_engine import DECODE, EXTEND, LAYERS, WIDTH, Exchange, FakeRows, FakeRunner

from kunserve_sgl.replica.warm_up import run_each_kind, shapes, warm_up

MOST_REQUESTS, MOST_TOKENS = 64, 4096


@pytest.fixture
def runner() -> FakeRunner:
    return FakeRunner(0, torch.zeros(LAYERS, 100, 3), Exchange(1), FakeRows(0, replicas=2))


def test_every_kind_runs_once_through_all_layers(runner: FakeRunner) -> None:
    kinds = [
        (shape.mode, len(shape.rows), int(shape.lengths[0]), shape.tokens)
        for shape in shapes(runner, MOST_REQUESTS, MOST_TOKENS)
    ]
    assert len(set(kinds)) == len(kinds)
    assert {mode for mode, *_ in kinds} == {DECODE, EXTEND}
    for mode in (DECODE, EXTEND):
        assert {requests for each, requests, *_ in kinds if each == mode} == {1, 3, 16}
    cached = {length - tokens // requests for mode, requests, length, tokens in kinds if mode == EXTEND}
    assert {0, 1, 16} <= cached
    assert run_each_kind(runner, MOST_REQUESTS, MOST_TOKENS) == len(kinds)
    assert [layers for _, *layers in runner.runs] == [[0, LAYERS]] * len(kinds)


def test_it_leaves_no_kv_no_rows_and_runs_in_the_stream_of_batches(runner: FakeRunner) -> None:
    table = runner.rows.table.copy()
    run_each_kind(runner, MOST_REQUESTS, MOST_TOKENS)
    assert not runner.kv[:, 1:].any(), "all but the sink"
    assert bool(runner.kv[:, 0].any())
    assert np.array_equal(runner.rows.table, table)
    assert runner.rows.ledger.is_empty
    assert (runner.device_calls[0], runner.device_calls[-2:]) == ("enter", ["wait", "leave"])


def test_batches_are_no_larger_than_any_may_be(runner: FakeRunner) -> None:
    found = list(shapes(runner, 2, 20))
    assert {len(shape.rows) for shape in found} == {1, 2}
    assert all(shape.tokens <= 20 and shape.lengths.max() <= WIDTH for shape in found)
    assert any(shape.tokens == 16 for shape in found)


def test_only_where_kernels_are_compiled(runner: FakeRunner, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    warm_up(runner, MOST_REQUESTS, MOST_TOKENS)
    assert runner.runs == []
    runner.device = torch.device("cuda")
    warm_up(runner, MOST_REQUESTS, MOST_TOKENS)
    assert f"kernels of merged segments are ready: {len(runner.runs)} batches in" in caplog.text
    assert len(runner.runs) > 0
