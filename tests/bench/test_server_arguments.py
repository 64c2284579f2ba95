"""What the benchmarks hand to the servers that they start: the model, its dtype, memory, placement."""

from __future__ import annotations

import json
from argparse import ArgumentParser, Namespace
from collections.abc import Callable
from pathlib import Path

import pytest

import at_rest
import endurance
import failure
import idle
import overhead
import soak
import startup
from kunserve_sgl.tiny_model_spec import PRESETS
from servers.command import KUNSERVE_SERVER, STOCK_SERVER, add_server_arguments, model_to_serve

MODEL = Path("model")
FLAGS = ["--kunserve-replicas-per-gpu", "2", "--mem-fraction-static", "0.5", "--cuda-graph-max-bs-decode", "64"]
Command = Callable[[Namespace], list[str]]
OURS: dict[str, tuple[ArgumentParser, Command]] = {
    "at_rest": (at_rest.build_parser(), lambda args: at_rest.server_command("on", MODEL, 1, args)),
    "endurance": (endurance.build_parser(), lambda args: endurance.server_command(MODEL, 1, args)),
    "failure": (
        failure.build_parser(),
        lambda args: failure.server_command(MODEL, 1, args, failure.SCENARIOS["merged"]),
    ),
    "idle": (idle.build_parser(), lambda args: idle.server_command(KUNSERVE_SERVER, MODEL, 1, args)),
    "overhead": (overhead.build_parser(), lambda args: overhead.server_command(MODEL, 1, args)),
    "soak": (soak.build_parser(), lambda args: soak.server_command(MODEL, 1, args)),
    "startup": (startup.build_parser(), lambda args: startup.server_command(KUNSERVE_SERVER, MODEL, 1, args)),
}
STOCK: dict[str, tuple[ArgumentParser, Command]] = {
    "at_rest": (at_rest.build_parser(), lambda args: at_rest.server_command("stock", MODEL, 1, args)),
    "idle": (idle.build_parser(), lambda args: idle.server_command(STOCK_SERVER, MODEL, 1, args)),
    "startup": (startup.build_parser(), lambda args: startup.server_command(STOCK_SERVER, MODEL, 1, args)),
}
GIVEN = ["--dtype", "bfloat16", f"--server-flags={' '.join(FLAGS)}"]


@pytest.mark.parametrize("name", OURS)
def test_flags_come_last_so_that_they_count_more_than_the_benchmarks_own(name: str) -> None:
    parser, command = OURS[name]
    found = command(parser.parse_args(GIVEN))
    assert found[-len(FLAGS) - 2 :] == ["--dtype", "bfloat16", *FLAGS]
    assert found.count("--dtype") == 1
    assert found[found.index("--model-path") + 1] == str(MODEL)
    assert command(parser.parse_args([]))[-2:] == ["--dtype", "float32"]


@pytest.mark.parametrize("name", STOCK)
def test_stock_gets_the_same_flags_and_its_own_placement(name: str) -> None:
    parser, command = STOCK[name]
    found = command(parser.parse_args(GIVEN))
    assert Path(found[1]).name == "one_gpu_stock.py"
    assert found[-6:] == ["--dtype", "bfloat16", *FLAGS[2:]]


def test_a_model_is_written_only_where_none_is_given(tmp_path: Path) -> None:
    parser = ArgumentParser()
    add_server_arguments(parser)
    given = parser.parse_args(["--model-path", str(tmp_path / "theirs")])
    assert model_to_serve(given, PRESETS["tiny"], tmp_path / "ours") == tmp_path / "theirs"
    assert list(tmp_path.iterdir()) == []
    written = model_to_serve(parser.parse_args(["--dtype", "bfloat16"]), PRESETS["tiny"], tmp_path / "ours")
    config = json.loads((written / "config.json").read_text(encoding="utf-8"))
    assert config["hidden_size"] == PRESETS["tiny"]["hidden"]
    assert "bfloat16" in (config.get("dtype"), config.get("torch_dtype"))
