"""A llama whose decoder layers compute nothing. They have their parameters, so that there is something to drop, and the
embedding, the norm and the logits are real. SGLang finds it through SGLANG_EXTERNAL_MODEL_PACKAGE."""

from __future__ import annotations

from typing import Any

import torch
from sglang.srt.models.llama import LlamaForCausalLM, LlamaModel


def _nothing(
    positions: torch.Tensor, hidden_states: torch.Tensor, forward_batch: Any, residual: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    return hidden_states, hidden_states if residual is None else residual


class LayerlessForCausalLM(LlamaForCausalLM):  # type: ignore[misc]
    def _init_model(self, config: Any, quant_config: Any = None, prefix: str = "") -> LlamaModel:
        model = super()._init_model(config, quant_config, prefix)
        for layer in model.layers:
            layer.forward = _nothing
        return model


EntryClass = LayerlessForCausalLM
