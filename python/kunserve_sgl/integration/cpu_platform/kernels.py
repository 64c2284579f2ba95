"""Triton kernels on a CPU, where SGLang calls one whatever the device is: Triton's interpreter runs them.

Whatever has a way for CPUs in SGLang takes that one, and gets here never. A kernel that the usual models need for every
batch has a replacement in torch instead, because the interpreter takes about a millisecond per program.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from functools import cache
from typing import Any

import torch
from sglang.kernels.ops.elementwise import elementwise
from triton.runtime import autotuner, interpreter, jit

from kunserve_sgl.memory.virtual_range import hole_at

logger = logging.getLogger(__name__)


def install() -> None:
    """Replaces a kernel of SGLang, and how Triton launches kernels, in this process. Models are imported afterwards.
    Idempotent."""
    elementwise.fused_gate_sigmoid_mul_add = _fused_gate_sigmoid_mul_add
    jit.JITFunction.run = _run
    jit.JITFunction.__call__ = _call_from_kernel
    autotuner.Autotuner.run = _run_first_configuration


def _fused_gate_sigmoid_mul_add(
    hidden_states: torch.Tensor,
    gate_weight: torch.Tensor,
    shared_output: torch.Tensor,
    final_hidden_states: torch.Tensor,
) -> None:
    """Adds the shared expert's output (tokens, hidden), times the sigmoid of its gate (hidden,), to the others'."""
    gate = torch.sigmoid(torch.nn.functional.linear(hidden_states, gate_weight.unsqueeze(0)))
    final_hidden_states.addcmul_(gate, shared_output)


class _InPlace(interpreter.GridExecutor):  # type: ignore[misc]
    """Runs a kernel on the tensors themselves. Upstream copies whole storages forth and back, also where they are on
    the CPU; that of a KV buffer is mostly addresses without memory."""

    def _init_args_hst(self, args_dev: Any, kwargs: Any) -> tuple[Any, Any]:
        return args_dev, kwargs

    def _restore_args_dev(self, args_dev: Any, args_hst: Any, kwargs: Any, kwargs_hst: Any) -> None:
        return None


@cache
def _interpreted(function: Callable[..., Any]) -> Any:
    return interpreter.InterpretedFunction(function)


@cache
def _report(name: str) -> None:
    logger.warning("KunServe: SGLang has the Triton kernel %s only; it is interpreted on this CPU, which is slow", name)


def _run(kernel: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
    if warmup:
        return
    _report(f"{kernel.fn.__module__}.{kernel.fn.__name__}")
    _refuse_holes(kernel.fn.__name__, [*args, *kwargs.values()])
    function = _interpreted(kernel.fn)
    _InPlace(function.rewrite(), function.arg_names, grid, kernel.pre_run_hooks)(*args, **kwargs)


def _refuse_holes(kernel: str, arguments: Iterable[Any]) -> None:
    """Raises ValueError where a tensor begins at an address without memory, as Triton's launcher does on CUDA."""
    for argument in arguments:
        if isinstance(argument, torch.Tensor) and (hole := hole_at(argument.data_ptr())) is not None:
            raise ValueError(f"{kernel} gets a tensor that begins in a hole: {hole}")


def _call_from_kernel(kernel: Any, *args: Any, **kwargs: Any) -> Any:
    return _interpreted(kernel.fn)(*args, **kwargs)


def _run_first_configuration(tuner: Any, *args: Any, **kwargs: Any) -> Any:
    """Runs the first configuration: any gives the same results, and there is no clock of a device to compare them
    by."""
    configuration = tuner.configs[0]
    arguments: dict[str, Any] = {**kwargs, **configuration.all_kwargs()}
    hook: Callable[[dict[str, Any]], None] | None = configuration.pre_hook
    if hook is not None:
        hook({**dict(zip(tuner.arg_names, args, strict=False)), **arguments})
    return tuner.fn.run(*args, **arguments)
