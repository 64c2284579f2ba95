"""What the source of a model's class says of its layers is what the model itself says when it has been built."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from kunserve_sgl.integration.launcher import model_class
from kunserve_sgl.integration.launcher.model_class import ModelClass, has_layers, has_stages, model_class_of, source_of
from kunserve_sgl.tiny_model import write_tiny_model
from kunserve_sgl.tiny_model_spec import TinyModelSpec
from unit.integration.imported import Imported

PROGRAM = Path(__file__).with_name("built_models_program.py")
# They stand for each of the answers; that they have been built is part of the test.
BUILT = {
    **dict.fromkeys(["LlamaForCausalLM", "Qwen2ForCausalLM", "Qwen3MoeForCausalLM", "DeepseekV2ForCausalLM"], True),
    **dict.fromkeys(["Phi3ForCausalLM", "MistralForCausalLM", "MixtralForCausalLM", "MellumForCausalLM"], True),
    **dict.fromkeys(["Gemma3ForCausalLM", "Olmo2ForCausalLM", "GraniteForCausalLM", "CohereForCausalLM"], False),
    **dict.fromkeys(["Starcoder2ForCausalLM", "StableLmForCausalLM", "Llama4ForCausalLM"], False),
    **dict.fromkeys(["GPT2LMHeadModel", "OPTForCausalLM"], False),
}
AT_LEAST = 40  # of the registry's, with SGLang 0.5.17


@pytest.fixture
def forgotten() -> Iterator[None]:
    """Nothing is remembered of other sources than SGLang's."""
    model_class._texts_of.cache_clear()
    yield
    model_class._texts_of.cache_clear()


def test_source_and_built_model_agree_for_every_architecture_that_can_be_built(
    tmp_path: Path, imported: Imported
) -> None:
    write_tiny_model(TinyModelSpec(), tmp_path / "tiny")
    printed = imported.run(PROGRAM.read_text(), str(tmp_path / "tiny"))
    reports = [json.loads(line) for line in printed.splitlines() if line.startswith("{")]
    built = {report["architecture"]: report for report in reports if "not_built" not in report}
    assert {name: built.get(name, {}).get("stages") for name in BUILT} == BUILT, [
        report for report in reports if report["architecture"] in BUILT
    ]
    assert len(built) >= AT_LEAST
    said = {}
    for name in built:
        source = source_of(name)
        assert source is not None, name
        said[name] = (has_layers(source), has_layers(source) and has_stages(source))
    assert said == {name: (report["layers"], report["stages"]) for name, report in built.items()}


def test_a_model_without_a_class_of_sglang_is_run_by_transformers() -> None:
    assert model_class_of(["BloomForCausalLM"], uses_transformers=False).is_fallback
    assert model_class_of(["TransformersForCausalLM"], uses_transformers=False).is_fallback
    assert model_class_of(["LlamaForCausalLM"], uses_transformers=True).is_fallback
    assert model_class_of(["LlamaForCausalLM"], uses_transformers=False) == ModelClass(is_fallback=False)


def test_the_first_architecture_that_sglang_knows_counts() -> None:
    assert model_class_of(["Unknown", "Olmo2ForCausalLM", "LlamaForCausalLM"], uses_transformers=False) == ModelClass(
        is_fallback=False, has_stages=False
    )


def test_mixtral_has_another_class_with_some_quantizations() -> None:
    for quantization, has_them in [(None, True), ("fp8", True), ("gptq", False)]:
        cls = model_class_of(["MixtralForCausalLM"], uses_transformers=False, quantization=quantization)
        assert cls == ModelClass(is_fallback=False, has_stages=has_them)


@pytest.mark.usefixtures("forgotten")
def test_an_external_package_goes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "more_models"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "mine.py").write_text(
        "from sglang.srt.models.llama import LlamaForCausalLM as Base, LlamaModel\n"
        "class Olmo2ForCausalLM(Base):\n"
        "    def _init_model(self, config):\n"
        "        return LlamaModel(config)\n"
        "class Scattered:\n"
        "    def forward(self, input_ids): ...\n"
        "EntryClass = [Olmo2ForCausalLM, Scattered]\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("SGLANG_EXTERNAL_MODEL_PACKAGE", "more_models")
    assert model_class_of(["Olmo2ForCausalLM"], uses_transformers=False) == ModelClass(is_fallback=False)
    assert model_class_of(["Scattered"], uses_transformers=False) == ModelClass(False, False, False)


@pytest.mark.usefixtures("forgotten")
def test_disabled_models_are_run_by_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SGLANG_DISABLED_MODEL_ARCHS", "olmo2")
    assert model_class_of(["Olmo2ForCausalLM"], uses_transformers=False).is_fallback


def test_what_a_plugin_has_registered_is_believed_to_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model_class, "_registered", lambda: {"Plugged": ModelClass})
    assert model_class_of(["Plugged"], uses_transformers=False) == ModelClass(is_fallback=False)
