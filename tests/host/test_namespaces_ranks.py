"""Replicas of two ranks each on two machines that share nothing but a network."""

from __future__ import annotations

from pathlib import Path

import pytest
from _namespaces import TwoMachines, on_two_machines, served_on_both
from _servers import LLAMA

from kunserve_sgl.tiny_model import write_tiny_model

pytest.importorskip("ray", reason="Ray is not installed: the extra `ray`")

pytestmark = [pytest.mark.server, pytest.mark.long]


def test_replicas_of_two_ranks_merge_and_come_apart(tmp_path: Path) -> None:
    model = tmp_path / "model"
    write_tiny_model(LLAMA, model)
    with (
        TwoMachines(tmp_path, model) as machines,
        served_on_both(machines, model, on_two_machines("--tp-size", "2")) as served,
    ):
        served.check_merging()
        served.check_as_at_start()
