"""What a tiny model is made of: the values one can choose, which of them fit together, and the sizes that follow."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from types import MappingProxyType
from typing import Any

from kunserve_sgl.errors import ConfigurationError

BYTE_VALUES = 256
SPECIAL_TOKENS = ("<|pad|>", "<|bos|>", "<|im_start|>", "<|im_end|>")
"""Their token ids are their places here. `<|im_end|>` ends a turn of a chat and a sequence."""

DTYPE_BYTES: Mapping[str, int] = MappingProxyType({"float32": 4, "bfloat16": 2})


@dataclass(frozen=True)
class Architecture:
    """Says what an architecture has, and whether SGLang 0.5.17 runs it without an accelerator and why."""

    has_experts: bool
    has_latent_attention: bool
    runs_on_cpu: bool
    cpu_note: str


ARCHITECTURES: Mapping[str, Architecture] = MappingProxyType(
    {
        "llama": Architecture(False, False, True, "dense layers and grouped-query attention"),
        "qwen2": Architecture(False, False, True, "as llama, with biases on q, k and v"),
        "qwen3": Architecture(False, False, True, "as llama, with norms on q and k"),
        "qwen2_moe": Architecture(True, False, True, "experts as qwen3_moe, and a gated one that all tokens share"),
        "qwen3_moe": Architecture(True, False, True, "SGLang falls back to one torch matmul after another per expert"),
        "deepseek_v2": Architecture(
            True,
            True,
            True,
            "latent attention in its absorbed form, for prefill and decode alike; experts as qwen3_moe",
        ),
        "glm4_moe": Architecture(
            True, False, True, "experts chosen with a bias, and one that all tokens share; the first layer is dense"
        ),
    }
)
EXPERT_ARCHITECTURES = tuple(name for name, entry in ARCHITECTURES.items() if entry.has_experts)
LATENT_ARCHITECTURES = tuple(name for name, entry in ARCHITECTURES.items() if entry.has_latent_attention)


@dataclass(frozen=True, kw_only=True)
class MoeSpec:
    """Describes the experts of a mixture-of-experts layer."""

    experts: int = 8
    experts_per_token: int = 2
    moe_intermediate: int = 256

    def __post_init__(self) -> None:
        _require_at_least_one(self, *(field.name for field in fields(self)))
        _require(
            self.experts_per_token <= self.experts,
            f"--experts-per-token {self.experts_per_token}: accepted are 1 to {self.experts} (--experts)",
        )


@dataclass(frozen=True, kw_only=True)
class MlaSpec:
    """Multi-head latent attention. With `q_lora_rank` 0 the queries are not compressed."""

    kv_lora_rank: int = 64
    q_lora_rank: int = 0
    qk_nope_head_dim: int = 32
    qk_rope_head_dim: int = 32
    v_head_dim: int = 32

    def __post_init__(self) -> None:
        _require_at_least_one(self, "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
        _require(
            self.q_lora_rank >= 0,
            f"--q-lora-rank {self.q_lora_rank}: accepted are 0 (not compressed) and above",
        )
        _require(
            self.qk_rope_head_dim % 2 == 0,
            f"--qk-rope-head-dim {self.qk_rope_head_dim}: accepted are even numbers (rotary embeddings pair elements)",
        )

    @property
    def latent_elements(self) -> int:
        """Counts the elements that one token adds to the KV cache of one layer: the latent and the shared rotary
        key."""
        return self.kv_lora_rank + self.qk_rope_head_dim


@dataclass(frozen=True, kw_only=True)
class TinyModelSpec:
    """Describes a model to write. Equal specs give byte-identical files with the same versions of the libraries.

    `kv_heads` None stands for half of the heads (for all of them where heads is odd or attention is latent), `moe`
    and `mla` None for their defaults if the architecture has them.
    Raises ConfigurationError if values do not fit together.
    """

    arch: str = "llama"
    layers: int = 4
    hidden: int = 256
    heads: int = 4
    kv_heads: int | None = None
    intermediate: int = 512
    vocab_size: int = 2048
    max_position: int = 8192
    dtype: str = "bfloat16"
    seed: int = 0
    moe: MoeSpec | None = None
    mla: MlaSpec | None = None

    def __post_init__(self) -> None:
        _require(self.arch in ARCHITECTURES, f"--arch {self.arch}: accepted are {', '.join(ARCHITECTURES)}")
        _require(self.dtype in DTYPE_BYTES, f"--dtype {self.dtype}: accepted are {', '.join(DTYPE_BYTES)}")
        _require_at_least_one(self, "layers", "hidden", "heads", "intermediate", "max_position")
        _require(self.seed >= 0, f"--seed {self.seed}: accepted are 0 and above")
        smallest = BYTE_VALUES + len(SPECIAL_TOKENS)
        _require(
            self.vocab_size >= smallest,
            f"--vocab-size {self.vocab_size}: accepted are {smallest} and above ({BYTE_VALUES} byte values and "
            f"{len(SPECIAL_TOKENS)} special tokens)",
        )
        _require(
            self.hidden % (2 * self.heads) == 0,
            f"--hidden {self.hidden}: accepted are multiples of {2 * self.heads} (the size of a head, --hidden / "
            f"--heads {self.heads}, is an even whole number)",
        )
        self._settle_parts()
        self._settle_kv_heads()

    def _settle_parts(self) -> None:
        for name, cls, owners in (("moe", MoeSpec, EXPERT_ARCHITECTURES), ("mla", MlaSpec, LATENT_ARCHITECTURES)):
            if self.arch in owners and getattr(self, name) is None:
                object.__setattr__(self, name, cls())
            _require(
                self.arch in owners or getattr(self, name) is None,
                f"{', '.join(flag_of(field.name) for field in fields(cls))}: not accepted with --arch {self.arch}, "
                f"only with {', '.join(owners)}",
            )

    def _settle_kv_heads(self) -> None:
        if self.mla is not None:
            allowed = [self.heads]
        else:
            allowed = [n for n in range(1, self.heads + 1) if self.heads % n == 0]
        if self.kv_heads is None:
            halve = self.mla is None and self.heads % 2 == 0
            object.__setattr__(self, "kv_heads", self.heads // 2 if halve else self.heads)
        _require(
            self.kv_heads in allowed,
            f"--kv-heads {self.kv_heads}: with --arch {self.arch} --heads {self.heads} accepted are "
            + ", ".join(map(str, allowed)),
        )

    @property
    def kv_elements_per_token(self) -> int:
        """Counts the elements that one token adds to the KV cache of one layer."""
        if self.mla is not None:
            return self.mla.latent_elements
        assert self.kv_heads is not None  # settled at construction
        return 2 * self.kv_heads * (self.hidden // self.heads)

    @property
    def kv_bytes_per_token(self) -> int:
        """Counts the bytes that one token adds to the KV cache of all layers, kept in the model's dtype."""
        return self.layers * self.kv_elements_per_token * DTYPE_BYTES[self.dtype]


