"""A loader that takes weights by itself stops between two of them, and ends where nobody wants the rest."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator

import pytest
import torch

from kunserve_sgl.integration.runner.stepped_load import SteppedLoad

CPU = torch.device("cpu")
BYTES = 1000


def weights(taken: list[str], count: int = 5) -> Iterator[tuple[str, torch.Tensor] | None]:
    for number in range(count):
        taken.append(str(number))
        yield str(number), torch.zeros(BYTES, dtype=torch.uint8)


def test_it_takes_as_much_as_it_may() -> None:
    taken: list[str] = []
    loaded: list[str] = []
    modes: set[bool] = set()

    def load(given: Iterable[tuple[str, torch.Tensor]]) -> None:
        for name, _ in given:
            loaded.append(name)
            modes.add(torch.is_inference_mode_enabled())

    with torch.inference_mode(), SteppedLoad(load, weights(taken), CPU) as stepped:
        assert taken == []
        counts = []
        while not stepped.go_on(2 * BYTES):
            counts.append(len(loaded))
    assert counts == [2, 4]
    assert loaded == taken == list("01234")
    assert modes == {True}


def test_weights_that_are_passed_over_count_too() -> None:
    given: list[object] = []
    with SteppedLoad(given.extend, iter([None] * 100), CPU) as stepped:
        assert not stepped.go_on(BYTES)
        while not stepped.go_on(BYTES):
            pass
    assert given == []


def test_what_the_loader_raises_is_raised() -> None:
    def load(given: Iterable[tuple[str, torch.Tensor]]) -> None:
        next(iter(given))
        raise ValueError("of another shape")

    with SteppedLoad(load, weights([]), CPU) as stepped, pytest.raises(ValueError, match="of another shape"):
        stepped.go_on(BYTES)


@pytest.mark.parametrize("steps", [0, 1])
def test_it_ends_in_the_middle(steps: int) -> None:
    taken: list[str] = []
    ended: list[str] = []

    def load(given: Iterable[tuple[str, torch.Tensor]]) -> None:
        try:
            for _ in given:
                pass
        finally:
            ended.append("load")

    before = threading.active_count()
    with SteppedLoad(load, weights(taken), CPU) as stepped:
        for _ in range(steps):
            assert not stepped.go_on(BYTES)
    assert threading.active_count() == before
    assert (len(taken), len(ended)) == (steps, steps)
