"""A dropped layer comes from the first source that has its bytes, and why the others have not is said."""

from __future__ import annotations

import logging

import pytest
from layer_setup import AdoptedModel

from kunserve_sgl.errors import ConfigurationError
from kunserve_sgl.memory.errors import PoolFullError, RestoreSourceError
from kunserve_sgl.memory.frame_pool import LayerSpan
from kunserve_sgl.memory.layer_sources import BufferSource, LayerSource, RestoreTarget
from kunserve_sgl.memory.source_chain import NamedSource, restore_from
from kunserve_sgl.memory.virtual_range import Span


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
