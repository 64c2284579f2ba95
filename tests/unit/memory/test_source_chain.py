"""A dropped layer comes from the first source that has its bytes, and why the others have not is said."""

from __future__ import annotations

import logging

import pytest
import torch
from layer_setup import AdoptedModel

from kunserve_sgl.errors import ConfigurationError
from kunserve_sgl.memory.errors import PoolFullError, RestoreSourceError
from kunserve_sgl.memory.layer_parameters import LayerState
from kunserve_sgl.memory.layer_sources import BufferSource, LayerSource, RestoreTarget
from kunserve_sgl.memory.source_chain import NamedSource, restore_from, restoring_from
from kunserve_sgl.memory.virtual_range import LayerSpan, Span


class Unable(LayerSource):
    def __init__(self, error: Exception) -> None:
        self._error = error

    def fill(self, target: RestoreTarget) -> None:
        target.region.fill_(3)
        raise self._error


def sources_of(adopted: AdoptedModel) -> dict[str, NamedSource]:
    wrong = adopted.copies[1].clone()
    wrong[100] ^= 1
    found = {
        "a peer": BufferSource({1: wrong}),
        "a copy": Unable(RestoreSourceError("it was never finished")),
        "the checkpoint": Unable(ConfigurationError("--quantization: re-packed")),
        "another": adopted.source,
    }
    return {name: NamedSource(name, source) for name, source in found.items()}


def test_the_first_that_has_the_bytes_is_taken(adopted: AdoptedModel, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    named = sources_of(adopted)
    adopted.parameters.drop(1)
    assert restore_from(adopted.parameters, 1, named.values()) == "another"
    adopted.assert_same_answers()
    lines = [record.getMessage() for record in caplog.records]
    assert "layer 1 does not come from a peer: layer 1 as restored has checksum" in lines[0]
    assert lines[1:] == [
        "KunServe: layer 1 does not come from a copy: it was never finished",
        "KunServe: layer 1 does not come from the checkpoint: --quantization: re-packed",
        "KunServe: layer 1 comes from another",
    ]


def test_all_reasons_are_named_where_none_has_them(adopted: AdoptedModel) -> None:
    named = sources_of(adopted)
    del named["another"]
    adopted.parameters.drop(1)
    with pytest.raises(RestoreSourceError) as caught:
        restore_from(adopted.parameters, 1, named.values())
    for part in ("layer 1 cannot be restored: a peer: layer 1", "; a copy: it was", "; the checkpoint: --quant"):
        assert part in str(caught.value)
    adopted.assert_dropped(1, adopted.reports[1].frames)
    with pytest.raises(RestoreSourceError, match="no peer lends it, and there is no other source"):
        restore_from(adopted.parameters, 1, [])


def test_what_is_not_the_source_s_failure_is_raised_at_once(adopted: AdoptedModel) -> None:
    named = sources_of(adopted)
    adopted.parameters.drop(1)
    kv = adopted.pool.vmm.reserve(1, "kv")
    adopted.pool.map_kv([LayerSpan(0, Span(kv, 0, 1))])
    with pytest.raises(PoolFullError):
        restore_from(adopted.parameters, 1, named.values())
    adopted.assert_dropped(1, adopted.reports[1].frames - 1)


class Slow(LayerSource):
    """Does all in the first part."""

    def __init__(self, bytes_of_layer: torch.Tensor) -> None:
        self._bytes = bytes_of_layer

    def fill(self, target: RestoreTarget) -> None:
        target.region.copy_(self._bytes)


@pytest.mark.parametrize("comes_in_parts", [True, False])
def test_a_layer_comes_part_by_part_and_can_be_left_between_any_two(
    adopted: AdoptedModel, comes_in_parts: bool
) -> None:
    source = adopted.source if comes_in_parts else Slow(adopted.copies[1])
    size_bytes, part_bytes = adopted.copies[1].numel(), 1000
    count = -(-size_bytes // part_bytes)
    assert count > 2
    for left_after in (*range(1, count), None):
        adopted.parameters.drop(1)
        adopted.scribble()
        parts = restoring_from(adopted.parameters, 1, [NamedSource("it", source)], part_bytes)
        for done, _ in enumerate(parts, 1):
            assert adopted.parameters.state(1) is LayerState.RESTORING
            if done == left_after:
                parts.close()
                adopted.assert_dropped(1, adopted.reports[1].frames)
                adopted.parameters.restore(1, source)
                break
        else:
            assert (left_after, done) == (None, count)
        adopted.assert_same_answers()


def test_a_wrong_byte_in_any_part_is_found(adopted: AdoptedModel) -> None:
    size_bytes = adopted.copies[1].numel()
    for place in (0, size_bytes // 2, size_bytes - 1):
        wrong = adopted.copies[1].clone()
        wrong[place] ^= 1
        adopted.parameters.drop(1)
        sources = [NamedSource("it", BufferSource({1: wrong})), NamedSource("another", adopted.source)]
        parts = restoring_from(adopted.parameters, 1, sources, 1000)
        count = sum(1 for _ in parts)
        assert count == 2 * -(-size_bytes // 1000)
        adopted.assert_same_answers()
