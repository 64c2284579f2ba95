"""The kunserve: metrics, in a process of its own as on a server, and the dashboard that shows them."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

DEADLINE_S = 900.0
PROGRAM = """
from types import SimpleNamespace

from prometheus_client import CollectorRegistry, generate_latest, multiprocess

from kunserve_sgl.control.answers import State
from kunserve_sgl.control.messages import LoadReport, Phase
from kunserve_sgl.control.transition import End
from kunserve_sgl.integration.controller.metrics import UPDATE_INTERVAL_S, Metrics
from kunserve_sgl.policy.decision import Act
from kunserve_sgl.policy.demand import AttentionTime, Forecast, ReplicaLoad

now_s = 0.0
metrics = Metrics("m", ranks=2, clock=lambda: now_s)
for sent in (3, 3, 5):
    load = ReplicaLoad(1000, 10, 20, 30, attention=(AttentionTime(0, 3 * sent, 1, 1), AttentionTime(2, sent, 1, 1)))
    counts = {"batches_sent": sent, "batches_served": 2 * sent}
    metrics.on_report(LoadReport(1, load, remote_tokens=7, **counts))
metrics.on_rejected("Hello")
metrics.on_restart(1)
metrics.on_restart(1)
moved = SimpleNamespace(end=End.SUCCEEDED, phase_seconds={Phase.PREPARE: 0.25}, longest_pause_s=0.004, freed_bytes=700)
metrics.on_transition(State.DROPPING, moved, SimpleNamespace(loaded_bytes=0))
moved.freed_bytes = 0
metrics.on_transition(State.RESTORING, moved, SimpleNamespace(loaded_bytes=350))
moved.end = End.ROLLED_BACK
metrics.on_transition(State.RESTORING, moved, SimpleNamespace(loaded_bytes=350))
metrics.on_transition(State.MERGED, moved, SimpleNamespace(loaded_bytes=0))
members = [{"id": 0, "group": (0,), "stalled": False}, {"id": 1, "group": (1, 2), "stalled": True}]
status = {"state": "merged", "epoch": 4, "members": members, "exchange": {"moved_bytes": 4096}}
coordinator = SimpleNamespace(status=lambda: status, maps=((True, False), (False, True)))
autopilot = SimpleNamespace(forecasts=lambda: {1: Forecast(60, 90, 1000, 1.0, 0)}, decisions={Act.DROP: 2})
metrics.update(coordinator, autopilot)
status["epoch"] = 5
metrics.update(coordinator, autopilot)  # too early
for now_s in (now_s, UPDATE_INTERVAL_S):
    metrics.update(coordinator, autopilot)
    registry = CollectorRegistry()
    multiprocess.MultiProcessCollector(registry)
    print(generate_latest(registry).decode())
    print("later")
"""


@pytest.fixture(scope="module")
def outputs(tmp_path_factory: pytest.TempPathFactory) -> list[list[str]]:
    """The lines that a server shows, at first and later: one process for all tests, since imports take long."""
    environment = {**os.environ, "PROMETHEUS_MULTIPROC_DIR": str(tmp_path_factory.mktemp("metrics"))}
    command = [sys.executable, "-c", PROGRAM]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True, timeout=DEADLINE_S)
    text = re.sub(r',model_name="m"|model_name="m",?', "", done.stdout)
    return [each.split("\n") for each in text.split("later\n")]


def test_values(outputs: list[list[str]]) -> None:
    lines, later, _ = outputs
    for line in (
        'kunserve:capacity_tokens{replica="1"} 1000.0',
        'kunserve:demand_tokens{part="growth",replica="1"} 20.0',
        'kunserve:forecast_tokens{replica="1"} 90.0',
        'kunserve:batches_sent_total{replica="1"} 5.0',
        'kunserve:batches_served_total{replica="1"} 10.0',
        'kunserve:remote_tokens{replica="1"} 7.0',
        'kunserve:remote_attention_total{peer="0",replica="1"} 15.0',
        'kunserve:remote_attention_total{peer="2",replica="1"} 5.0',
        'kunserve:peer_memory{peer="0",replica="1",way="map"} 0.0',
        'kunserve:peer_memory{peer="0",replica="1",way="message"} 1.0',
        'kunserve:transitions_total{kind="drop",outcome="succeeded"} 1.0',
        'kunserve:transitions_total{kind="restore",outcome="rolled back"} 1.0',
        'kunserve:phase_seconds_sum{kind="drop",phase="prepare"} 0.25',
        'kunserve:pause_seconds_count{kind="restore"} 2.0',
        'kunserve:transitions_total{kind="exchange",outcome="rolled back"} 1.0',
        "kunserve:exchanged_bytes_total{} 4096.0",
        "kunserve:dropped_bytes_total{} 700.0",
        "kunserve:restored_bytes_total{} 700.0",
        'kunserve:state{state="merged"} 1.0',
        'kunserve:state{state="normal"} 0.0',
        "kunserve:epoch{} 4.0",
        'kunserve:group_replicas{replica="1"} 2.0',
        'kunserve:stalled{replica="0"} 0.0',
        'kunserve:stalled{replica="1"} 1.0',
        'kunserve:rejected_messages_total{kind="Hello"} 1.0',
        'kunserve:restarts_total{replica="1"} 2.0',
        'kunserve:decisions_total{decision="drop"} 2.0',
    ):
        assert line in lines, line
    assert "kunserve:epoch{} 5.0" in later


def test_dashboard_shows_metrics_that_exist(outputs: list[list[str]]) -> None:
    dashboard = json.loads((Path(__file__).parents[4] / "docs" / "grafana" / "kunserve.json").read_text())
    there = {line.split("{")[0] for line in outputs[0] if line.startswith("kunserve:")}
    expressions = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    shown = {name for text in expressions for name in re.findall(r"kunserve:\w+", text)}
    assert shown <= there
    families = {re.sub(r"_(total|sum|count|bucket|created)$", "", name) for name in there}
    assert {re.sub(r"_(total|sum|count|bucket)$", "", name) for name in shown} | {"kunserve:epoch"} == families
