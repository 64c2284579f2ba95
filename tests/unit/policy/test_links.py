"""Classes of links, where some replicas map each other's memory and others use it by messages."""

from __future__ import annotations

import pytest

from kunserve_sgl.policy.links import Links

MAPS = [[mine == other for other in "aabc"] for mine in "aabc"]  # only 0 and 1 do


def test_links_by_message_that_are_alike_are_of_one_class_beside_faster_ones_that_are_mapped() -> None:
    alike = {(0, 2): 1.3e9, (0, 3): 1.2e9}
    links = Links(speeds={(0, 1): 20e9, **alike}, maps=MAPS)
    assert links.slowness(0, 2) == links.slowness(0, 3)
    assert Links(speeds={(0, 1): 20e9, **alike, (2, 3): 1e8}, maps=MAPS).slowness(2, 3) > links.slowness(0, 2)


@pytest.mark.parametrize("mapped", [20e9, 1e9, None])
def test_what_is_mapped_is_nearer_than_what_is_not_however_fast_that_is(mapped: float | None) -> None:
    known = {} if mapped is None else {(0, 1): mapped}
    links = Links({0: "x", 1: "y", 2: "z"}, {**known, (0, 2): 20e9}, MAPS)
    assert links.slowness(0, 1) < links.slowness(0, 2)


def test_the_slowest_that_is_mapped_is_nearer_too() -> None:
    maps = [[mine == other for other in "aaab"] for mine in "aaab"]
    links = Links(speeds={(0, 1): 300e9, (1, 2): 10e9, (2, 3): 50e9}, maps=maps)
    assert links.slowness(0, 1) < links.slowness(1, 2) < links.slowness(2, 3)
