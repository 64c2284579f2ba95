"""Writes small random-weight models for tests, demo and benchmarks: `python -m kunserve_sgl.tiny_model DIR`."""

from __future__ import annotations

import argparse
import itertools
import os
import shutil
import sys
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from kunserve_sgl.errors import ConfigurationError
from kunserve_sgl.tiny_model_spec import (
    ARCHITECTURES,
    DTYPE_BYTES,
    EXPERT_ARCHITECTURES,
    PRESETS,
    SPECIAL_TOKENS,
    MlaSpec,
    MoeSpec,
    TinyModelSpec,
    flag_of,
)

# All that a model directory holds. config.json comes last: a directory that has it is complete.
_FILES = (
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "generation_config.json",
    "config.json",
)
_STAGING_PREFIX = ".tiny_model-"


@dataclass(frozen=True)
class TinyModelSizes:
    """Says what was written. `layer_bytes` are the parameter bytes of each decoder layer, in order."""

    parameters: int
    parameter_bytes: int
    layer_bytes: tuple[int, ...]
    kv_bytes_per_token: int


def write_tiny_model(
    spec: TinyModelSpec, directory: str | os.PathLike[str], *, force: bool = False, weights: bool = True
) -> TinyModelSizes:
    """Writes the model, its tokenizer and its chat template to `directory`, which is made if it is missing.

    With `force` an earlier model of this command is replaced; files of anyone else are never touched. Without `weights`
    a server needs `--load-format dummy`.
    Raises ConfigurationError if the directory cannot be used, OSError if writing fails.
    """
    target = Path(directory)
    _check_target(target, force)
    # Imported late: they take seconds, which a wrong flag should not cost.
    import torch
    from transformers import AutoModelForCausalLM, GenerationConfig

    from kunserve_sgl.tiny_model_tokenizer import build_tokenizer, unprintable_tokens
    from kunserve_sgl.tiny_model_weights import fill_weights

    dtype: torch.dtype = getattr(torch, spec.dtype)
    tokenizer = build_tokenizer(spec.vocab_size, spec.max_position)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(_library_config(spec), dtype=dtype)
    if weights:
        fill_weights(model, spec.seed, spec.layers, quiet_tokens=unprintable_tokens(tokenizer))
    model.generation_config = GenerationConfig(**_token_ids())

    target.mkdir(parents=True, exist_ok=True)
    for leftover in target.glob(_STAGING_PREFIX + "*"):  # of a run that was killed
        shutil.rmtree(leftover)
    with tempfile.TemporaryDirectory(prefix=_STAGING_PREFIX, dir=target) as staging:
        tokenizer.save_pretrained(staging)
        if weights:
            model.save_pretrained(staging)
        else:
            model.config.architectures = [type(model).__name__]
            model.config.save_pretrained(staging)
            model.generation_config.save_pretrained(staging)
        (target / _FILES[-1]).unlink(missing_ok=True)
        for name in _FILES if weights else _FILES[1:]:
            os.replace(Path(staging, name), target / name)
    layer_bytes = [0] * spec.layers
    written = model.state_dict()
    for name, tensor in written.items():
        if name.startswith("model.layers."):
            layer_bytes[int(name.split(".")[2])] += tensor.nbytes
    return TinyModelSizes(
        parameters=sum(tensor.numel() for tensor in written.values()),
        parameter_bytes=sum(tensor.nbytes for tensor in written.values()),
        layer_bytes=tuple(layer_bytes),
        kv_bytes_per_token=spec.kv_bytes_per_token,
    )


def _check_target(target: Path, force: bool) -> None:
    if not target.exists():
        return
    if not target.is_dir():
        raise ConfigurationError(f"DIR {target}: is a file; accepted is a directory that is empty or does not exist")
    present = {entry.name for entry in target.iterdir()}
    if not present:
        return
    foreign = sorted(name for name in present - set(_FILES) if not name.startswith(_STAGING_PREFIX))
    if foreign:
        raise ConfigurationError(
            f"DIR {target}: holds {foreign[0]}, which is not of this command; accepted is a directory that is empty or "
            f"does not exist, or with --force an earlier model of this command"
        )
    if not force:
        raise ConfigurationError(f"DIR {target}: is not empty; --force replaces the model in it")


