"""What SGLang assumes of a machine and a CPU does not have: NCCL between ranks, one NUMA node per rank, a compiler."""

from __future__ import annotations

import os
from typing import Any

import torch
from sglang.srt.distributed import bootstrap, parallel_state
from sglang.srt.utils import numa_utils

_make_group = parallel_state.init_model_parallel_group


def install() -> None:
    """Replaces what SGLang calls in this process. Idempotent."""
    parallel_state.init_model_parallel_group = _make_group_without_nccl
    # Upstream requires as many NUMA nodes as ranks, or an environment variable. Binding is left to the operator
    # (taskset, numactl, OMP_* variables), which works for any number of ranks.
    numa_utils.init_threads_binding = _no_thread_binding
    # Upstream calls sgl_kernel operators that exist in its CPU build only.
    bootstrap._init_cpu_threads_env = _use_threads_of_environment
    torch.cuda.set_device = _no_device  # SGLang's actor on Ray chooses one, whatever it runs on
    # SGLang's compiled functions would be traced at the first batch that uses one, for 2 s of CPU time with experts,
    # and then run as they do without: the backend of this platform compiles nothing.
    torch.compiler.set_stance("force_eager")


def _make_group_without_nccl(*args: Any, **kwargs: Any) -> Any:
    """Makes a group that communicates through torch.distributed (gloo) only. Upstream creates an NCCL communicator
    beside it whenever the library loads, and it does load on a CPU machine: libnccl comes with torch. Creating it there
    fails."""
    kwargs.update(use_pynccl=False, use_custom_allreduce=False)
    return _make_group(*args, **kwargs)


def _no_thread_binding(*, tp_rank: int, tp_size: int) -> None:
    return None


def _no_device(device: Any) -> None:
    return None


def _use_threads_of_environment(*, tp_size: int, tp_rank: int, local_omp_cpuid: object) -> None:
    """Lets torch use as many threads as OMP_NUM_THREADS says. A forked process has the libraries of its parent, which
    have read it before the platform's defaults set it."""
    threads = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0].strip()  # a list is for regions within regions
    if threads.isdecimal() and int(threads) > 0:
        torch.set_num_threads(int(threads))
