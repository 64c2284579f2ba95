"""The virtual memory contract over the host and over the CUDA backend with a fake driver."""

from __future__ import annotations

import mmap
from collections.abc import Iterator

import pytest
from vmm_contract import MakeVmm, VmmContract

from cuda_model.driver import FakeBindings, make_fake_cuda
from kunserve_sgl.memory.vmm_memfd import MemfdVmm


class TestHost(VmmContract):
    @pytest.fixture(params=[mmap.PAGESIZE, 2 << 20], ids=["one-page", "2MiB"])
    def make_vmm(self, request: pytest.FixtureRequest) -> MakeVmm:
        return lambda: MemfdVmm(request.param)


class TestCudaWithFakeDriver(VmmContract):
    @pytest.fixture
    def bindings(self) -> Iterator[FakeBindings]:
        bindings = FakeBindings()
        yield bindings
        assert bindings.broken_rules == []
        assert bindings.live_handles() == 0
        assert bindings.mappings == {}
        assert bindings.reservations == {}

    @pytest.fixture
    def make_vmm(self, bindings: FakeBindings) -> MakeVmm:
        return lambda: make_fake_cuda(bindings)
