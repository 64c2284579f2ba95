"""Stock replicas on one GPU: the command, and what becomes of SGLang's arguments."""

from __future__ import annotations

from pathlib import Path

import pytest
from sglang.srt.server_args import ServerArgs

from kunserve_sgl.tiny_model import write_tiny_model
from kunserve_sgl.tiny_model_spec import TinyModelSpec
from servers.command import KUNSERVE_SERVER, STOCK_SERVER, launch_command
from servers.one_gpu_stock import place_on_one_gpu

SHARED = ("--dp-size", "2", "--kunserve-replicas-per-gpu", "2", "--dtype", "float32")


def test_the_flag_places_stock_and_ours() -> None:
    stock = launch_command(STOCK_SERVER, Path("model"), 1, *SHARED)
    assert Path(stock[1]).name == "one_gpu_stock.py"
    assert Path(stock[1]).exists()
    assert stock[-4:] == ["--dp-size", "2", "--dtype", "float32"]
    ours = launch_command(KUNSERVE_SERVER, Path("model"), 1, *SHARED)
    assert ours[1:3] == ["-m", KUNSERVE_SERVER]
    assert ours[-6:] == list(SHARED)
    assert launch_command(STOCK_SERVER, Path("model"), 1, "--dp-size", "2")[1:3] == ["-m", STOCK_SERVER]
    with pytest.raises(ValueError, match="all of its 4 replicas"):
        launch_command(STOCK_SERVER, Path("model"), 1, "--dp-size", "4", *SHARED[2:])


def test_all_replicas_get_the_first_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = str(tmp_path / "model")
    write_tiny_model(TinyModelSpec(), model)
    monkeypatch.setattr(ServerArgs, "check_server_args", ServerArgs.check_server_args)  # put back at the end
    place_on_one_gpu()
    server_args = ServerArgs(model_path=model, dp_size=2)
    assert server_args.gpu_id_step == 1
    server_args.check_server_args()
    assert server_args.gpu_id_step == 0
    with pytest.raises(ValueError, match="--tp-size 2 --pp-size 1: accepted on one GPU: 1 and 1"):
        ServerArgs(model_path=model, dp_size=2, tp_size=2).check_server_args()
