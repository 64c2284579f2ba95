"""Fixtures of the memory tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from layer_setup import AdoptedModel

from cuda_model.driver import FakeBindings


@pytest.fixture(params=["host", "cuda with a fake driver"])
def adopted(request: pytest.FixtureRequest) -> Iterator[AdoptedModel]:
    adopted = AdoptedModel(FakeBindings() if request.param != "host" else None)
    yield adopted
    adopted.pool.check()
    if adopted.bindings is not None:
        assert adopted.bindings.broken_rules == []
