"""What the runtime of a rank needs of the model runner: layers, request rows, and KV. Protocols only.

SGLang's side is `integration/runner/layer_runner.py` and `request_rows.py`; tests have one fake. All of it is called in
the scheduler's thread.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from contextlib import AbstractContextManager
from typing import Protocol

import torch

from kunserve_sgl.exchange.tensor_layout import Activations
from kunserve_sgl.replica.batch_shape import BatchShape, Int32s, Int64s


class Batch(Protocol):
    """Is a batch, or a piece of one, as the engine runs it. The runtime passes it on and does not look inside."""

    @property
    def batch_size(self) -> int:
        """Counts the requests."""
        ...


class Output(Protocol):
    """Is what the engine gets for a batch that has passed all layers. The runtime passes it on."""

    @property
    def logits_output(self) -> object:
        """Holds the logits, and what was asked for besides."""
        ...


class RequestRows(Protocol):
    """Says in which slots a request's tokens are: a table with one row per request, int32 slots by position. Rows have
    the same numbers at all replicas."""

    @property
    def row_count(self) -> int:
        """Counts the rows of all replicas, and the padding row."""
        ...

    @property
    def row_width(self) -> int:
        """Gives the most tokens of a request."""
        ...

    def rows_of(self, replica: int) -> range:
        """Returns the rows of a replica's own requests."""
        ...

    def map_rows_of(self, replica: int) -> None:
        """Prepares for `reach` of another replica's rows, which may take memory. Raises TransientError, with nothing
        changed."""

    def reach(self, rows: Int32s) -> None:
        """Puts memory behind these rows of another replica, where there is none. It comes before anything is written to
        them, or reads them. Raises TransientError, with nothing changed."""

    def unmap_rows_of(self, replica: int) -> None:
        """Gives the memory behind another replica's rows back, if there is any."""

    def update_for(self, host: int, rows: Int32s, lengths: Int32s, prefixes: Int32s) -> tuple[Int32s, Int32s] | None:
        """Returns what layer host `host` lacks of the first `lengths[i]` entries of the own rows `rows[i]`: where it
        begins in each, int32[rows], and the entries, row after row, int32. None where it has the first `prefixes[i]` of
        each. From then on the layer host is taken to know all."""
        ...

    def apply_update(self, rows: Int32s, starts: Int32s, lengths: Int32s, values: Int32s) -> None:
        """Writes what the owner's `update_for` gave into its rows here."""

    def forget_hosts(self) -> None:
        """Takes every layer host to know nothing of the own rows."""


class LayerRunner(Protocol):
    """Is the model of one rank, which can run a part of its layers. With tensor parallelism all ranks of a replica have
    to call the same in the same order."""

    @property
    def layer_count(self) -> int:
        """Counts the decoder layers of the whole model."""
        ...

    @property
    def device(self) -> torch.device:
        """Gives the device on which activations are."""
        ...

    @property
    def hidden_size(self) -> int:
        """Counts the elements of one token's activations."""
        ...

    @property
    def dtype(self) -> torch.dtype:
        """Gives the dtype of activations."""
        ...

    @property
    def modes(self) -> tuple[int, Collection[int]]:
        """Gives the `BatchShape.mode` of a decode step, and those of a prefill."""
        ...

    @property
    def rows(self) -> RequestRows:
        """Holds the rows that attention looks into."""
        ...

    def batch_stream(self) -> AbstractContextManager[None]:
        """Puts what the block gives to the device into the stream in which batches run, behind all that was given to it
        so far, by the caller's stream too; what the caller's stream is given later comes behind the block. Memory that
        is allocated in the block is that stream's."""
        ...

    def synchronize(self) -> None:
        """Waits for what the caller's stream was given to do."""

    def shape_of(self, batch: Batch) -> BatchShape:
        """Returns what attention needs of the batch. It waits for the device, where rows and slots are."""
        ...

    def rebuild(self, shape: BatchShape) -> Batch:
        """Makes a batch of that shape, without its tokens and what sampling needs: for layers only."""
        ...

    def enter_slots(self, shape: BatchShape, batch: Batch) -> None:
        """Writes the slots of the new tokens of a batch that was rebuilt from `shape` into its rows here."""
        ...

    def blank_state(self, tokens: int) -> Activations:
        """Makes what may come out of a layer, with zeros, for so many tokens."""
        ...

    def rows_to_keep(self, batch: Batch) -> Int64s | None:
        """Returns the indices of the tokens whose activations are needed behind the last layer, int64[n]; None for all
        of them. After a prefill that is the last token of each request, unless more was asked for."""
        ...

    def run_layers(self, batch: Batch, state: Activations | None, start: int, end: int) -> Activations:
        """Runs layers [start, end) on what came out of the layers before, each tensor (tokens, hidden size); on the
        embedding where `state` is None. Where `start == end` there is no layer, and the embedding is all."""
        ...

    def run_to_end(self, batch: Batch, state: Activations | None, start: int) -> Output:
        """Runs the layers from `start` on to the last, and the norm and the logits behind it, on what came out of the
        layers before; on the embedding where `state` is None."""
        ...

    def copy_slots(self, targets: torch.Tensor, sources: torch.Tensor, layers: Iterable[int]) -> None:
        """Copies the KV of slots `sources` to `targets`, int64[n] each on `device` and disjoint, in `layers`."""
