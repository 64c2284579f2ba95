"""The runner of the GPU checks: order, deadline, skips, report; and what the checks compute where there is no GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

import gpu
from cuda_model.costs import CallCosts
from gpu_checks.catalog import COMMANDS, COMMANDS_S, ENTRIES
from gpu_checks.memory import CALLS, COSTS, cuda_costs, measured_table
from gpu_checks.place import CPU, CUDA, Place, environment
from gpu_checks.runner import Check, Result, Status, Table, markdown, read_result, read_runs, result_path, run_checks
from gpu_checks.speed import burst_table, decoding_table, transition_table
from waiting import wait_until

DEADLINE_S = 600.0
FRAME_BYTES = 65536


class StrictDriver:
    """The calls of a driver that cost something, by its rules: whole mappings only, nothing twice, nothing left."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.handles: set[int] = set()
        self.mapped: set[int] = set()
        self.descriptors: list[int] = []
        self.most_descriptors = 0
        self.reserved: tuple[int, int] | None = None

    def reserve(self, size_bytes: int, alignment_bytes: int) -> int:
        self.reserved = (64 * alignment_bytes, size_bytes)
        return self.reserved[0]

    def free(self, address: int, size_bytes: int) -> None:
        assert self.reserved == (address, size_bytes)
        assert not self.mapped
        self.reserved = None

    def create(self, size_bytes: int, device: int) -> int:
        self.counts["create"] += 1
        return self._new_handle()

    def release(self, handle: int) -> None:
        self.counts["release"] += 1
        self.handles.remove(handle)

    def map(self, address: int, size_bytes: int, handle: int) -> None:
        self.counts["map"] += 1
        assert handle in self.handles
        assert address not in self.mapped
        self.mapped.add(address)

    def unmap(self, address: int, size_bytes: int) -> None:
        self.counts["unmap"] += 1
        for place in range(address, address + size_bytes, FRAME_BYTES):
            self.mapped.remove(place)

    def allow_access(self, address: int, size_bytes: int, devices: tuple[int, ...]) -> None:
        self.counts["allow_access"] += 1
        assert self.mapped >= set(range(address, address + size_bytes, FRAME_BYTES))

    def export_fd(self, handle: int) -> int:
        self.counts["export_fd"] += 1
        self.descriptors = [fd for fd in self.descriptors if Path(f"/proc/self/fd/{fd}").exists()]
        self.descriptors.append(os.memfd_create("frame"))
        self.most_descriptors = max(self.most_descriptors, len(self.descriptors))
        return self.descriptors[-1]

    def import_fd(self, fd: int) -> int:
        self.counts["import_fd"] += 1
        os.fstat(fd)
        return self._new_handle()

    def device_of(self, handle: int) -> int:
        self.counts["device_of"] += 1
        assert handle in self.handles
        return 0

    def _new_handle(self) -> int:
        handle = self.counts["create"] + 1000 * self.counts["import_fd"]
        self.handles.add(handle)
        return handle


def script(text: str) -> list[str]:
    return [sys.executable, "-c", text]


def writing(output: Path, name: str, result: Result) -> list[str]:
    """A command that leaves `result` as a check would."""
    source = output / f"{name}.prepared"
    result.write(source)
    return script(f"import shutil; shutil.copy({str(source)!r}, {str(result_path(output, name))!r})")


def run(commands: dict[str, list[str]], output: Path, deadline_s: float = DEADLINE_S) -> dict[str, Result]:
    checks = [Check(name, f"about {name}", deadline_s) for name in commands]
    return {run.check.name: run.result for run in run_checks(checks, lambda check: commands[check.name], {}, output)}


def test_the_first_failure_is_the_last_check(tmp_path: Path) -> None:
    commands = {
        "one": writing(tmp_path, "one", Result(Status.PASSED)),
        "two": writing(tmp_path, "two", Result(Status.FAILED, "two is wrong")),
        "three": script(f"open({str(tmp_path / 'ran')!r}, 'w')"),
    }
    found = run(commands, tmp_path)
    assert {name: result.status for name, result in found.items()} == {"one": Status.PASSED, "two": Status.FAILED}
    assert found["two"].reason == "two is wrong"
    assert not (tmp_path / "ran").exists()


