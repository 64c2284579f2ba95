"""The command line: every SGLang flag, our own, config files, and exit code 2 with a message for what is wrong."""

from __future__ import annotations

import argparse
import dataclasses
import json
import re
import shutil
import socket
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from sglang.srt import server_args
from sglang.srt.server_args import ServerArgs

from kunserve_sgl.args import add_kunserve_arguments
from kunserve_sgl.integration.launcher import server_args as server_args_module
from kunserve_sgl.integration.launcher import startup_checks
from kunserve_sgl.integration.launcher.message_checks import wrong_for_messages
from kunserve_sgl.integration.launcher.server_args import KunserveServerArgs, prepare_server_args, refuse_taken_port
from kunserve_sgl.integration.launcher.startup_checks import missing_gpus, wrong_ranks
from kunserve_sgl.tiny_model import write_tiny_model
from kunserve_sgl.tiny_model_spec import ARCHITECTURES, TinyModelSpec
from kunserve_sgl.unsupported import REFUSALS


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    directory = tmp_path_factory.mktemp("model") / "tiny"
    write_tiny_model(TinyModelSpec(), directory)
    return str(directory)


def error_of(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    with pytest.raises(SystemExit) as raised:
        prepare_server_args(argv)
    assert raised.value.code == 2
    return capsys.readouterr().err


def sglang_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser()
    ServerArgs.add_cli_args(parser)
    return parser


def test_every_sglang_flag_is_there_with_its_default() -> None:
    upstream, ours = sglang_parser(), sglang_parser()
    add_kunserve_arguments(ours)
    flags = {option: action for action in ours._actions for option in action.option_strings}
    for action in upstream._actions:
        for option in action.option_strings:
            assert flags.pop(option).default == action.default
    assert set(flags) == {
        "--kunserve",
        "--kunserve-reserve-frames",
        "--kunserve-frame-bytes",
        "--kunserve-max-replicas",
        "--kunserve-max-slots",
        "--kunserve-host-copy",
        "--kunserve-replicas-per-gpu",
        "--kunserve-control",
        "--kunserve-activations",
        "--kunserve-remote-attention",
        "--kunserve-exchange",
        "--kunserve-transition-timeout",
        "--kunserve-drain-timeout",
        "--kunserve-order-timeout",
        "--kunserve-restart",
        "--kunserve-restart-tries",
        "--kunserve-restart-pause",
        "--kunserve-hold-timeout",
        "--kunserve-drop-at",
        "--kunserve-restore-at",
        "--kunserve-horizon",
        "--kunserve-min-stay",
        "--kunserve-cool-down",
        "--kunserve-max-group",
    }


def test_refused_flags_exist_in_sglang_and_their_defaults_are_accepted() -> None:
    options = {option for action in sglang_parser()._actions for option in action.option_strings}
    defaults = {field.name: field.default for field in dataclasses.fields(ServerArgs)}
    for refusal in REFUSALS:
        assert refusal.flag in options
        assert defaults[refusal.field] in refusal.accepted


def test_off_gives_sglangs_own_arguments(model: str) -> None:
    for argv in (["--model-path", model], ["--model-path", model, "--dp-size", "2", "--kunserve", "off"]):
        server_args = prepare_server_args(argv)
        assert type(server_args) is ServerArgs
        assert server_args.sleep_on_idle is False


def test_host_attention_backend_is_the_default_and_others_can_be_named(model: str) -> None:
    for mode in ("off", "manual"):
        argv = ["--model-path", model, "--kunserve", mode]
        assert prepare_server_args(argv).attention_backend == "kunserve_host"
        for backend in ("kunserve_host", "torch_native"):
            assert prepare_server_args([*argv, "--attention-backend", backend]).attention_backend == backend


def test_off_takes_what_kunserve_refuses(model: str) -> None:
    server_args = prepare_server_args(["--model-path", model, "--kunserve", "off", "--cpu-offload-gb", "1"])
    assert server_args.cpu_offload_gb == 1


def test_two_replicas_turn_it_on(model: str) -> None:
    server_args = prepare_server_args(["--model-path", model, "--dp-size", "2"])
    assert isinstance(server_args, KunserveServerArgs)
    assert server_args.kunserve == "auto"
    assert server_args.kunserve_enabled
    assert server_args.sleep_on_idle


@pytest.mark.parametrize(
    ("flags", "method", "dispatch"),
    [
        ([], "round_robin", "memory_and_compute"),
        (["--kunserve", "manual", "--load-balance-method", "auto"], "round_robin", "memory_and_compute"),
        (["--load-balance-method", "round_robin"], "round_robin", "load_balance_method"),
        (["--load-balance-method", "total_tokens"], "total_tokens", "load_balance_method"),
    ],
)
def test_dispatch_is_ours_unless_sglangs_is_asked_for(model: str, flags: list[str], method: str, dispatch: str) -> None:
    server_args = prepare_server_args(["--model-path", model, "--dp-size", "2", *flags])
    assert isinstance(server_args, KunserveServerArgs)
    assert (server_args.load_balance_method, server_args.kunserve_dispatch) == (method, dispatch)


def test_one_replica_needs_no_dispatch(model: str) -> None:
    server_args = prepare_server_args(["--model-path", model, "--kunserve", "manual"])
    assert isinstance(server_args, KunserveServerArgs)
    assert server_args.kunserve_dispatch == "load_balance_method"


def test_a_host_copy_needs_memory_and_a_second_replica(
    model: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    argv = ["--model-path", model, "--kunserve", "manual", "--kunserve-host-copy"]
    assert "--kunserve-host-copy: one replica drops nothing" in error_of(capsys, *argv)
    argv += ["--dp-size", "2"]
    weights = (Path(model) / "model.safetensors").stat().st_size
    monkeypatch.setattr(startup_checks, "free_host_bytes", lambda: weights)
    prepare_server_args(argv)
    monkeypatch.setattr(startup_checks, "free_host_bytes", lambda: weights - 1)
    assert f"have {weights} bytes, and {weights - 1} bytes of host memory are free" in error_of(capsys, *argv)


def test_config_file(model: str, tmp_path: Path) -> None:
    config = tmp_path / "config.yaml"
    config.write_text(f"model-path: {model}\ndp-size: 2\nkunserve: manual\n")
    assert prepare_server_args(["--config", str(config)]).kunserve == "manual"
    assert type(prepare_server_args(["--config", str(config), "--kunserve", "off"])) is ServerArgs


@pytest.mark.parametrize(
    ("flags", "parts"),
    [
        (["--kunserve", "on"], ["--kunserve", "'on'", "'off', 'manual', 'auto'"]),
        (["--kunserve"], ["--kunserve", "expected one argument"]),
        (["--kunserve-fraction", "1"], ["unrecognized arguments: --kunserve-fraction"]),
        (["--dp-size", "two"], ["--dp-size", "invalid int value: 'two'"]),
        (["--kunserve", "auto", "--cpu-offload-gb", "1"], ["--cpu-offload-gb 1", "--kunserve off"]),
        (["--dp-size", "2", "--enable-dp-attention"], ["--enable-dp-attention", "every layer"]),
        (["--kunserve", "manual", "--disaggregation-mode", "prefill"], ["--disaggregation-mode 'prefill'"]),
        (["--kunserve", "manual", "--speculative-algorithm", "EAGLE"], ["--speculative-algorithm 'EAGLE'"]),
        (["--kunserve", "manual", "--enable-lora"], ["--enable-lora"]),
        (["--dp-size", "2", "--kunserve-reserve-frames", "-1"], ["--kunserve-reserve-frames -1", "0 or more"]),
        (["--dp-size", "2", "--kunserve-drop-at", "1.5"], ["--kunserve-drop-at 1.5", "up to 1"]),
        (["--dp-size", "2", "--kunserve-restore-at", "0.95"], ["--kunserve-restore-at 0.95", "--kunserve-drop-at 0.9"]),
        (["--dp-size", "2", "--kunserve-min-stay", "0"], ["--kunserve-min-stay 0", "more than 0"]),
        (["--dp-size", "2", "--kunserve-max-group", "1"], ["--kunserve-max-group 1", "2 or more"]),
        (["--dp-size", "2", "--kunserve-max-replicas", "1"], ["--kunserve-max-replicas 1", "2 or more"]),
        (["--dp-size", "2", "--kunserve-replicas-per-gpu", "0"], ["--kunserve-replicas-per-gpu 0", "1 or more"]),
        (["--dp-size", "3", "--kunserve-replicas-per-gpu", "2"], ["per-gpu 2", "a divisor of --dp-size 3"]),
        (["--dp-size", "2", "--kunserve-replicas-per-gpu", "2"], ["per-gpu 2: there is no GPU", "accepted: 1"]),
        (["--kunserve-replicas-per-gpu", "2"], ["--kunserve-replicas-per-gpu 2", "with --kunserve off"]),
        (
            [
                *("--dp-size", "2", "--kunserve-replicas-per-gpu", "2"),
                *("--kunserve-activations", "collective"),
            ],
            ["--kunserve-activations collective", "--kunserve-replicas-per-gpu 2", "accepted: auto, mapped"],
        ),
        (["--dp-size", "2", "--kunserve-control", "network"], ["--kunserve-control network", "with --use-ray"]),
        (["--device", "cuda"], ["--device cuda", "accepted: cpu"]),
        (["--dp-size", "2", "--enable-streaming-session"], ["--enable-streaming-session", "KV slots"]),
        (["--dp-size", "2", "--enable-session-radix-cache"], ["--enable-session-radix-cache", "radix cache"]),
        (["--dp-size", "2", "--schedule-policy", "priority"], ["--schedule-policy 'priority'", "accepted: lpm"]),
        (["--dp-size", "2", "--kv-cache-dtype", "nvfp4"], ["--kv-cache-dtype 'nvfp4'", "accepted: auto"]),
        (["--dp-size", "2", "--kv-cache-dtype", "fp8_e5m2"], ["--kv-cache-dtype fp8_e5m2", "accepted: auto, bf16"]),
        (["--dp-size", "2", "--dtype", "float16"], ["--dtype float16", "accepted: float32, bfloat16"]),
        (["--dp-size", "2", "--quantization", "fp8"], ["--quantization fp8", "not on a CPU"]),
        (["--dp-size", "2", "--attention-backend", "triton"], ["--attention-backend triton", "torch_native"]),
        (["--dp-size", "2", "--mem-fraction-static", "1.5"], ["--mem-fraction-static 1.5", "less than 1"]),
        (["--dp-size", "2", "--page-size", "0"], ["--page-size 0", "1 or more"]),
        (["--dp-size", "2", "--max-running-requests", "0"], ["--max-running-requests 0", "1 or more"]),
        (["--dp-size", "2", "--stream-interval", "0"], ["--stream-interval 0", "1 or more"]),
        (["--dp-size", "2", "--decode-log-interval", "0"], ["--decode-log-interval 0", "1 or more"]),
        (["--dp-size", "2", "--random-seed", "-1"], ["--random-seed -1", "0 to 4294967295"]),
        (["--dp-size", "0", "--kunserve", "manual"], ["--dp-size 0", "1 or more"]),
        (["--dp-size", "2", "--tp-size", "0"], ["--tp-size 0", "1 or more"]),
        (["--dp-size", "2", "--completion-template", "no-such"], ["--completion-template no-such", "accepted: a file"]),
        (["--dp-size", "2", "--served-model-name", "a:b"], ["served_model_name cannot contain a colon"]),
        (["--dp-size", "2", "--model-loader-extra-config", "{"], ["--model-loader-extra-config {", "JSON"]),
        (["--dp-size", "2", "--log-level", "bogus"], ["--log-level bogus", "accepted: debug"]),
        (["--dp-size", "2", "--kunserve-frame-bytes", "1000"], ["--kunserve-frame-bytes 1000", "a multiple of"]),
        (
            ["--dp-size", "2", "--max-total-tokens", "1024", "--kunserve-max-slots", "10"],
            ["--kunserve-max-slots 10", "--max-total-tokens 1024 or more"],
        ),
        (["--dp-size", "2", "--tokenizer-path", "/missing/tokenizer"], ["--tokenizer-path /missing/tokenizer"]),
        (["--dp-size", "2", "--chat-template", "no-such"], ["--chat-template no-such", "accepted: a file"]),
    ],
    ids=lambda value: value[-1] if isinstance(value, list) else None,
)
def test_wrong_flags_exit_with_2_and_a_message(
    model: str, capsys: pytest.CaptureFixture[str], flags: list[str], parts: list[str]
) -> None:
    message = error_of(capsys, "--model-path", model, *flags)
    for part in parts:
        assert part in message


def test_a_model_that_is_not_there_is_named(
    model: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    message = error_of(capsys, "--model-path", str(tmp_path), "--dp-size", "2")
    assert f"--model-path {tmp_path}: accepted: a directory with config.json" in message
    missing = str(tmp_path / "missing")
    assert f"--model-path {missing}: there is no" in error_of(capsys, "--model-path", missing, "--dp-size", "2")
    shutil.copy(Path(model) / "config.json", tmp_path)
    assert "there are no weights in it" in error_of(capsys, "--model-path", str(tmp_path), "--dp-size", "2")
    argv = ["--model-path", str(tmp_path), "--dp-size", "2", "--load-format", "dummy"]
    assert isinstance(prepare_server_args(argv), KunserveServerArgs)
    # A repository that cannot be reached is an OSError, which is nobody's fault here.
    monkeypatch.setattr(KunserveServerArgs, "from_cli_args", Mock(side_effect=OSError("no connection")))
    assert "--model-path some/model: no connection" in error_of(capsys, "--model-path", "some/model", "--dp-size", "2")


def test_another_radix_cache_is_refused_where_the_environment_asks_for_it(
    model: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SGLANG_ENABLE_UNIFIED_RADIX_TREE", "1")
    assert "SGLANG_ENABLE_UNIFIED_RADIX_TREE is set" in error_of(capsys, "--model-path", model, "--dp-size", "2")


def test_sizing_the_kv_cache_once_more_is_refused(
    model: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SGLANG_ENABLE_POST_CAPTURE_KV_SIZING", "1")
    message = error_of(capsys, "--model-path", model, "--dp-size", "2")
    assert "SGLANG_ENABLE_POST_CAPTURE_KV_SIZING is set" in message
    assert message.rstrip().endswith("unset it\n(--help lists all flags)")


@pytest.mark.parametrize(
    ("values", "needed"),
    [
        ({}, 2),
        ({"kunserve_replicas_per_gpu": 2}, 1),
        ({"dp_size": 4, "kunserve_replicas_per_gpu": 2}, 2),
        ({"dp_size": 4, "kunserve_replicas_per_gpu": 2, "tp_size": 2}, 4),
        ({"tp_size": 2, "gpu_id_step": 2}, 7),
        ({"base_gpu_id": 3}, 5),
    ],
)
def test_gpus_that_are_missing_are_named(values: dict[str, int], needed: int) -> None:
    given = SimpleNamespace(
        **{
            **{"dp_size": 2, "tp_size": 1, "pp_size": 1, "base_gpu_id": 0, "gpu_id_step": 1, "device": "cuda"},
            **{"kunserve_replicas_per_gpu": 1, **values},
        }
    )
    assert list(missing_gpus(given, needed)) == []
    (message,) = missing_gpus(given, needed - 1)
    assert f"--dp-size {given.dp_size} with" in message
    assert f"takes {needed} GPUs, and there are {needed - 1}" in message


@pytest.mark.parametrize("total_gib", [24.0, 80.0, 141.0])
def test_replicas_on_one_gpu_are_sized_as_on_a_smaller_one(
    model: str, monkeypatch: pytest.MonkeyPatch, total_gib: float
) -> None:
    """SGLang derives of the memory how large batches are and what to leave for them: each replica does that for its
    part."""

    def sized(gib: float, **values: int) -> tuple[Any, Any]:
        monkeypatch.setattr(server_args, "get_device_memory_capacity", lambda device: gib * 1024)
        made = KunserveServerArgs(model_path=model, dp_size=2, kunserve="auto", max_total_tokens=4096, **values)
        return made.chunked_prefill_size, made.mem_fraction_static

    assert sized(total_gib, kunserve_replicas_per_gpu=2) == sized(total_gib / 2)
    assert sized(total_gib, kunserve_replicas_per_gpu=2) != sized(total_gib)


@pytest.mark.parametrize(
    ("ranks", "heads", "kv_heads", "message"),
    [
        (1, 7, 7, None),
        (2, 8, 4, None),
        (8, 16, 2, None),
        (3, 8, 4, "--tp-size 3: accepted: a divisor of the model's 8 attention heads"),
        (4, 12, 6, "--tp-size 4: accepted: a divisor or a multiple of the model's 6 KV heads"),
    ],
)
def test_heads_that_ranks_cannot_share_are_named(ranks: int, heads: int, kv_heads: int, message: str | None) -> None:
    assert list(wrong_ranks(ranks, heads, kv_heads)) == ([] if message is None else [message])


@pytest.mark.parametrize("arch", ["llama", "deepseek_v2"])
def test_ranks_are_checked_where_heads_are_not_filled_up(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, arch: str
) -> None:
    write_tiny_model(TinyModelSpec(arch=arch), tmp_path / arch)
    argv = ["--model-path", str(tmp_path / arch), "--dp-size", "2"]
    assert isinstance(prepare_server_args([*argv, "--tp-size", "3"]), KunserveServerArgs)
    monkeypatch.setattr(startup_checks, "current_platform", object())
    assert isinstance(prepare_server_args([*argv, "--tp-size", "2"]), KunserveServerArgs)
    assert "--tp-size 3: accepted: a divisor of the model's 4" in error_of(capsys, *argv, "--tp-size", "3")


def test_remote_attention_by_message_is_refused_where_it_does_not_work(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    write_tiny_model(TinyModelSpec(), tmp_path / "llama")
    flag = "--kunserve-remote-attention"
    argv = ["--model-path", str(tmp_path / "llama"), "--dp-size", "2", flag, "message"]
    assert prepare_server_args(argv).uses_messages
    for way in ("auto", "map"):
        assert not prepare_server_args([*argv[:-1], way]).uses_messages
    refused = f"{flag} message: not "
    other = "--attention-backend", "torch_native"
    assert f"{refused}with {' '.join(other)}; accepted: auto, map" in error_of(capsys, *argv, *other)
    monkeypatch.setattr(startup_checks, "current_platform", object())
    assert f"{refused}on --device cpu yet; accepted: auto, map" in error_of(capsys, *argv)


def _on_cuda(**changes: Any) -> SimpleNamespace:
    """What is asked of resolved arguments on CUDA."""
    config = SimpleNamespace(dtype=torch.bfloat16, head_dim=changes.pop("head_dim", 128))
    backends = changes.pop("backends", ("flashinfer", "triton"))
    is_latent = changes.pop("is_latent", False)
    values = {
        "device": "cuda",
        "is_on_network": False,
        "tp_size": 2,
        "moe_dense_tp_size": None,
        "enable_deterministic_inference": False,
        "kv_cache_dtype": "auto",
        "get_attention_backends": lambda: backends,
        "use_mla_backend": lambda: is_latent,
        "get_model_config": lambda: config,
    }
    return SimpleNamespace(**{**values, **changes})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({}, None),
        ({"backends": ("triton", "triton"), "kv_cache_dtype": "bf16"}, None),
        (
            {"backends": ("fa3", "triton")},
            "attention backend fa3 gives .*; accepted: --attention-backend flashinfer or tri",
        ),
        ({"is_latent": True}, r"not for latent attention \(MLA\) on CUDA yet; accepted: auto, map"),
        ({"enable_deterministic_inference": True}, "--enable-deterministic-inference promises; accepted: auto, map"),
        (
            {"kv_cache_dtype": "fp8_e4m3"},
            "not with --kv-cache-dtype fp8_e4m3, .*; accepted for this model: auto, bfloat16",
        ),
        ({"head_dim": 512}, "heads of this model have 512 dimensions; accepted: 256 at most"),
        ({"is_on_network": True}, None),
        (
            {"is_on_network": True, "is_latent": True},
            r"--kunserve-control network, .*: not for latent attention \(MLA\) on CUDA yet; accepted: ipc, tcp",
        ),
        ({"tp_size": 1, "moe_dense_tp_size": 1}, None),
        ({"moe_dense_tp_size": 2}, None),
        ({"moe_dense_tp_size": 1}, "not with --moe-dense-tp-size 1 and --tp-size 2, as .*; accepted: auto, map"),
        ({"device": "xpu"}, "not on --device xpu yet; accepted: auto, map"),
    ],
)
def test_remote_attention_by_message_on_cuda(changes: dict[str, Any], message: str | None) -> None:
    found = list(wrong_for_messages(_on_cuda(**changes), False))
    assert bool(found) == (message is not None)
    for one in found:
        assert message is not None
        assert re.search(message, one)


def test_all_that_is_wrong_is_named_at_once(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    message = error_of(
        capsys, "--model-path", model, "--dp-size", "2", "--page-size", "0", "--chat-template", "no-such"
    )
    assert "--page-size 0" in message
    assert "--chat-template no-such" in message


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
def test_a_port_that_is_taken_is_refused(model: str, capsys: pytest.CaptureFixture[str], host: str) -> None:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.create_server((host, 0), family=family) as taken:
        port = taken.getsockname()[1]
        server_args = prepare_server_args(["--model-path", model, "--host", host, "--port", str(port)])
        with pytest.raises(SystemExit) as raised:
            refuse_taken_port(server_args)
    assert raised.value.code == 2
    assert f"--host {host} --port {port}: " in capsys.readouterr().err
    refuse_taken_port(server_args)


def test_wrong_config_file_is_named(model: str, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert "missing.yaml" in error_of(capsys, "--config", str(tmp_path / "missing.yaml"))
    broken = tmp_path / "broken.yaml"
    broken.write_text(f"model-path: {model}\nkunserve: maybe\n")
    assert "'maybe'" in error_of(capsys, "--config", str(broken))


SIZES = {
    **{"vocab_size": 2048, "hidden_size": 256, "intermediate_size": 512, "max_position_embeddings": 2048},
    **{"num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2},
}
# Architecture -> the model's type, a part of the reason, and what its configuration has besides.
REFUSED_MODELS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "Gemma3ForCausalLM": ("gemma3_text", "no pipeline stages", {"head_dim": 64}),
    "Olmo2ForCausalLM": ("olmo2", "no pipeline stages", {}),
    "GraniteForCausalLM": ("granite", "no pipeline stages", {}),
    "CohereForCausalLM": ("cohere", "no pipeline stages", {}),
    "Starcoder2ForCausalLM": ("starcoder2", "no pipeline stages", {}),
    "StableLmForCausalLM": ("stablelm", "no pipeline stages", {}),
    "Llama4ForCausalLM": ("llama4_text", "pipeline stages|attention kinds", {"head_dim": 64, "pad_token_id": 0}),
    "GPT2LMHeadModel": ("gpt2", "decoder layers at model.layers", {"n_embd": 256, "n_head": 4, "n_layer": 4}),
    "OPTForCausalLM": ("opt", "decoder layers at model.layers", {"ffn_dim": 512, "word_embed_proj_dim": 256}),
    "BloomForCausalLM": ("bloom", "no class of its own", {}),
    "GPTNeoXForCausalLM": ("gpt_neox", "no class of its own", {}),
}


def write_config(directory: Path, architecture: str, model_type: str, **fields: Any) -> str:
    config = {"architectures": [architecture], "model_type": model_type, "dtype": "float32", **SIZES, **fields}
    (directory / "config.json").write_text(json.dumps(config))
    (directory / "model.safetensors").touch()
    return str(directory)


@pytest.mark.parametrize("architecture", REFUSED_MODELS)
def test_models_that_cannot_be_split_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], architecture: str
) -> None:
    model_type, reason, fields = REFUSED_MODELS[architecture]
    path = write_config(tmp_path, architecture, model_type, **fields)
    message = error_of(capsys, "--model-path", path, "--dp-size", "2")
    assert re.search(f"error: KunServe does not support model architecture {architecture} yet: .*({reason})", message)
    assert "LlamaForCausalLM" in message
    assert type(prepare_server_args(["--model-path", path, "--dp-size", "2", "--kunserve", "off"])) is ServerArgs


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_models_that_can_be_split_are_accepted(tmp_path: Path, arch: str) -> None:
    write_tiny_model(TinyModelSpec(arch=arch), tmp_path / arch)
    server_args = prepare_server_args(["--model-path", str(tmp_path / arch), "--dp-size", "2"])
    assert isinstance(server_args, KunserveServerArgs)


def test_transformers_code_is_refused_where_it_is_asked_for(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    message = error_of(capsys, "--model-path", model, "--dp-size", "2", "--model-impl", "transformers")
    assert "architecture LlamaForCausalLM yet: SGLang has no class of its own for it" in message


def test_one_replica_takes_a_model_without_stages(tmp_path: Path) -> None:
    path = write_config(tmp_path, "Olmo2ForCausalLM", "olmo2")
    argv = ["--model-path", path, "--kunserve", "manual", "--dtype", "float32"]
    assert isinstance(prepare_server_args(argv), KunserveServerArgs)


def test_ray_that_is_not_installed_is_named_with_its_extra(
    model: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(startup_checks, "find_spec", {"ray": None}.get)
    for mode in ("off", "manual"):
        error = error_of(capsys, "--model-path", model, "--dp-size", "2", "--use-ray", "--kunserve", mode)
        assert "--use-ray: Ray is not installed; the extra `ray` has it" in error


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--dp-size", "1"), "--use-ray with --dp-size 1: accepted: 2 replicas or more"),
        (("--dp-size", "2", "--nnodes", "3"), "--nnodes 3: a replica is on one node; accepted with --use-ray: 1 to"),
        (("--dp-size", "2", "--nnodes", "0"), "--nnodes 0: a replica is on one node; accepted with --use-ray: 1 to"),
        (("--dp-size", "2", "--kunserve-replicas-per-gpu", "2"), "--kunserve-replicas-per-gpu 2: Ray gives every"),
        (("--dp-size", "2", "--nnodes", "2", "--kunserve-host-copy"), "--kunserve-host-copy: all replicas map one"),
        (("--dp-size", "2", "--node-rank", "1"), "--node-rank, --dist-init-addr: with --use-ray one command starts"),
    ],
)
def test_what_ray_cannot_start_is_refused(
    model: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    flags: tuple[str, ...],
    message: str,
) -> None:
    monkeypatch.setattr(server_args_module, "check_ray_is_there", lambda: None)
    assert message in error_of(capsys, "--model-path", model, "--use-ray", "--kunserve", "manual", *flags)


def test_several_nodes_without_ray_are_refused(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    error = error_of(capsys, "--model-path", model, "--dp-size", "2", "--nnodes", "2")
    assert "--nnodes 2: replicas on several nodes are started by Ray: --use-ray" in error


def test_nodes_of_ray_get_paths_that_do_not_depend_on_where_they_run(
    model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server_args_module, "check_ray_is_there", lambda: None)
    monkeypatch.chdir(Path(model).parent)
    flags = ("--dp-size", "2", "--use-ray", "--kunserve", "manual", "--tokenizer-path", f"./{Path(model).name}")
    args = prepare_server_args(["--model-path", Path(model).name, *flags])
    assert (args.model_path, args.tokenizer_path, args.served_model_name) == (model, model, Path(model).name)
