"""Fixtures of the tests of what has to do with SGLang."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from unit.integration.imported import Imported


@pytest.fixture(scope="session")
def imported() -> Iterator[Imported]:
    """A process that has imported SGLang, which forks: for tests that need a process of their own."""
    with Imported() as process:
        yield process