def test_a_check_that_ends_without_a_result_fails_with_what_it_said_last(tmp_path: Path) -> None:
    found = run({"one": script("import sys; print('a'); sys.exit('out of frames')")}, tmp_path)
    assert found["one"].status is Status.FAILED
    assert "status 1: out of frames" in found["one"].reason
    assert (tmp_path / "one.log").read_text().splitlines() == ["a", "out of frames"]
    found = run({"one": script("pass")}, tmp_path)
    assert (found["one"].status, found["one"].reason) == (Status.FAILED, "it ended without a result")


def test_a_result_counts_only_if_its_process_ends_well(tmp_path: Path) -> None:
    command = writing(tmp_path, "one", Result(Status.PASSED, figures={"us": "3"}))
    command[-1] += "; import os; os.abort()"
    found = run({"one": command}, tmp_path)
    assert found["one"].status is Status.FAILED
    assert "134" in found["one"].reason
    assert found["one"].figures == {"us": "3"}


def test_a_skip_is_no_failure(tmp_path: Path) -> None:
    commands = {
        "one": writing(tmp_path, "one", Result(Status.SKIPPED, "there is no GPU")),
        "two": writing(tmp_path, "two", Result(Status.PASSED)),
    }
    assert [result.status for result in run(commands, tmp_path).values()] == [Status.SKIPPED, Status.PASSED]


def test_the_deadline_kills_a_check_and_what_it_has_started(tmp_path: Path) -> None:
    pids = tmp_path / "pids"
    child = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(600)"
    hanging = script(
        "import os, signal, subprocess, sys\n"
        "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        f"child = subprocess.Popen([sys.executable, '-c', {child!r}], start_new_session=True)\n"
        f"open({str(pids)!r}, 'w').write(f'{{os.getpid()}} {{child.pid}}')\n"
        "child.wait()"
    )
    found = run({"one": hanging, "two": script("pass")}, tmp_path, deadline_s=10.0)
    assert list(found) == ["one"]
    assert "killed" in found["one"].reason
    for pid in map(int, pids.read_text().split()):
        wait_until(lambda pid=pid: not Path(f"/proc/{pid}").exists(), f"the end of process {pid}")


def test_results_of_several_commands_make_one_report(tmp_path: Path) -> None:
    table = Table("us per frame", ["call", "frames"], [["map", "2"]])
    passed = Result(
        Status.PASSED, figures={"cores": "2"}, tables=[table], skipped={"nvidia-smi": "no GPU"}, data={"raw": [1, 2]}
    )
    run({"one": writing(tmp_path, "one", passed)}, tmp_path)
    run({"two": writing(tmp_path, "two", Result(Status.FAILED, "a|b\nc"))}, tmp_path)
    checks = [Check(name, f"about {name}", DEADLINE_S) for name in ("one", "two", "three")]
    runs = read_runs(checks, tmp_path)
    assert [each.check.name for each in runs] == ["one", "two"]
    lines = markdown(runs, checks, {"machine": "an abacus"}).splitlines()
    assert lines[0] == "- machine: an abacus"
    rows = [line for line in lines if line.startswith("| ")][1:]
    assert rows[1].startswith("| one | about one | passed | ")
    assert rows[1].endswith(" | cores 2; nvidia-smi skipped: no GPU |")
    assert rows[2].endswith(" | a\\|b c |")
    assert rows[3] == "| three | about three | not run |  |  |"
    assert rows[4:] == ["| call | frames |", "| --- | --- |", "| map | 2 |"]
    written = json.loads(result_path(tmp_path, "one").read_text())
    assert written["seconds"] > 0
    assert written["data"] == {"raw": [1, 2]}


def test_what_is_no_result_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "one.json"
    path.write_text("{}")
    with pytest.raises(ValueError, match=r"one\.json: not the result of a check"):
        read_result(path)


def test_the_three_commands_take_ten_minutes_together_on_a_gpu(tmp_path: Path) -> None:
    place = Place(CUDA, tmp_path, tmp_path)
    assert [entry.name for entry in ENTRIES] == [f"F{number}" for number in range(11)]
    assert sum(entry.check(place).deadline_s for entry in ENTRIES) <= COMMANDS_S
    assert [entry for entries in COMMANDS.values() for entry in entries] == list(ENTRIES)


@pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: entry.name)
def test_every_check_has_its_function(entry: object) -> None:
    assert callable(entry.load())  # type: ignore[attr-defined]


