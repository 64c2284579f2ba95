"""What KunServe cannot work with: every flag and every kind of model is refused with its reason."""

from __future__ import annotations

import pytest

from kunserve_sgl import unsupported
from kunserve_sgl.errors import ConfigurationError
from kunserve_sgl.unsupported import ModelTraits


@pytest.mark.parametrize("refusal", unsupported.REFUSALS, ids=lambda refusal: refusal.field)
def test_each_unsupported_flag_is_named_with_its_reason(refusal: unsupported.Refusal) -> None:
    with pytest.raises(ConfigurationError) as raised:
        unsupported.check_supported({refusal.field: 7})
    assert refusal.flag in str(raised.value)
    assert refusal.reason in str(raised.value)
    assert "--kunserve off" in str(raised.value)


def test_all_unsupported_flags_are_named_at_once() -> None:
    with pytest.raises(ConfigurationError, match=r"(?s)--enable-dp-attention.*--pp-size 2"):
        unsupported.check_supported({"enable_dp_attention": True, "pp_size": 2, "enable_lora": None})


@pytest.mark.parametrize("refusal", unsupported.REFUSALS, ids=lambda refusal: refusal.field)
def test_accepted_values_pass(refusal: unsupported.Refusal) -> None:
    for value in refusal.accepted:
        unsupported.check_supported({refusal.field: value})


@pytest.mark.parametrize(
    ("traits", "reason"),
    [
        (ModelTraits(architecture="Gemma3ForCausalLM", is_hybrid=True), "mixes attention kinds"),
        (ModelTraits(architecture="BertModel", is_generation=False), "does not generate tokens"),
        (ModelTraits(architecture="Qwen2_5_VLForConditionalGeneration", is_multimodal=True), "images and other media"),
        (ModelTraits(architecture="GPT2LMHeadModel", has_layers=False), "decoder layers at model.layers"),
    ],
)
@pytest.mark.parametrize("replicas", [1, 2])
def test_models_without_a_plain_kv_cache_are_refused(traits: ModelTraits, reason: str, replicas: int) -> None:
    with pytest.raises(ConfigurationError, match=f"{traits.architecture} yet: .*{reason}.*LlamaForCausalLM"):
        unsupported.check_model(traits, replicas)
    unsupported.check_model(ModelTraits(architecture="LlamaForCausalLM"), replicas)


@pytest.mark.parametrize(
    ("traits", "reason"),
    [
        (ModelTraits(architecture="BloomForCausalLM", is_fallback=True), "no class of its own"),
        (ModelTraits(architecture="OlmoForCausalLM", has_stages=False), "no pipeline stages"),
    ],
)
def test_models_whose_layers_have_to_stay_together_are_refused_with_several_replicas(
    traits: ModelTraits, reason: str
) -> None:
    with pytest.raises(ConfigurationError, match=f"{traits.architecture} yet: .*{reason}.*--kunserve off"):
        unsupported.check_model(traits, 2)
    unsupported.check_model(traits, 1)