def _token_ids() -> dict[str, int]:
    pad, bos, _, im_end = range(len(SPECIAL_TOKENS))
    return {"pad_token_id": pad, "bos_token_id": bos, "eos_token_id": im_end}


def _library_config(spec: TinyModelSpec) -> Any:
    """Makes the transformers configuration of a spec."""
    from transformers import AutoConfig

    values: dict[str, Any] = {
        "vocab_size": spec.vocab_size,
        "hidden_size": spec.hidden,
        "intermediate_size": spec.intermediate,
        "num_hidden_layers": spec.layers,
        "num_attention_heads": spec.heads,
        "num_key_value_heads": spec.kv_heads,
        "max_position_embeddings": spec.max_position,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": False,
        **_token_ids(),
    }
    if spec.moe is not None:
        values["num_experts_per_tok"] = spec.moe.experts_per_token
        values["moe_intermediate_size"] = spec.moe.moe_intermediate
    if spec.mla is None:
        values["head_dim"] = spec.hidden // spec.heads
    if spec.arch == "qwen3_moe" and spec.moe is not None:
        values |= {"num_experts": spec.moe.experts, "norm_topk_prob": True}
    if spec.arch == "qwen2_moe" and spec.moe is not None:
        values |= {
            "num_experts": spec.moe.experts,
            "norm_topk_prob": False,
            "shared_expert_intermediate_size": spec.moe.moe_intermediate,
        }
    if spec.arch == "glm4_moe" and spec.moe is not None:
        values |= {
            "n_routed_experts": spec.moe.experts,
            "n_shared_experts": 1,
            "first_k_dense_replace": min(1, spec.layers - 1),
            "n_group": 1,
            "topk_group": 1,
            "norm_topk_prob": True,
            "use_qk_norm": True,
            "attention_bias": True,
        }
    if spec.arch == "deepseek_v2" and spec.moe is not None and spec.mla is not None:
        # As in DeepSeek-V2-Lite: the first layer is dense, one expert is shared, experts are not grouped.
        values |= asdict(spec.mla) | {
            "q_lora_rank": spec.mla.q_lora_rank or None,
            "n_routed_experts": spec.moe.experts,
            "n_shared_experts": 1,
            "first_k_dense_replace": min(1, spec.layers - 1),
            "moe_layer_freq": 1,
            "n_group": 1,
            "topk_group": 1,
            "topk_method": "greedy",
            "scoring_func": "softmax",
            "norm_topk_prob": False,
            # On a CPU, SGLang has no other rotary embedding than YaRN for this architecture. Factor 1 scales nothing.
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 10000.0,
                "factor": 1.0,
                "original_max_position_embeddings": spec.max_position,
            },
        }
    return AutoConfig.for_model(spec.arch, **values)