def test_what_flashinfer_compiles_for_a_check_is_known_before(tmp_path: Path) -> None:
    """So nothing is compiled within its deadline."""
    program = """
from gpu_checks.parts import flashinfer_specs
print([spec.is_compiled for spec in flashinfer_specs()])
for spec in flashinfer_specs():
    spec.jit_library_path.parent.mkdir(parents=True, exist_ok=True)
    spec.jit_library_path.touch()
print([spec.is_compiled for spec in flashinfer_specs()])
"""
    env = {
        **os.environ,
        "PYTHONPATH": str(Path(gpu.__file__).parent),
        "FLASHINFER_WORKSPACE_BASE": str(tmp_path),
        "FLASHINFER_CUDA_ARCH_LIST": "9.0a",
    }
    made = subprocess.run([sys.executable, "-c", program], env=env, capture_output=True, text=True, timeout=900)
    assert made.stdout.splitlines()[-2:] == ["[False, False]", "[True, True]"], made.stderr


def test_commands_and_checks_are_chosen_by_name() -> None:
    assert [entry.name for entry in gpu.choose(["F5", "memory", "F1"])] == ["F0", "F1", "F2", "F3", "F5"]
    assert gpu.choose([]) == list(ENTRIES)
    with pytest.raises(ValueError, match=r"F11: accepted are memory, tokens, speed, F0, "):
        gpu.choose(["F11"])


def test_all_that_compiles_keeps_it_in_the_cache_directory(tmp_path: Path) -> None:
    env = environment(Place(CUDA, tmp_path / "cache", tmp_path))
    for name in ("TRITON_CACHE_DIR", "TVM_FFI_CACHE_DIR", "CUDA_CACHE_PATH"):
        assert Path(env[name]).parent == tmp_path / "cache"


def test_costs_are_measured_by_the_rules_of_the_driver() -> None:
    driver = StrictDriver()
    costs = cuda_costs(driver, 0, 10, FRAME_BYTES, at_a_time=4)  # type: ignore[arg-type]
    assert set(costs) == set(CALLS)
    assert all(us > 0 for us in costs.values())
    assert driver.most_descriptors == 4
    assert driver.counts == Counter(
        create=11, map=20, allow_access=11, unmap=11, export_fd=10, import_fd=10, device_of=10, release=21
    )
    assert (driver.mapped, driver.handles, driver.reserved) == (set(), set(), None)


def test_call_costs_are_written_for_those_who_reckon_with_them(tmp_path: Path) -> None:
    output = tmp_path / "out"
    assert gpu.main(["F1", "--device", CPU, "--cache", str(tmp_path / "cache"), "--output", str(output)]) == 0
    costs, assumed = CallCosts(output / COSTS), CallCosts()
    changed = {name for name, cost in costs.by_call.items() if cost != assumed.by_call[name]}
    assert changed == {CALLS[each] for each in ("create", "map", "unmap_one", "export", "import", "release")}
    assert all("memfd" in costs.by_call[name].source for name in changed)
    assert "| F1 |" in (output / gpu.REPORT).read_text()


def test_a_span_costs_a_call_and_further_frames() -> None:
    table = measured_table({"unmap_one": 34.0, "unmap_span": 5.0}, 11, "measured")
    assert table["calls"]["cuMemUnmap"] == {"call_us": 34.0, "further_frame_us": 2.1, "source": "measured"}


def test_tables_of_speed_are_made_of_rows() -> None:
    changes = [
        {"action": "drop", "load": "idle", "call_s": 0.01, "phases_ms": {"prepare": 4.0}, "pause_seconds": 0.002},
        {"action": "drop", "load": "idle", "call_s": 0.03, "phases_ms": {"prepare": 6.0}, "pause_seconds": 0.004},
        {
            **{"action": "restore", "load": "running", "call_s": 0.05, "phases_ms": {"load": 9.0}},
            **{"pause_seconds": 0.001, "longest_gap_s": 0.007},
        },
    ]
    assert transition_table(changes).rows == [
        ["drop, idle", "2", "20.0", "5.0", "0.0", "4.0", "-"],
        ["restore, running", "1", "50.0", "0.0", "9.0", "1.0", "7.0"],
    ]
    steps = [
        {"server": "graphs", "size": 8, "merged": merged, "tpot_s": s} for merged, s in ((False, 0.01), (True, 0.015))
    ]
    assert decoding_table(steps).rows == [["graphs", "8", "10.00", "15.00", "1.50"]]
    requests = [{"kind": "request", "system": "auto", "ttft_s": s, "tpot_s": 0.02} for s in (1.0, 2.0, 3.0)]
    assert burst_table([{"kind": "sample", "system": "auto"}, *requests]).rows == [
        ["auto", "3", "2.000", "2.800", "2.980", "20.0"]
    ]
