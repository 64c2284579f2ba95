"""Profiles of one replica: they are written, or given up with the reason."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from sglang.srt.managers.io_struct import ProfileReq, ProfileReqType
from sglang.srt.managers.scheduler_components import profiler_manager as upstream

from kunserve_sgl.integration.cpu_platform.platform import CpuPlatform
from kunserve_sgl.integration.scheduler.profiler import KunserveProfilerManager


@pytest.fixture
def manager(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(upstream, "current_platform", CpuPlatform())
    monkeypatch.setattr(torch.distributed, "barrier", lambda group: None)
    parallel = SimpleNamespace(tp_rank=0, dp_rank=1, dp_size=2, pp_size=1, moe_ep_size=1)
    made = KunserveProfilerManager(ps=parallel, dp_tp_cpu_group=None, get_forward_ct=lambda: made.batches)
    made.batches = 0
    return made


def start(manager: Any, directory: Path, **fields: Any) -> Any:
    request = ProfileReq(output_dir=str(directory), profile_id="p", activities=["CPU"], with_stack=False, **fields)
    return manager._profile(request)


def stop(manager: Any) -> Any:
    return manager._profile(ProfileReq(req_type=ProfileReqType.STOP_PROFILE))


def run_batch(manager: Any, decode: bool = False) -> None:
    manager.batches += 1
    mode = SimpleNamespace(
        name="DECODE" if decode else "EXTEND", is_prefill=lambda: not decode, is_decode=lambda: decode
    )
    manager._profile_batch_predicate(SimpleNamespace(forward_mode=mode))
    torch.zeros(4) + 1


def events(path: Path) -> int:
    with gzip.open(path, "rt") as file:
        return len(json.load(file)["traceEvents"])


def test_a_profile_of_some_steps(manager: Any, tmp_path: Path) -> None:
    answer = start(manager, tmp_path, num_steps=2)
    assert (answer.success, answer.message) == (True, "replica 1: Succeeded")
    for _ in range(4):
        run_batch(manager)
    assert events(tmp_path / "p-TP-0-DP-1.trace.json.gz") > 0
    assert stop(manager).message == "replica 1: Profiling is not in progress. Call /start_profile first."
    assert start(manager, tmp_path).success
    assert stop(manager).success


def test_a_second_profile_is_refused_and_the_first_goes_on(manager: Any, tmp_path: Path) -> None:
    assert start(manager, tmp_path / "first").success
    answer = start(manager, tmp_path / "second")
    assert (answer.success, answer.message) == (
        False, "replica 1: a profile is in progress; POST /stop_profile first",
    )  # fmt: skip
    assert stop(manager).success
    assert list((tmp_path / "first").iterdir())
    assert not (tmp_path / "second").exists()


def test_a_profile_that_cannot_be_written_is_told(manager: Any, tmp_path: Path) -> None:
    assert start(manager, tmp_path).success
    (tmp_path / "p-TP-0-DP-1.trace.json.gz").mkdir()
    answer = stop(manager)
    assert not answer.success
    assert answer.message.startswith("replica 1: the profile cannot be written: ")
    assert start(manager, tmp_path / "elsewhere").success
    assert stop(manager).success


def test_batches_go_on_when_a_profile_fails(manager: Any, tmp_path: Path) -> None:
    directory = tmp_path / "gone"
    assert start(manager, directory, num_steps=1).success
    directory.write_text("in the way")
    for _ in range(3):
        run_batch(manager)
    assert stop(manager).success is False
    assert start(manager, tmp_path / "other").success
    assert stop(manager).success


def test_a_profile_by_stage_without_steps_is_given_up(manager: Any, tmp_path: Path) -> None:
    assert start(manager, tmp_path, profile_by_stage=True).success
    run_batch(manager)
    run_batch(manager, decode=True)
    assert start(manager, tmp_path).success
    assert stop(manager).success


def test_a_start_that_fails_is_told(manager: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(**_: Any) -> None:
        raise ImportError("no such tool")

    monkeypatch.setattr(torch.profiler, "profile", fail)
    answer = start(manager, tmp_path)
    assert (answer.success, answer.message) == (
        False, "replica 1: the profile is given up: ImportError: no such tool",
    )  # fmt: skip
