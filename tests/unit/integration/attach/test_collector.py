"""What a process has at start is not looked at again."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest

from kunserve_sgl.integration.attach.collector import leave_startup_alone


@pytest.fixture
def thawed() -> Iterator[None]:
    yield
    gc.unfreeze()


@pytest.mark.usefixtures("thawed")
def test_a_full_collection_looks_only_at_what_came_later() -> None:
    gc.collect()
    at_start = len(gc.get_objects())
    leave_startup_alone()
    assert gc.get_freeze_count() > 0.9 * at_start
    assert len(gc.get_objects()) < 0.1 * at_start
