"""What a process has counted on another machine, on its way to the HTTP server's directory."""

from __future__ import annotations

from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.mmap_dict import MmapedDict, mmap_key
from prometheus_client.multiprocess import MultiProcessCollector

from kunserve_sgl.integration.launcher import far_metrics
from kunserve_sgl.integration.messages import MetricsTold
from kunserve_sgl.integration.scheduler.metric_files import INTERVAL_S, MetricFiles

RANK_0 = 70  # its process


class Machine:
    """One that counts, and the head."""

    def __init__(self, directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.far, self.head = directory / "metrics" / "replica1.0", directory / "head"
        self.far.mkdir(parents=True)
        self.head.mkdir()
        monkeypatch.setenv("PROMETHEUS_MULTIPROC_DIR", str(self.head))
        self.now_s = 100.0
        self.sent: list[MetricsTold] = []
        self.files = MetricFiles(self.far, self.sent.append, lambda: self.now_s)

    def count(self, kind: str, name: str, value: float, process: int = RANK_0) -> None:
        """Writes as prometheus_client does in a process."""
        counted = MmapedDict(str(self.far / f"{kind}_{process}.db"))
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
    (machine.far / f"summary_{RANK_0}.db").touch()  # is being made
    machine.follow()
    assert 'requests_total{dp_rank="1"} 3.0' in machine.shown()
    assert 'used_tokens{dp_rank="1"} 40.0' in machine.shown()


def test_what_all_ranks_have_counted_is_shown(machine: Machine) -> None:
    """As on the head's machine. Rank 0 alone can send it."""
    for process, count in ((RANK_0, 3.0), (RANK_0 + 1, 4.0)):
        machine.count("counter", "rejected_total", count, process)
        machine.count("gauge_all", "used_tokens", count, process)
    assert [message.who for message in machine.follow()] == ["replica1.0.70", "replica1.0.71"]
    assert 'rejected_total{dp_rank="1"} 7.0' in machine.shown()
    for process, used in ((RANK_0, "3.0"), (RANK_0 + 1, "4.0")):
        assert f'used_tokens{{dp_rank="1",pid="replica1.0.{process}"}} {used}' in machine.shown()
    machine.count("counter", "rejected_total", 5.0, RANK_0 + 1)
    (message,) = machine.follow(INTERVAL_S)
    assert (message.who, list(message.files)) == ("replica1.0.71", ["counter"])
    assert 'rejected_total{dp_rank="1"} 8.0' in machine.shown()


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
        ("../replica1.0.70", "counter", whole),
        ("replica1_0.70", "counter", whole),
        ("replica1.0", "counter", whole),
        ("replica2.0.70", "../counter", whole),
        ("replica2.0.70", "histogram", whole[:-4]),
        ("replica2.0.70", "histogram", b"\x40\0\0\0\0\0\0\0\xff\xff\xff\x7f" + bytes(60)),
        ("replica2.0.70", "histogram", b""),
    ):
        caplog.clear()
        far_metrics.on_told(MetricsTold(who=who, files={kind: content}))
        assert "ignored" in caplog.text
    assert [path.name for path in machine.head.iterdir()] == ["counter_replica1.0.70.db"]
    assert 'requests_total{dp_rank="1"} 3.0' in machine.shown()
