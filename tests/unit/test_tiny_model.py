"""Tiny models: reproducible bytes, honest sizes, greedy outputs that depend on all tokens, and what is refused."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from kunserve_sgl.errors import ConfigurationError
from kunserve_sgl.tiny_model import TinyModelSizes, main, write_tiny_model
from kunserve_sgl.tiny_model_spec import (
    ARCHITECTURES,
    PRESETS,
    SPECIAL_TOKENS,
    MlaSpec,
    MoeSpec,
    TinyModelSpec,
)
from kunserve_sgl.tiny_model_tokenizer import unprintable_tokens

MINI = TinyModelSpec(layers=2, hidden=32, heads=2, intermediate=64, vocab_size=300)
EOS = SPECIAL_TOKENS.index("<|im_end|>")


@dataclass(frozen=True)
class Written:
    spec: TinyModelSpec
    path: Path
    sizes: TinyModelSizes


@pytest.fixture(scope="module", params=list(ARCHITECTURES))
def written(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Written:
    """A float32 model of the default size, for each architecture."""
    spec = TinyModelSpec(arch=request.param, dtype="float32")
    path = tmp_path_factory.mktemp(request.param)
    return Written(spec, path, write_tiny_model(spec, path))


@pytest.fixture(scope="module")
def model(written: Written) -> Any:
    return AutoModelForCausalLM.from_pretrained(written.path).eval()


def digests(path: Path) -> dict[str, str]:
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in path.iterdir()}


def tensors(path: Path) -> dict[str, torch.Tensor]:
    return load_file(path / "model.safetensors")  # type: ignore[no-any-return]


def test_a_model_without_weights_is_the_same_but_for_them(tmp_path: Path) -> None:
    whole, shape = write_tiny_model(MINI, tmp_path / "whole"), write_tiny_model(MINI, tmp_path / "shape", weights=False)
    assert shape == whole
    whole_digests, shape_digests = digests(tmp_path / "whole"), digests(tmp_path / "shape")
    assert "model.safetensors" in whole_digests
    assert shape_digests == {name: each for name, each in whole_digests.items() if name != "model.safetensors"}


# --- reproducible -----------------------------------------------------------------------------------------------


def test_same_flags_give_same_bytes_on_another_instruction_set(tmp_path: Path) -> None:
    """The child does without vector instructions, with other hash seeds and thread counts: another machine, nearly."""
    write_tiny_model(MINI, tmp_path / "here")
    command = [sys.executable, "-m", "kunserve_sgl.tiny_model", str(tmp_path / "there"), "--layers=2", "--hidden=32"]
    command += ["--heads=2", "--intermediate=64", "--vocab-size=300"]
    other_machine = {"ATEN_CPU_CAPABILITY": "default", "PYTHONHASHSEED": "7", "OMP_NUM_THREADS": "3"}
    subprocess.run(command, env={**os.environ, **other_machine}, check=True, timeout=600)
    assert digests(tmp_path / "here") == digests(tmp_path / "there")


def test_seed_changes_every_random_tensor_and_not_the_tokenizer(tmp_path: Path) -> None:
    write_tiny_model(MINI, tmp_path / "a")
    write_tiny_model(TinyModelSpec(**{**vars(MINI), "seed": 1}), tmp_path / "b")
    first, second = digests(tmp_path / "a"), digests(tmp_path / "b")
    assert {name for name in first if first[name] != second[name]} == {"model.safetensors"}
    a, b = tensors(tmp_path / "a"), tensors(tmp_path / "b")
    assert a.keys() == b.keys()
    assert [name for name in a if torch.equal(a[name], b[name])] == []


def test_layers_differ_from_each_other(tmp_path: Path) -> None:
    """Otherwise a test could not tell that a layer was restored with the parameters of another one."""
    write_tiny_model(MINI, tmp_path)
    weights = tensors(tmp_path)
    names = [name for name in weights if ".layers.0." in name]
    assert len(names) == 9
    for name in names:
        assert not torch.equal(weights[name], weights[name.replace(".0.", ".1.")]), name


# --- sizes ------------------------------------------------------------------------------------------------------


def test_sizes_are_those_of_the_file(written: Written) -> None:
    weights = tensors(written.path)
    by_layer = [
        sum(tensor.nbytes for name, tensor in weights.items() if f".layers.{layer}." in name)
        for layer in range(written.spec.layers)
    ]
    total = sum(tensor.nbytes for tensor in weights.values())
    assert written.sizes.parameter_bytes == total
    assert list(written.sizes.layer_bytes) == by_layer
    assert written.sizes.parameters * 4 == total


def test_kv_bytes_are_those_of_the_cache(written: Written, model: Any) -> None:
    if written.spec.mla is not None:  # transformers caches expanded keys; what SGLang caches is this projection
        projection = model.model.layers[0].self_attn.kv_a_proj_with_mqa
        cached_bytes = written.spec.layers * projection.out_features * 4
    else:
        cache = model(torch.tensor([[5]]), use_cache=True).past_key_values
        cached_bytes = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    assert written.sizes.kv_bytes_per_token == cached_bytes


def test_bfloat16_halves_the_bytes(written: Written, tmp_path: Path) -> None:
    """All but the corrections of a router, which stay in float32."""
    sizes = write_tiny_model(TinyModelSpec(arch=written.spec.arch, dtype="bfloat16"), tmp_path)
    kept = {name: tensor for name, tensor in tensors(tmp_path).items() if tensor.dtype == torch.float32}
    assert all(name.endswith("e_score_correction_bias") for name in kept)
    assert bool(kept) == (written.spec.arch == "glm4_moe")
    kept_bytes = sum(tensor.nbytes for tensor in kept.values())
    assert (sizes.parameter_bytes - kept_bytes) * 2 == written.sizes.parameter_bytes - kept_bytes
    assert sizes.kv_bytes_per_token * 2 == written.sizes.kv_bytes_per_token
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == "bfloat16"


def test_preset_small_is_the_47_million_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path), "--preset", "small"]) == 0
    parameters = sum(tensor.numel() for tensor in tensors(tmp_path).values())
    assert round(parameters / 1e6) == 47
    assert f"parameters           {parameters:,}\n" in capsys.readouterr().out


def test_report_says_whether_the_host_runs_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    mini = ["--layers=2", "--hidden=32", "--heads=2", "--intermediate=64", "--vocab-size=300"]
    for name, architecture in ARCHITECTURES.items():
        assert main([str(tmp_path / name), "--arch", name, *mini]) == 0
        answer = "yes" if architecture.runs_on_cpu else "no"
        assert f"runs on a CPU        {answer}: {architecture.cpu_note}\n" in capsys.readouterr().out + "\n"
    assert main([str(tmp_path / "mla"), "--arch=deepseek_v2", "--kv-lora-rank=24", "--qk-rope-head-dim=8", *mini]) == 0
    assert "latent of 24 + 8 elements per layer" in capsys.readouterr().out


# --- greedy outputs depend on the whole context -----------------------------------------------------------------

PROMPTS, PROMPT_TOKENS, NEW_TOKENS = 16, 48, 32


@torch.no_grad()
def greedy(model: Any, prompts: torch.Tensor, spoil_layers: Sequence[int] = ()) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens [prompt, NEW_TOKENS] and their logits [prompt, NEW_TOKENS, vocab], without stopping at EOS.

    With `spoil_layers`, each prompt goes on once for each of these layers, in which the cached values of prompt token 3
    are swapped with those of token 4 first: [prompt, layer] are rows then.
    """
    output = model(prompts[:, :-1], use_cache=True)
    last = prompts[:, -1]
    if spoil_layers:
        output.past_key_values.batch_repeat_interleave(len(spoil_layers))
        last = last.repeat_interleave(len(spoil_layers))
        for number, layer in enumerate(spoil_layers):
            values = output.past_key_values.layers[layer].values[number :: len(spoil_layers)]
            values[:, :, [3, 4]] = values[:, :, [4, 3]]
    tokens, logits = [], []
    for _ in range(NEW_TOKENS):
        output = model(last[:, None], past_key_values=output.past_key_values, use_cache=True)
        logits.append(output.logits[:, -1])
        last = logits[-1].argmax(-1)
        tokens.append(last)
    return torch.stack(tokens, 1), torch.stack(logits, 1)