PRESETS: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        "tiny": MappingProxyType({"layers": 4, "hidden": 256, "heads": 4, "intermediate": 512, "vocab_size": 2048}),
        "small": MappingProxyType({"layers": 8, "hidden": 512, "heads": 8, "intermediate": 3136, "vocab_size": 2048}),
        "deep": MappingProxyType({"layers": 16, "hidden": 512, "heads": 8, "intermediate": 512, "vocab_size": 2048}),
        "gpu": MappingProxyType({"layers": 8, "hidden": 1024, "heads": 16, "intermediate": 3072, "vocab_size": 2048}),
    }
)
"""Sizes by name: `tiny` (the defaults) for tests; `small` and `deep` for benchmarks, with 47 M and 27 M parameters as
llama. A layer of `deep` takes as much memory as the KV of 3,072 tokens in it. `gpu` is the smallest of which a drop
gains several granules in either dtype where a frame has 2 MiB, as on CUDA; with 105 M parameters."""


def flag_of(field: str) -> str:
    """Returns the flag that sets a field of the spec."""
    return "--" + field.replace("_", "-")


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ConfigurationError(message)


def _require_at_least_one(spec: object, *names: str) -> None:
    for name in names:
        value = getattr(spec, name)
        _require(value >= 1, f"{flag_of(name)} {value}: accepted are 1 and above")
