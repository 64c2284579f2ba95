"""SGLang's server arguments with the KunServe flags added; parsing, and what is refused at start."""

from __future__ import annotations

import argparse
import dataclasses
import logging
import os
from collections.abc import Sequence
from typing import Any, NoReturn

from sglang.srt.configs.hybrid_arch import mambaish_config
from sglang.srt.configs.model_config import ModelImpl, is_deepseek_dsa, is_deepseek_v4, is_minimax_sparse
from sglang.srt.platforms import current_platform
from sglang.srt.server_args import ServerArgs
from sglang.srt.server_args_config_parser import ConfigArgumentMerger

from kunserve_sgl.args import (
    Dispatch,
    KunserveOptions,
    Mode,
    add_kunserve_arguments,
    resolve_activations,
    resolve_mode,
)
from kunserve_sgl.errors import ConfigurationError
from kunserve_sgl.flag_checks import check_off, check_options
from kunserve_sgl.integration.launcher.gpu_access import choose_remote_attention
from kunserve_sgl.integration.launcher.model_class import model_class_of
from kunserve_sgl.integration.launcher.startup_checks import (
    check_model_path,
    check_port,
    check_ray,
    check_ray_is_there,
    check_sizes,
    check_start,
)
from kunserve_sgl.unsupported import ModelTraits, check_model, check_supported

PROGRAM = "python -m kunserve_sgl.launch_server"


@dataclasses.dataclass
class KunserveServerArgs(ServerArgs, KunserveOptions):  # type: ignore[misc]
    """Holds what SGLang's processes receive when KunServe is on."""

    def _handle_load_balance_method(self) -> None:
        # Afterwards `auto` is `round_robin`, and nobody can tell whether that was asked for.
        if self.load_balance_method == "auto" and self.kunserve_enabled and self.dp_size >= 2:
            self.kunserve_dispatch = Dispatch.BY_NEED.value
        super()._handle_load_balance_method()

    def _handle_gpu_memory_settings(self, gpu_mem: float | None) -> None:
        # In MiB. What SGLang derives of it is for a replica: the sizes of batches, and what to leave for them.
        super()._handle_gpu_memory_settings(None if gpu_mem is None else gpu_mem / self.kunserve_replicas_per_gpu)


