"""Random weights for tiny models: reproducible to the bit, and scaled so that greedy decoding uses the whole context.

With the default initialisation of the library a random model mostly repeats one token, and a test that compares
tokens would not notice wrong KV. The gains below make attention sharp and strong against the embedding of the
current token, so that one changed early token or one wrong KV entry changes the continuation.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable

import torch
from torch import nn

# Standard deviation of q.k/sqrt(d) before the softmax: sharp enough that a head prefers a few tokens.
_SCORE_STD = 2.25
# RMS of what all attention layers together add to the residual stream; the embedding starts it with RMS 1.
_ATTENTION_GAIN = 2.0
# The same for the feed-forward layers. A SwiGLU of unit Gaussians has RMS 0.6, hence the division.
_FEED_FORWARD_GAIN = 1.0 / 0.6
# Standard deviation of router logits: experts are told apart clearly, none is dead.
_ROUTER_STD = 2.0
# Standard deviation of the output logits.
_LOGIT_STD = 3.0
_BIAS_STD = 0.3
# Bias on the scores by which experts are chosen, which are between 0 and 1: it changes some of the choices.
_CHOICE_BIAS_STD = 0.2
# Norm weights differ from 1, so that a norm that was lost or swapped shows in the tokens.
_NORM_SPREAD = 0.1

# Output RMS of a linear layer for an input of RMS 1, by module name; those that write into the residual stream are
# divided by sqrt(layers) in _gain.
_GAINS = {
    "q_proj": _SCORE_STD,
    "q_a_proj": 1.0,
    "q_b_proj": _SCORE_STD,
    "k_proj": 1.0,
    "v_proj": 1.0,
    "kv_a_proj_with_mqa": 1.0,
    "kv_b_proj": 1.0,
    "gate_proj": 1.0,
    "up_proj": 1.0,
    "gate_up_proj": 1.0,
    "gate": _ROUTER_STD,
    "shared_expert_gate": 1.0,
    "lm_head": _LOGIT_STD,
}
_RESIDUAL_GAINS = {"o_proj": _ATTENTION_GAIN, "down_proj": _FEED_FORWARD_GAIN}


def fill_weights(model: nn.Module, seed: int, layers: int, quiet_tokens: Iterable[int]) -> None:
    """Give every parameter of `model` (on the meta device) its random value, as a CPU tensor, and every buffer
    that is saved with them.

    A value depends on the seed, the parameter's name and its shape only: not on the order of parameters, the number
    of threads or the instruction set. `quiet_tokens` get an all-zero row in the output head: their logit is 0, more
    than three standard deviations below the greedy choice.

    Raises LookupError if the architecture has a parameter that no rule covers.
    """
    state = {}
    for name, tensor in model.state_dict().items():
        weight = _weight(name, tensor.shape, seed, layers)
        if name == "lm_head.weight":
            weight[list(quiet_tokens)] = 0.0
        state[name] = weight.to(tensor.dtype)
    model.load_state_dict(state, strict=True, assign=True)


def _weight(name: str, shape: torch.Size, seed: int, layers: int) -> torch.Tensor:
    module, _, kind = name.rpartition(".")
    if kind not in ("weight", "bias"):  # stacked experts are parameters of their own: (experts, out, in)
        module, kind = name, "weight"
    module = module.rpartition(".")[2]
    noise = _unit_noise(name, shape, seed)
    if module == "e_score_correction_bias":
        return noise * _CHOICE_BIAS_STD
    if kind == "bias":
        return noise * _BIAS_STD
    if module.endswith("norm"):
        # A norm on q undoes the gain of q_proj, so it carries the gain itself.
        return (1.0 + noise * _NORM_SPREAD) * (_SCORE_STD if module == "q_norm" else 1.0)
    if module == "embed_tokens":
        return noise
    return noise * (_gain(module, name, layers) / math.sqrt(shape[-1]))


def _gain(module: str, name: str, layers: int) -> float:
    if module in _RESIDUAL_GAINS:
        return _RESIDUAL_GAINS[module] / math.sqrt(layers)
    if module in _GAINS:
        return _GAINS[module]
    raise LookupError(f"no initialisation rule for parameter {name}")


def _unit_noise(name: str, shape: torch.Size, seed: int) -> torch.Tensor:
    """Uniform noise with mean 0 and variance 1, float32.

    It is made from 24-bit integers by one exact conversion, one addition and one multiplication. torch.randn goes
    through log and cos, whose last bit depends on the instruction set of the machine.
    """
    digest = hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=8).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)
    integers = torch.randint(-(2**23), 2**23, shape, generator=generator, dtype=torch.int32)
    return (integers.to(torch.float32) + 0.5) * (math.sqrt(3.0) / 2**23)
