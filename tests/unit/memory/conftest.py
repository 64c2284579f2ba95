"""Fixtures of the memory tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from fake_cuda import FakeBindings
from layer_setup import AdoptedModel


@pytest.fixture(params=["host", "cuda with a fake driver"])
def adopted(request: pytest.FixtureRequest) -> Iterator[AdoptedModel]:
    adopted = AdoptedModel(FakeBindings() if request.param != "host" else None)
    yield adopted
    adopted.pool.check()
    if adopted.bindings is not None:
        assert adopted.bindings.broken_rules == []
