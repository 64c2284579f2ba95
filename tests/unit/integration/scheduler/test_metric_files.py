"""What a process has counted on another machine, on its way to the HTTP server's directory."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.mmap_dict import MmapedDict, mmap_key
from prometheus_client.multiprocess import MultiProcessCollector

from kunserve_sgl.integration.launcher import far_metrics
from kunserve_sgl.integration.messages import MetricsTold
from kunserve_sgl.integration.scheduler.metric_files import INTERVAL_S, MetricFiles


class Machine:
    """One that counts, and the head."""

    def __init__(self, directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.far, self.head = directory / "far", directory / "head"
        self.far.mkdir()
        self.head.mkdir()
        monkeypatch.setenv("PROMETHEUS_MULTIPROC_DIR", str(self.head))
        self.now_s = 100.0
        self.sent: list[MetricsTold] = []
        self.files = MetricFiles(self.far, "replica1.0", self.sent.append, lambda: self.now_s)

    def count(self, kind: str, name: str, value: float, process: int | None = None) -> None:
        """Writes as prometheus_client does in a process."""
        counted = MmapedDict(str(self.far / f"{kind}_{process or os.getpid()}.db"))
        counted.write_value(mmap_key(name, name, ["dp_rank"], ["1"], "A metric"), value, self.now_s)
        counted.close()

    def follow(self, seconds: float = 0.0) -> list[MetricsTold]:
        """Returns what is sent after so long."""
        self.now_s += seconds
        self.sent.clear()
        self.files.follow()
        for message in self.sent:
            far_metrics.on_told(message)
        return self.sent

    def shown(self) -> str:
        """What /metrics gives."""
        registry = CollectorRegistry()
        MultiProcessCollector(registry)
        return str(generate_latest(registry).decode())


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Machine:
    return Machine(tmp_path, monkeypatch)


def test_metrics_are_shown_by_the_head(machine: Machine) -> None:
    machine.count("counter", "requests_total", 3.0)
    machine.count("gauge_mostrecent", "used_tokens", 40.0)
    machine.count("counter", "of_another_process_total", 1.0, process=1)
    (machine.far / f"summary_{os.getpid()}.db").touch()  # is being made
    machine.follow()
    assert 'requests_total{dp_rank="1"} 3.0' in machine.shown()
    assert 'used_tokens{dp_rank="1"} 40.0' in machine.shown()
    assert "of_another_process_total" not in machine.shown()


def test_what_has_changed_is_sent_and_not_too_often(machine: Machine) -> None:
    machine.count("counter", "requests_total", 3.0)
    machine.count("gauge_mostrecent", "used_tokens", 40.0)
    assert len(machine.follow()) == 1
    machine.count("counter", "requests_total", 4.0)
    assert machine.follow(INTERVAL_S / 2) == []
    (message,) = machine.follow(INTERVAL_S / 2)
    assert list(message.files) == ["counter"]
    assert 'requests_total{dp_rank="1"} 4.0' in machine.shown()
    assert machine.follow(INTERVAL_S) == []


def test_what_is_no_file_of_metrics_spoils_nothing(machine: Machine, caplog: pytest.LogCaptureFixture) -> None:
    machine.count("counter", "requests_total", 3.0)
    (message,) = machine.follow()
    whole = message.files["counter"]
    for who, kind, content in (
        ("../replica1.0", "counter", whole),
        ("replica1_0", "counter", whole),
        ("replica2.0", "../counter", whole),
        ("replica2.0", "histogram", whole[:-4]),
        ("replica2.0", "histogram", b"\x40\0\0\0\0\0\0\0\xff\xff\xff\x7f" + bytes(60)),
        ("replica2.0", "histogram", b""),
    ):
        caplog.clear()
        far_metrics.on_told(MetricsTold(who=who, files={kind: content}))
        assert "ignored" in caplog.text
    assert [path.name for path in machine.head.iterdir()] == ["counter_replica1.0.db"]
    assert 'requests_total{dp_rank="1"} 3.0' in machine.shown()
