"""What SGLang does at the start of a rank, on a CPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from sglang.srt.distributed import bootstrap, parallel_state
from sglang.srt.utils import numa_utils

from kunserve_sgl.integration.cpu_platform import runtime


@pytest.fixture(autouse=True)
def installed(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for owner, name in (
        (parallel_state, "init_model_parallel_group"),
        (numa_utils, "init_threads_binding"),
        (bootstrap, "_init_cpu_threads_env"),
    ):
        monkeypatch.setattr(owner, name, getattr(owner, name))
    threads = torch.get_num_threads()
    with torch.compiler.set_stance("default"):  # and afterwards as before
        runtime.install()
        yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize(("variable", "threads"), [("3", 3), (" 4,2", 4), ("0", 2), ("many", 2), (None, 2)])
def test_threads_are_those_of_the_environment(
    monkeypatch: pytest.MonkeyPatch, variable: str | None, threads: int
) -> None:
    torch.set_num_threads(2)
    if variable is None:
        monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    else:
        monkeypatch.setenv("OMP_NUM_THREADS", variable)
    bootstrap._init_cpu_threads_env(tp_size=1, tp_rank=0, local_omp_cpuid=None)
    with ThreadPoolExecutor(1) as pool:
        assert torch.get_num_threads() == pool.submit(torch.get_num_threads).result() == threads


def test_what_sglang_compiles_is_not_traced() -> None:
    traced: list[torch.fx.GraphModule] = []

    def backend(graph: torch.fx.GraphModule, _inputs: list[torch.Tensor]) -> Callable[..., Any]:
        traced.append(graph)
        return graph.forward

    def twice(value: torch.Tensor) -> torch.Tensor:
        return 2 * value

    compiled = torch.compile(twice, backend=backend)
    assert compiled(torch.ones(1)).item() == 2
    assert traced == []
    with torch.compiler.set_stance("default"):
        assert compiled(torch.ones(1)).item() == 2
    assert len(traced) == 1
