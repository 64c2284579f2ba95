"""Copies the KV of slots in layers that run here, wherever it is at home."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import closing

import numpy as np
import torch
from typing_extensions import override

from kunserve_sgl.exchange.kv_homes import KvHomes, RemoteKv
from kunserve_sgl.exchange.memory_reads import LoanSpan, LoanTransfer
from kunserve_sgl.memory.elastic_kv import ElasticKv
from kunserve_sgl.memory.errors import TransferError
from kunserve_sgl.replica.batch_shape import Int64s
from kunserve_sgl.replica.layer_runner import LayerRunner
from kunserve_sgl.replica.read_memory import ReadMemory

_PART_BYTES = 1 << 20


class HomeFailedError(TransferError):
    """Says that KV could not be copied from its home or to it."""

    def __init__(self, home: int, reason: str) -> None:
        super().__init__(f"KV at replica {home} cannot be copied: {reason}")
        self.home = home


class RowCopies:
    """Copies for one rank, where all memory that layers here use is mapped."""

    def __init__(self, runner: LayerRunner) -> None:
        self._runner = runner

    def copy(self, targets: torch.Tensor, sources: torch.Tensor, layers: Sequence[int]) -> None:
        """Copies the KV of the slots `sources` to `targets`, int64[n] each and disjoint. On a GPU it is given to the
        current stream. Raises HomeFailedError."""
        self._runner.copy_slots(targets, sources, layers)


class CopiesByMessage(RowCopies):
    """Copies for one rank that uses memory of others by messages. What is at home elsewhere and not mapped is read from
    there, and written there; its home serves that in a thread of its own, so nobody waits in a circle."""

    def __init__(self, runner: LayerRunner, kv: ElasticKv, homes: Callable[[], KvHomes], peers: ReadMemory) -> None:
        """`homes()` are those of now; `peers` has ways to them."""
        super().__init__(runner)
        self._kv = kv
        self._homes = homes
        self._peers = peers

    @override
    def copy(self, targets: torch.Tensor, sources: torch.Tensor, layers: Sequence[int]) -> None:
        homes = self._homes()
        super().copy(targets, sources, [layer for layer in layers if not homes.remote(layer)])
        for layer in layers:
            if remote := homes.remote(layer):
                self._copy_layer(layer, remote, targets.cpu().numpy(), sources.cpu().numpy())

    def _copy_layer(self, layer: int, remote: Sequence[RemoteKv], targets: Int64s, sources: Int64s) -> None:
        rows = self._kv.rows(layer)
        by_source = np.argsort(sources)
        sources, targets = sources[by_source], targets[by_source]
        held = [torch.empty(len(sources), part.shape[1], dtype=torch.uint8) for part in rows]
        for kv, places in _elsewhere(sources, remote):
            _transfer(self._peers.reader(kv), kv, sources[places], [part[places] for part in held])
        is_here = _is_here(sources, remote)
        for part, kept in zip(rows, held, strict=True):
            kept[is_here] = part[torch.from_numpy(sources)[is_here].to(part.device)].cpu()
        by_target = np.argsort(targets)
        targets, held = targets[by_target], [part[torch.from_numpy(by_target)] for part in held]
        for kv, places in _elsewhere(targets, remote):
            _transfer(self._peers.writer(kv), kv, targets[places], [part[places] for part in held])
        is_here = _is_here(targets, remote)
        for part, kept in zip(rows, held, strict=True):
            part[torch.from_numpy(targets)[is_here].to(part.device)] = kept[is_here].to(part.device)


def _elsewhere(slots: Int64s, remote: Sequence[RemoteKv]) -> Iterator[tuple[RemoteKv, slice]]:
    """Yields which of `slots`, which ascend, each loan has."""
    for kv in remote:
        first, stop = np.searchsorted(slots, (kv.slots.first, kv.slots.stop)).tolist()
        if first < stop:
            yield kv, slice(first, stop)


def _is_here(slots: Int64s, remote: Sequence[RemoteKv]) -> torch.Tensor:
    here = torch.ones(len(slots), dtype=torch.bool)
    for _, places in _elsewhere(slots, remote):
        here[places] = False
    return here


def _transfer(loan: LoanTransfer, kv: RemoteKv, slots: Int64s, held: Sequence[torch.Tensor]) -> None:
    """Reads or writes the rows of `slots`, which ascend, many at once: they may lie anywhere. `held` has them buffer
    by buffer, uint8 (n, bytes of a slot) each."""
    numbers = (slots - kv.slots.first).astype(np.int32)
    pieces = [LoanSpan(part, int(numbers[0]), rows.view(-1), numbers) for part, rows in enumerate(held)]
    with closing(loan):
        try:
            for _ in loan.transfer(pieces, _PART_BYTES):
                pass
        except TransferError as error:
            raise HomeFailedError(kv.home, str(error)) from error
