"""SGLang's model runner as the runtime of a rank sees it: see `replica.layer_runner.LayerRunner`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING

import torch
from sglang.srt.model_executor.forward_batch_info import ForwardBatch, ForwardMode, PPProxyTensors

from kunserve_sgl.exchange.remote_attention import RemoteAttention
from kunserve_sgl.exchange.tensor_layout import Activations
from kunserve_sgl.integration.runner import foreign_batch
from kunserve_sgl.replica.batch_shape import BatchShape, Int64s
from kunserve_sgl.replica.layer_runner import Output, RequestRows

if TYPE_CHECKING:
    from kunserve_sgl.integration.runner.model_runner import KunserveModelRunner


# Entered again and again.
_NOTHING = nullcontext()
_UNCHECKED = nullcontext[Callable[[Iterable[torch.Tensor | None]], None]](lambda results: None)


class StageTensors(PPProxyTensors):  # type: ignore[misc]
    """Holds what comes out of the layers before. SGLang's SDAR models use it as a dictionary, which upstream's class is
    no more than half of."""

    def get(self, key: str, default: torch.Tensor | None = None) -> torch.Tensor | None:
        """Returns the tensor of that name, or `default`, as a dictionary does."""
        found: torch.Tensor | None = self.tensors.get(key, default)
        return found


class SglangLayerRunner:
    """Implements `LayerRunner`. A batch is a `ForwardBatch`, and an output a `ModelRunnerOutput`."""

    def __init__(self, runner: KunserveModelRunner, rows: RequestRows) -> None:
        """`rows` is the runner's pool of request rows."""
        self._runner = runner
        self.rows = rows
        self.layer_count: int = runner.model_config.num_hidden_layers
        self.hidden_size: int = runner.model_config.hidden_size
        self.dtype: torch.dtype = runner.dtype
        self.device = torch.device(runner.device)
        self.remote: RemoteAttention | None = None  # where KV that lies elsewhere is attended to by messages
        self.modes = int(ForwardMode.DECODE), (int(ForwardMode.EXTEND), int(ForwardMode.MIXED))

    def batch_stream(self) -> AbstractContextManager[None]:
        """Enters SGLang's forward stream, also where the scheduler calls from its own, in which without overlap own
        batches run too: they share the attention backend's buffers. On a CPU there is none."""
        return self._forward_stream() if self.device.type == "cuda" else _NOTHING

    @contextmanager
    def _forward_stream(self) -> Iterator[None]:
        stream, caller = self._runner.forward_stream, torch.cuda.current_stream(self.device)
        stream.wait_stream(caller)
        try:
            with torch.cuda.stream(stream):
                yield
        finally:
            caller.wait_stream(stream)

    def synchronize(self) -> None:
        """Waits for the current stream."""
        if self.device.type == "cuda":
            torch.cuda.current_stream(self.device).synchronize()

    def shape_of(self, batch: ForwardBatch) -> BatchShape:
        """Reads the shape off SGLang's batch. It waits for the device, where rows and slots are."""
        return foreign_batch.shape_of(batch)

    def rebuild(self, shape: BatchShape) -> ForwardBatch:
        """Makes a `ForwardBatch` of that shape for the runner's attention backend, for layers only."""
        return foreign_batch.rebuild(shape, self._runner.server_args.attention_backend, self.device)

    def enter_slots(self, shape: BatchShape, batch: ForwardBatch) -> None:
        """Writes the slots of a rebuilt batch's new tokens into SGLang's table, on its device."""
        pool = self._runner.req_to_token_pool
        if shape.extends is None and self.device.type == "cpu":
            pool.enter_here(shape.rows, shape.prefixes, shape.slots)
        else:
            pool.enter(*foreign_batch.new_entries(batch), batch.out_cache_loc)

    def blank_state(self, tokens: int) -> Activations:
        """Makes what stages of SGLang's pipeline hand over, with zeros."""
        shape = tokens, self.hidden_size
        names = "hidden_states", "residual"
        return {name: torch.zeros(shape, dtype=self.dtype, device=self.device) for name in names}

    def rows_to_keep(self, batch: ForwardBatch) -> Int64s | None:
        """Returns the indices, int64[n], of the tokens whose activations the logits need; None for all of them."""
        return foreign_batch.rows_to_keep(batch)

    def run_layers(self, batch: ForwardBatch, state: Activations | None, start: int, end: int) -> Activations:
        """Runs layers [start, end) as a stage of SGLang's pipeline, the first one where `state` is None. Takes and
        returns tensors (tokens, hidden size)."""
        with self._whole() as check:
            output = self._runner.run_layers(batch, _stage(state), start, end, first=state is None, last=False)
            tensors: Activations = output.logits_output.tensors
            check(tensors.values())
        return tensors

    def run_to_end(self, batch: ForwardBatch, state: Activations | None, start: int) -> Output:
        """Runs the layers from `start` on as the last stage of SGLang's pipeline, with norm and logits."""
        with self._whole() as check:
            output = self._runner.run_layers(
                batch, _stage(state), start, self.layer_count, first=state is None, last=True
            )
            check([output.logits_output.next_token_logits])
        result: Output = output
        return result

    def _whole(self) -> AbstractContextManager[Callable[[Iterable[torch.Tensor | None]], None]]:
        """See `RemoteAttention.whole`: raises KvUnreachableError in place of what layers give that lacked an answer."""
        return _UNCHECKED if self.remote is None else self.remote.whole()

    def copy_slots(self, targets: torch.Tensor, sources: torch.Tensor, layers: Iterable[int]) -> None:
        """Copies rows of the KV pool in `layers`: slots `sources` to `targets`, int64[n] each and disjoint."""
        self._runner.token_to_kv_pool.copy_slots(targets, sources, layers)


def _stage(state: Activations | None) -> StageTensors | None:
    return None if state is None else StageTensors(state)
