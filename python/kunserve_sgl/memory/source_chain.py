"""Which sources a dropped layer is restored from, one after the other, until the checksum proves the bytes of one."""

from __future__ import annotations

import logging
import sys
from collections.abc import Generator, Iterable
from dataclasses import dataclass

from kunserve_sgl.errors import ConfigurationError
from kunserve_sgl.memory.errors import ChecksumMismatchError, RestoreSourceError
from kunserve_sgl.memory.layer_parameters import LayerParameters
from kunserve_sgl.memory.layer_sources import LayerSource

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, eq=False)
class NamedSource:
    """Names a source to people, as in "the checkpoint /models/llama"."""

    name: str
    source: LayerSource


def restore_from(parameters: LayerParameters, layer: int, sources: Iterable[NamedSource]) -> str:
    """Restores a dropped layer from the first of `sources` that has its bytes, and returns the name of that one. Why
    another has not is a warning in the log.

    Raises RestoreSourceError with all reasons where none has; the layer is then still dropped. What is not a source's
    failure is raised at once, as by `LayerParameters.restore`: PoolFullError, MappingFailedError, ViewInUseError.
    """
    parts = restoring_from(parameters, layer, sources, part_bytes=sys.maxsize)
    while True:
        try:
            next(parts)
        except StopIteration as end:
            return str(end.value)


def restoring_from(
    parameters: LayerParameters, layer: int, sources: Iterable[NamedSource], part_bytes: int
) -> Generator[None, None, str]:
    """Does what `restore_from` does part by part, as `LayerParameters.restoring`."""
    reasons = []
    for each in sources:
        try:
            yield from parameters.restoring(layer, each.source, part_bytes)
        except (RestoreSourceError, ChecksumMismatchError, ConfigurationError) as error:
            logger.warning("KunServe: layer %d does not come from %s: %s", layer, each.name, error)
            reasons.append(f"{each.name}: {error}")
        else:
            if reasons:
                logger.info("KunServe: layer %d comes from %s", layer, each.name)
            return each.name
    tried = "; ".join(reasons) or "no peer lends it, and there is no other source"
    raise RestoreSourceError(f"layer {layer} cannot be restored: {tried}")
