"""Which GPUs have access to each other, by a driver that answers as told."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pynvml
import pytest
import torch

from kunserve_sgl.integration.launcher import gpu_access
from kunserve_sgl.integration.launcher.gpu_access import choose_remote_attention, pairs_apart


class Driver:
    """GPUs by the driver's numbers; those in `linked` have access to each other, but for what is in `denied`."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, linked: set[frozenset[int]]) -> None:
        self.linked, self.denied = linked, set[tuple[int, int, int]]()
        self.users = 0
        monkeypatch.setattr(pynvml, "nvmlInit", lambda: self._use(1))
        monkeypatch.setattr(pynvml, "nvmlShutdown", lambda: self._use(-1))
        monkeypatch.setattr(pynvml, "nvmlDeviceGetHandleByIndex", lambda gpu: f"handle {gpu}")
        monkeypatch.setattr(pynvml, "nvmlDeviceGetP2PStatus", self._status)
        # The server sees all but the driver's first one.
        monkeypatch.setattr(torch.cuda, "_get_nvml_device_index", lambda gpu: gpu + 1)

    def _use(self, more: int) -> None:
        self.users += more

    def _status(self, one: str, other: str, way: int) -> int:
        assert self.users == 1
        gpus = int(one.split()[1]), int(other.split()[1])
        is_ok = frozenset(gpus) in self.linked and (*gpus, way) not in self.denied
        return int(pynvml.NVML_P2P_STATUS_OK if is_ok else pynvml.NVML_P2P_STATUS_CHIPSET_NOT_SUPPORTED)


def arguments(replicas: int, ranks: int = 1, **more: Any) -> Any:
    placed = {"base_gpu_id": 0, "gpu_id_step": 1, "pp_size": 1, "kunserve_replicas_per_gpu": 1}
    return SimpleNamespace(dp_size=replicas, tp_size=ranks, **placed | more)


@pytest.mark.parametrize(
    ("linked", "options", "apart"),
    [
        ([{1, 2}], arguments(2), []),
        ([], arguments(2), [(0, 1)]),
        ([{1, 2}], arguments(3), [(0, 2), (1, 2)]),
        ([{1, 2}, {3, 4}], arguments(4), [(0, 2), (0, 3), (1, 2), (1, 3)]),
        ([{1, 3}, {2, 4}], arguments(2, ranks=2), []),  # rank by rank
        ([{1, 2}, {3, 4}], arguments(2, ranks=2), [(0, 1)]),  # within replicas only
        ([{1, 3}], arguments(2, ranks=2), [(0, 1)]),
        ([], arguments(2, kunserve_replicas_per_gpu=2), []),  # both on one
        ([{3, 5}], arguments(2, base_gpu_id=2, gpu_id_step=2), []),
    ],
)
def test_who_cannot_map_whom(
    monkeypatch: pytest.MonkeyPatch, linked: list[set[int]], options: Any, apart: list[tuple[int, int]]
) -> None:
    driver = Driver(monkeypatch, set(map(frozenset, linked)))
    assert pairs_apart(options) == apart
    assert driver.users == 0


@pytest.mark.parametrize("pair", [(1, 2), (2, 1)])
@pytest.mark.parametrize("way", [pynvml.NVML_P2P_CAPS_INDEX_READ, pynvml.NVML_P2P_CAPS_INDEX_WRITE])
def test_access_is_to_read_and_write_both_ways(
    monkeypatch: pytest.MonkeyPatch, pair: tuple[int, int], way: int
) -> None:
    driver = Driver(monkeypatch, {frozenset({1, 2})})
    driver.denied.add((*pair, way))
    assert pairs_apart(arguments(2)) == [(0, 1)]


@pytest.mark.parametrize("call", ["nvmlInit", "nvmlDeviceGetP2PStatus"])
def test_a_driver_that_does_not_say_keeps_nobody_from_mapping(monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    driver = Driver(monkeypatch, set())

    def fail(*_: Any) -> None:
        raise pynvml.NVMLError(pynvml.NVML_ERROR_LIBRARY_NOT_FOUND)

    monkeypatch.setattr(pynvml, call, fail)
    assert pairs_apart(arguments(2)) == []
    assert driver.users == 0


def test_parts_of_gpus_keep_nobody_from_mapping(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch knows no number of the driver's for a part (MIG), and says so."""
    numbered = torch.cuda._get_nvml_device_index
    driver = Driver(monkeypatch, set())
    monkeypatch.setattr(torch.cuda, "_get_nvml_device_index", numbered)
    monkeypatch.setattr(torch.cuda, "_raw_device_uuid_nvml", lambda: ["GPU-0a", "GPU-0b"])
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "MIG-1a,MIG-1b")
    assert pairs_apart(arguments(2)) == []
    assert driver.users == 0


@pytest.mark.parametrize(
    ("linked", "wrong", "changes", "takes_messages"),
    [
        ([], [], {}, True),
        ([{1, 2}], [], {}, False),
        ([], ["no way"], {}, False),
        ([], [], {"kunserve_remote_attention": "map"}, False),
        ([], [], {"kunserve_activations": "mapped"}, False),
        ([], [], {"device": "cpu"}, False),
        ([], [], {"use_ray": True}, False),
        ([], [], {"dp_size": 1}, False),
        ([{1, 2}], [], {"dp_size": 3}, True),  # for one that has access to none
        ([{1, 2}, {3, 4}], [], {"dp_size": 4}, True),
        ([], [], {"dp_size": 4, "kunserve_replicas_per_gpu": 2}, False),
    ],
)
def test_messages_are_taken_where_two_have_no_access(
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    linked: list[set[int]],
    wrong: list[str],
    changes: dict[str, Any],
    takes_messages: bool,
) -> None:
    Driver(monkeypatch, set(map(frozenset, linked)))
    monkeypatch.setattr(gpu_access, "wrong_for_messages", lambda _args, is_on_cpu: iter(wrong))
    caplog.set_level("INFO")
    made: dict[str, Any] = {}
    asked = {"kunserve_remote_attention": "auto", "kunserve_activations": "auto", "device": "cuda", "use_ray": False}
    options = arguments(2)
    vars(options).update(asked | changes)
    options.override = lambda _source, **fields: made.update(fields)
    choose_remote_attention(options)
    assert made == ({"kunserve_lacks_access": True, "kunserve_activations": "collective"} if takes_messages else {})
    assert ("no access to each other's memory: 0 and " in caplog.text) is (takes_messages or bool(wrong))
    assert all(f"are not merged, as memory is not used by messages: {each}" in caplog.text for each in wrong)
    assert ("These use it by messages, and activations of all are sent" in caplog.text) is takes_messages


def test_it_is_said_who_has_no_access(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    Driver(monkeypatch, {frozenset({1, 2})})
    monkeypatch.setattr(gpu_access, "wrong_for_messages", lambda _args, is_on_cpu: iter(()))
    options = arguments(3, kunserve_remote_attention="auto", kunserve_activations="auto", device="cuda", use_ray=False)
    options.override = lambda _source, **fields: vars(options).update(fields)
    choose_remote_attention(options)
    (said,) = caplog.messages
    assert "have no access to each other's memory: 0 and 2, 1 and 2. These use it by messages" in said