def _arguments() -> argparse.ArgumentParser:
    presets = "\n".join(
        f"  --preset {name:6}" + "".join(f" {flag_of(field)} {value}" for field, value in preset.items())
        for name, preset in PRESETS.items()
    )
    parser = argparse.ArgumentParser(
        prog="python -m kunserve_sgl.tiny_model",
        usage="%(prog)s DIR [--arch NAME] [--preset NAME] [--layers N] [...]",
        allow_abbrev=False,
        description="Write a random-weight Hugging Face model with a tokenizer and a chat template to DIR. The same "
        "flags give the same bytes, on any machine with the same versions of the libraries.",
        epilog="presets (a flag given beside one replaces its value):\n" + presets + "\n"
        "  --preset small with --arch llama has 47 M parameters; benchmarks use it.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("directory", metavar="DIR", help="where to write; must be empty or missing")
    parser.add_argument("--force", action="store_true", help="replace an earlier model of this command in DIR")
    parser.add_argument(
        "--preset", choices=list(PRESETS), default="tiny", help="sizes by name, see below (default: tiny)"
    )
    spec = TinyModelSpec()
    parser.add_argument("--arch", choices=list(ARCHITECTURES), default=spec.arch, help=f"default: {spec.arch}")
    parser.add_argument("--dtype", choices=list(DTYPE_BYTES), default=spec.dtype, help=f"default: {spec.dtype}")
    sizes = parser.add_argument_group("sizes (default: those of the preset)")
    sizes.add_argument("--layers", type=int, help="decoder layers")
    sizes.add_argument("--hidden", type=int, help="width of the residual stream, a multiple of 2 * heads")
    sizes.add_argument("--heads", type=int, help="query heads")
    sizes.add_argument("--kv-heads", type=int, help="key/value heads, a divisor of heads (default: half of them)")
    sizes.add_argument("--intermediate", type=int, help="width of dense feed-forward layers")
    sizes.add_argument("--vocab-size", type=int, help="tokens, of tokenizer and model")
    sizes.add_argument("--max-position", type=int, help=f"longest sequence in tokens (default: {spec.max_position})")
    sizes.add_argument("--seed", type=int, help=f"of the weights (default: {spec.seed})")
    _add_part(parser, f"experts ({', '.join(EXPERT_ARCHITECTURES)})", MoeSpec())
    _add_part(parser, "latent attention (deepseek_v2); --q-lora-rank 0: queries are not compressed", MlaSpec())
    return parser


def _add_part(parser: argparse.ArgumentParser, title: str, part: MoeSpec | MlaSpec) -> None:
    group = parser.add_argument_group(title)
    for name, value in asdict(part).items():
        group.add_argument(flag_of(name), type=int, help=f"default: {value}")


def spec_from_arguments(arguments: argparse.Namespace) -> TinyModelSpec:
    """Makes the spec that parsed flags describe. Raises ConfigurationError where they do not fit together."""
    given = {name: value for name, value in vars(arguments).items() if value is not None}
    parts: dict[str, Any] = {}
    for key, cls in (("moe", MoeSpec), ("mla", MlaSpec)):
        values = {field.name: given[field.name] for field in fields(cls) if field.name in given}
        if values:
            parts[key] = cls(**values)
    own = {field.name: given[field.name] for field in fields(TinyModelSpec) if field.name in given}
    return TinyModelSpec(**{**PRESETS[arguments.preset], **own, **parts})


def describe(spec: TinyModelSpec, sizes: TinyModelSizes) -> str:
    """Writes the report of the command, one fact per line."""
    architecture = ARCHITECTURES[spec.arch]
    layers: list[str] = []
    for count, layer_bytes in _runs(sizes.layer_bytes):
        layers.append(f"{layer_bytes:,}" + (f" (x {count})" if count > 1 else ""))
    if spec.mla is None:
        kv = f"{spec.kv_heads} of {spec.heads} heads, {spec.hidden // spec.heads} elements each for K and V"
    else:
        kv = f"latent of {spec.mla.kv_lora_rank} + {spec.mla.qk_rope_head_dim} elements per layer"
    facts = {
        "architecture": f"{spec.arch}, {spec.layers} layers, hidden {spec.hidden}, {spec.dtype}, seed {spec.seed}",
        "parameters": f"{sizes.parameters:,}",
        "parameter bytes": f"{sizes.parameter_bytes:,}",
        "  per decoder layer": ", ".join(layers),
        "KV bytes per token": f"{sizes.kv_bytes_per_token:,} in {spec.layers} layers ({kv})",
        "runs on a CPU": ("yes" if architecture.runs_on_cpu else "no") + f": {architecture.cpu_note}",
    }
    if spec.dtype == "float32":
        facts["serve it with"] = "--dtype float32 (SGLang's default, auto, would convert it to float16)"
    return "\n".join(f"{name:20} {fact}" for name, fact in facts.items())


def _runs(values: Iterable[int]) -> list[tuple[int, int]]:
    """Returns (count, value) of each run of equal neighbours."""
    return [(len(list(group)), value) for value, group in itertools.groupby(values)]


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command, on `sys.argv` where `argv` is None, and returns its exit code."""
    parser = _arguments()
    arguments = parser.parse_args(argv)
    try:
        spec = spec_from_arguments(arguments)
        from transformers.utils import logging

        logging.disable_progress_bar()
        sizes = write_tiny_model(spec, arguments.directory, force=arguments.force)
    except ConfigurationError as error:
        parser.error(str(error))
    except OSError as error:
        parser.exit(1, f"{parser.prog}: cannot write {arguments.directory}: {error}\n")
    print(f"{arguments.directory}\n{describe(spec, sizes)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