def random_prompts(vocab_size: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(11)
    return torch.randint(len(SPECIAL_TOKENS), vocab_size, (PROMPTS, PROMPT_TOKENS), generator=generator)


def with_another_early_token(prompts: torch.Tensor) -> torch.Tensor:
    changed = prompts.clone()
    changed[:, 2] = torch.where(prompts[:, 2] == 1000, 1001, 1000)
    return changed


def share_that_differs(a: torch.Tensor, b: torch.Tensor) -> float:
    return (a != b).any(1).float().mean().item()


@pytest.fixture(scope="module")
def continuation(written: Written, model: Any) -> tuple[torch.Tensor, torch.Tensor]:
    return greedy(model, random_prompts(written.spec.vocab_size))


def test_continuations_differ_and_do_not_loop(continuation: tuple[torch.Tensor, torch.Tensor]) -> None:
    tokens, _ = continuation
    assert len({tuple(row) for row in tokens.tolist()}) == PROMPTS
    distinct = [len(set(row)) for row in tokens.tolist()]
    assert sum(count >= NEW_TOKENS // 2 for count in distinct) >= 0.9 * PROMPTS, distinct
    assert min(distinct) > 1, distinct


def test_one_early_token_changes_the_continuation(
    written: Written, model: Any, continuation: tuple[torch.Tensor, torch.Tensor]
) -> None:
    changed, _ = greedy(model, with_another_early_token(random_prompts(written.spec.vocab_size)))
    assert share_that_differs(continuation[0], changed) >= 0.9


def test_wrong_kv_of_one_token_in_one_layer_changes_the_continuation(
    written: Written, model: Any, continuation: tuple[torch.Tensor, torch.Tensor]
) -> None:
    layers = range(written.spec.layers)
    spoilt, _ = greedy(model, random_prompts(written.spec.vocab_size), layers)
    for layer in layers:
        assert share_that_differs(continuation[0], spoilt[layer :: len(layers)]) >= 0.5, layer


def test_the_greedy_choice_is_clear_in_float32(continuation: tuple[torch.Tensor, torch.Tensor]) -> None:
    """Rounding moves float32 logits by about 1e-5; the margin of the choice is far above that nearly always."""
    best = continuation[1].topk(2).values
    gaps = (best[..., 0] - best[..., 1]).flatten().sort().values
    assert gaps[len(gaps) // 100] > 1e-3
    assert gaps[len(gaps) // 2] > 0.2


def test_end_of_sequence_and_tokens_without_text_are_improbable(
    written: Written, continuation: tuple[torch.Tensor, torch.Tensor]
) -> None:
    tokens, logits = continuation
    assert logits.softmax(-1)[..., EOS].max() < 1e-4
    tokenizer = AutoTokenizer.from_pretrained(written.path)
    assert not set(tokens.flatten().tolist()) & set(unprintable_tokens(tokenizer))
    assert "".join(tokenizer.batch_decode(tokens)).replace("\n", " ").isprintable()


def test_default_initialisation_would_fail_these_checks(tmp_path: Path) -> None:
    """The reason for an initialisation of our own, and the proof that the checks above can fail."""
    write_tiny_model(TinyModelSpec(dtype="float32"), tmp_path)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(tmp_path), dtype=torch.float32).eval()
    prompts = random_prompts(2048)
    tokens, logits = greedy(model, prompts)
    spoilt, _ = greedy(model, prompts, [3])
    assert share_that_differs(tokens, spoilt) < 0.5
    assert sum(len(set(row)) >= NEW_TOKENS // 2 for row in tokens.tolist()) < 0.9 * PROMPTS
    assert logits.softmax(-1)[..., EOS].max() > 1e-4


# --- refused ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--hidden 250", "--hidden 250: accepted are multiples of 8"),
        ("--hidden 260 --heads 52", "--hidden 260: accepted are multiples of 104"),
        ("--kv-heads 3", "--kv-heads 3: with --arch llama --heads 4 accepted are 1, 2, 4"),
        ("--kv-heads 0", "--kv-heads 0: with --arch llama --heads 4 accepted are 1, 2, 4"),
        ("--arch deepseek_v2 --kv-heads 2", "--kv-heads 2: with --arch deepseek_v2 --heads 4 accepted are 4"),
        ("--vocab-size 259", "--vocab-size 259: accepted are 260 and above"),
        ("--layers 0", "--layers 0: accepted are 1 and above"),
        ("--heads -4", "--heads -4: accepted are 1 and above"),
        ("--intermediate 0", "--intermediate 0: accepted are 1 and above"),
        ("--max-position 0", "--max-position 0: accepted are 1 and above"),
        ("--seed -1", "--seed -1: accepted are 0 and above"),
        (
            "--experts 4",
            "--experts, --experts-per-token, --moe-intermediate: not accepted with --arch llama, only with",
        ),
        ("--arch qwen3_moe --kv-lora-rank 8", "not accepted with --arch qwen3_moe, only with deepseek_v2"),
        ("--arch qwen3_moe --experts-per-token 9", "--experts-per-token 9: accepted are 1 to 8"),
        ("--arch qwen3_moe --experts 0", "--experts 0: accepted are 1 and above"),
        ("--arch deepseek_v2 --qk-rope-head-dim 7", "--qk-rope-head-dim 7: accepted are even numbers"),
        ("--arch deepseek_v2 --q-lora-rank -1", "--q-lora-rank -1: accepted are 0"),
        ("--arch gpt2", "argument --arch: invalid choice: 'gpt2'"),
        ("--dtype float16", "argument --dtype: invalid choice: 'float16'"),
        ("--preset huge", "argument --preset: invalid choice: 'huge'"),
        ("--layers two", "argument --layers: invalid int value: 'two'"),
        ("--layer 2", "unrecognized arguments: --layer 2"),
    ],
)
def test_bad_flags_exit_with_2_and_name_the_flag(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: str, message: str
) -> None:
    with pytest.raises(SystemExit) as exit_info:
        main([str(tmp_path / "model"), *flags.split()])
    assert exit_info.value.code == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "model").exists()


def test_specs_refuse_what_the_flags_refuse() -> None:
    with pytest.raises(ConfigurationError, match="--arch gpt2: accepted are llama"):
        TinyModelSpec(arch="gpt2")
    with pytest.raises(ConfigurationError, match="--dtype float16: accepted are float32, bfloat16"):
        TinyModelSpec(dtype="float16")
    with pytest.raises(ConfigurationError, match="not accepted with --arch llama"):
        TinyModelSpec(moe=MoeSpec())
    with pytest.raises(ConfigurationError, match="not accepted with --arch qwen3_moe"):
        TinyModelSpec(arch="qwen3_moe", mla=MlaSpec())


def test_presets_are_accepted_by_every_architecture() -> None:
    for arch in ARCHITECTURES:
        for preset in PRESETS.values():
            assert TinyModelSpec(arch=arch, **preset).kv_bytes_per_token > 0


def test_a_directory_in_use_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def refused(target: Path, *flags: str) -> str:
        before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
        with pytest.raises(SystemExit) as exit_info:
            main([str(target), *flags])
        assert exit_info.value.code == 2
        assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
        return capsys.readouterr().err

    write_tiny_model(MINI, tmp_path / "model")
    assert "is not empty; --force replaces the model in it" in refused(tmp_path / "model")
    (tmp_path / "home").mkdir()
    (tmp_path / "home/thesis.txt").write_text("years of work")
    assert "holds thesis.txt, which is not of this command" in refused(tmp_path / "home", "--force")
    assert "is a file; accepted is a directory" in refused(tmp_path / "home/thesis.txt", "--force")


def test_force_replaces_an_earlier_model(tmp_path: Path) -> None:
    write_tiny_model(TinyModelSpec(), tmp_path / "model")
    (tmp_path / "model/.tiny_model-killed").mkdir()
    (tmp_path / "model/.tiny_model-killed/model.safetensors").write_bytes(b"half")
    write_tiny_model(MINI, tmp_path / "model", force=True)
    write_tiny_model(MINI, tmp_path / "fresh")
    assert digests(tmp_path / "model") == digests(tmp_path / "fresh")


@pytest.fixture
def full_disk(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The second file cannot be put in place."""
    moved: list[str] = []

    def replace(source: Path, target: Path) -> None:
        if moved:
            raise OSError(28, "No space left on device", str(target))
        moved.append(str(target))
        source.rename(target)

    monkeypatch.setattr(os, "replace", replace)
    yield
    assert moved


@pytest.mark.usefixtures("full_disk")
def test_an_interrupted_write_leaves_no_model_behind(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Half of an old and half of a new model must not look like a model."""
    target = tmp_path / "model"
    target.mkdir()
    (target / "config.json").write_text("{}")
    with pytest.raises(SystemExit) as exit_info:
        main([str(target), "--force", "--layers=1", "--hidden=16", "--heads=2", "--intermediate=16"])
    assert exit_info.value.code == 1
    assert "No space left on device" in capsys.readouterr().err
    assert [path.name for path in target.iterdir()] == ["model.safetensors"]
