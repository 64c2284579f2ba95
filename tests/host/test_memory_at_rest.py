"""With KunServe on, the parameters exist once: in frames, and nowhere else."""

from __future__ import annotations

from pathlib import Path

import psutil
import pytest
import requests

from kunserve_sgl.tiny_model import write_tiny_model
from kunserve_sgl.tiny_model_spec import TinyModelSpec
from preloaded import Preloaded
from servers.command import KUNSERVE_SERVER, STOCK_SERVER, launch_command
from servers.server import ServerProcess, find_free_port

pytestmark = pytest.mark.server

START_DEADLINE_S = 900.0
CALL_DEADLINE_S = 600.0
# 250 MB of parameters in the layers, against some ten of noise.
MODEL = TinyModelSpec(dtype="float32", layers=4, hidden=1024, heads=8, intermediate=4096)
SLACK = 0.2


def scheduler_memory(server: ServerProcess) -> dict[str, int]:
    """Bytes of the one scheduler by kind, this process's share of shared pages; the libraries' files left out."""
    (pid,) = [pid for pid in server.pids() if psutil.Process(pid).cmdline()[:1][0].startswith("sglang::scheduler")]
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    kib = {line.split()[0]: int(line.split()[1]) for line in lines if line.endswith("kB")}
    return {"anonymous": kib["Pss_Anon:"] << 10, "shared": kib["Pss_Shmem:"] << 10}


def measure(preloaded: Preloaded, module: str, model: Path, *flags: str) -> tuple[dict[str, int], int]:
    """The scheduler's memory once it has served, and the bytes that the ledger has for parameters."""
    port = find_free_port()
    command = launch_command(
        *(module, model, port, "--dtype", "float32", "--max-total-tokens", "1024", "--context-length", "512", *flags)
    )
    environment = {"OMP_NUM_THREADS": "1"}
    with ServerProcess(command, port=port, env=environment, grace_s=0.0, popen=preloaded.popen) as server:
        server.wait_healthy(START_DEADLINE_S)
        body = {"input_ids": [*range(300, 400)], "sampling_params": {"max_new_tokens": 4, "temperature": 0}}
        requests.post(f"{server.base_url}/generate", json=body, timeout=CALL_DEADLINE_S).raise_for_status()
        in_frames = 0
        if flags:
            status = requests.get(f"{server.base_url}/kunserve/status", timeout=CALL_DEADLINE_S).json()
            frames = status["replicas"][0]["frames"]
            in_frames = frames["parameters"] * frames["bytes"]
        return scheduler_memory(server), in_frames


def test_no_copy_of_the_parameters_is_left(preloaded: Preloaded, tmp_path: Path) -> None:
    write_tiny_model(MODEL, tmp_path / "model")
    stock, _ = measure(preloaded, STOCK_SERVER, tmp_path / "model")
    ours, parameters = measure(preloaded, KUNSERVE_SERVER, tmp_path / "model", "--kunserve", "manual")
    assert parameters > 200 << 20
    assert stock["shared"] < SLACK * parameters, "stock keeps parameters in shared memory; the test compares nothing"
    assert stock["anonymous"] > parameters
    assert ours["shared"] > (1 - SLACK) * parameters, "the model does not serve from its frames"
    assert ours["anonymous"] < stock["anonymous"] - (1 - SLACK) * parameters, "a copy outside of the frames is left"
    assert sum(ours.values()) < sum(stock.values()) + SLACK * parameters
