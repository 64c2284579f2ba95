"""A dropped layer comes back from the checkpoint, through SGLang's loader, with the bytes it was loaded with."""

from __future__ import annotations

from pathlib import Path

import pytest

from kunserve_sgl.tiny_model import write_tiny_model
from kunserve_sgl.tiny_model_spec import TinyModelSpec
from preloaded import Preloaded

pytestmark = pytest.mark.server

PROGRAM = Path(__file__).with_name("_checkpoint_program.py")
DEADLINE_S = 900.0
FRAME_BYTES = 65536
LAYERS = 3
ARCHITECTURES = ("llama", "qwen3_moe", "deepseek_v2")


@pytest.fixture(scope="module")
def said(tmp_path_factory: pytest.TempPathFactory, preloaded: Preloaded) -> dict[str, list[str]]:
    """What the program says of each model, by lines."""
    directory = tmp_path_factory.mktemp("checkpoints")
    for arch in ARCHITECTURES:
        write_tiny_model(TinyModelSpec(arch=arch, layers=LAYERS, heads=16), directory / arch)
    models = [str(directory / arch) for arch in ARCHITECTURES]
    output = preloaded.output_of(str(PROGRAM), str(FRAME_BYTES), *models, deadline_s=DEADLINE_S)
    found: dict[str, list[str]] = {arch: [] for arch in ARCHITECTURES}
    for line in output.splitlines():
        arch, separator, words = line.partition(": ")
        if separator and arch in found:
            found[arch].append(words)
    return found


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_layers_come_back_from_the_checkpoint(arch: str, said: dict[str, list[str]]) -> None:
    lines = said[arch]
    restored = [line.split() for line in lines if line.startswith("restored")]
    assert [int(words[1]) for words in restored] == list(reversed(range(LAYERS)))
    assert all("self_attn.o_proj.weight" in words for words in restored)
    # Made by the loader from another weight, and no parameter.
    assert all(("self_attn.w_kc" in words) == (arch == "deepseek_v2") for words in restored)
    assert lines.count("stopped at dropped") == LAYERS - 1
    weights = 7  # of the layer, at least; each is a part, and then all is read for the checksum
    assert all(int(line.split()[1]) > weights for line in lines if line.startswith("parts: "))
    assert "changed weights: ChecksumMismatchError" in lines
    assert "lacks nothing: " in lines
    assert any(line.startswith("refused: layer 1: self_attn.scales is not a parameter") for line in lines)


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_a_checkpoint_that_is_not_what_was_loaded_says_why(arch: str, said: dict[str, list[str]]) -> None:
    refused = [line.removeprefix("refused: ") for line in said[arch] if line.startswith("refused: ")]
    assert refused[0] == "somebody sent others"
    assert refused[1].endswith("/model.safetensors has changed since it was loaded, or is gone")
    assert refused[2] == refused[1]
    assert "SafetensorError: " in refused[3]  # cut short before it was loaded, for all that is known