class _Parser(argparse.ArgumentParser):
    """Names the flag and what is accepted where it refuses one; SGLang's usage text of several hundred flags would bury
    that."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}\n(--help lists all flags)\n")


def prepare_server_args(argv: Sequence[str]) -> ServerArgs:
    """Parses the command line: plain ServerArgs with `--kunserve off`, else KunserveServerArgs.

    Exits with code 2 and a message for anything unknown or contradictory, as argparse does.
    """
    _register_cpu_backend()
    parser = _Parser(prog=PROGRAM)
    ServerArgs.add_cli_args(parser)
    add_kunserve_arguments(parser)
    arguments = list(argv)
    if "--config" in arguments:
        arguments = _merge_config(parser, arguments)
    raw = parser.parse_args(arguments)
    logging.basicConfig(
        level=getattr(logging, raw.log_level.upper(), logging.INFO),
        format="[%(asctime)s] %(message)s",
        datefmt="%Y-%m-%d %H:%M:%S",
        force=True,
    )
    try:
        mode = resolve_mode(raw.kunserve, raw.dp_size)
        if raw.use_ray:
            check_ray_is_there()
        if mode is Mode.OFF:
            check_off(raw.kunserve_replicas_per_gpu)
            return ServerArgs.from_cli_args(raw)
        return _kunserve_args(raw, mode)
    except (ConfigurationError, ValueError, AssertionError, NotImplementedError) as error:
        if not str(error):
            raise
        logging.getLogger(__name__).debug("refused arguments", exc_info=True)
        parser.error(str(error))
    except OSError as error:  # files of the model, or a repository that cannot be reached
        logging.getLogger(__name__).debug("refused arguments", exc_info=True)
        parser.error(f"--model-path {raw.model_path}: {error}")


def refuse_taken_port(server_args: ServerArgs) -> None:
    """Exits like `prepare_server_args` where the HTTP server could not listen."""
    try:
        check_port(server_args.host, server_args.port)
    except ConfigurationError as error:
        _Parser(prog=PROGRAM).error(str(error))


def _register_cpu_backend() -> None:
    """Lets the parser accept `--attention-backend kunserve_host` where the CPU platform is active."""
    from kunserve_sgl.integration.cpu_platform.platform import CpuPlatform

    if isinstance(current_platform, CpuPlatform):
        from kunserve_sgl.integration.cpu_platform import attention

        attention.register()


def _kunserve_args(raw: argparse.Namespace, mode: Mode) -> KunserveServerArgs:
    if raw.use_ray:
        check_ray(vars(raw))
        raw.kunserve_nodes, raw.nnodes = raw.nnodes, 1
        _make_absolute(raw)
    check_supported(vars(raw))
    check_options(vars(raw), raw.dp_size)
    raw.kunserve_activations = resolve_activations(vars(raw))
    check_sizes(raw)
    check_model_path(raw.model_path)
    raw.kunserve = mode.value
    # Replicas that wait must leave the cores to those that work; upstream's default is to ask in a busy loop.
    raw.sleep_on_idle = True
    server_args: KunserveServerArgs = KunserveServerArgs.from_cli_args(raw)
    if server_args.enable_flashinfer_allreduce_fusion or server_args.enable_aiter_allreduce_fusion:
        # Fused with the next layer's norm, a layer leaves its all-reduce to that one, which may run elsewhere.
        logging.getLogger(__name__).info("KunServe: fused all-reduce is off, because layers may run elsewhere")
        server_args.override("kunserve", enable_flashinfer_allreduce_fusion=False, enable_aiter_allreduce_fusion=False)
    # Once more on the resolved values: a model may have turned a feature on that no flag named.
    check_supported({field.name: getattr(server_args, field.name) for field in dataclasses.fields(server_args)})
    check_model(_model_traits(server_args), server_args.dp_size)
    check_start(server_args)
    choose_remote_attention(server_args)
    server_args.check_server_args()  # SGLang's own, which it would do later, with a traceback
    return server_args


def _make_absolute(raw: argparse.Namespace) -> None:
    """Writes out what is a path here: on nodes of Ray processes have another working directory."""
    raw.served_model_name = raw.served_model_name or raw.model_path
    for name in ("model_path", "tokenizer_path"):
        path = getattr(raw, name)
        if path is not None and os.path.exists(os.path.expanduser(path)):
            setattr(raw, name, os.path.abspath(os.path.expanduser(path)))


def _model_traits(server_args: ServerArgs) -> ModelTraits:
    config: Any = server_args.get_model_config()
    hf_config = config.hf_config
    architectures = hf_config.architectures or ["unknown"]
    cls = model_class_of(architectures, config.model_impl == ModelImpl.TRANSFORMERS, config.quantization)
    return ModelTraits(
        architecture=architectures[0],
        is_hybrid=bool(config.is_hybrid_swa or mambaish_config(config)) or _has_sparse_attention(hf_config),
        is_generation=config.is_generation,
        is_multimodal=config.is_multimodal or config.model_is_mrope,
        is_fallback=cls.is_fallback,
        has_layers=cls.has_layers,
        has_stages=cls.has_stages,
    )


def _has_sparse_attention(hf_config: Any) -> bool:
    return any(each(hf_config) for each in (is_deepseek_dsa, is_deepseek_v4, is_minimax_sparse))


def _merge_config(parser: argparse.ArgumentParser, arguments: list[str]) -> list[str]:
    try:
        return list(ConfigArgumentMerger(parser).merge_config_with_args(arguments))
    except (ValueError, OSError) as error:
        parser.error(f"--config: {error}")
