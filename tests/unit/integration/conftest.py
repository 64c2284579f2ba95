"""Fixtures of the tests of what has to do with SGLang."""

from __future__ import annotations

import pytest

from preloaded import Preloaded
from unit.integration.imported import Imported


@pytest.fixture(scope="session")
def imported(preloaded: Preloaded, tmp_path_factory: pytest.TempPathFactory) -> Imported:
    """Runs programs in processes that have imported SGLang: for tests that need a process of their own."""
    return Imported(preloaded, tmp_path_factory.mktemp("imported"))
