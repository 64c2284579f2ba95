"""SGLang's decode graphs with those of single layers beside them: captured in the same session, for the same static
batch and attention metadata. Untried: nothing of this has run on CUDA yet."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

from sglang.srt.layers.dp_attention import set_dp_buffer_len, set_is_extend_in_batch
from sglang.srt.model_executor.forward_batch_info import ForwardBatch
from sglang.srt.model_executor.forward_context import ForwardContext, forward_context
from sglang.srt.model_executor.runner.decode_cuda_graph_runner import DecodeCudaGraphRunner

from kunserve_sgl.exchange.tensor_layout import Activations
from kunserve_sgl.integration.runner.layer_graphs import LayerGraphs, buckets_of

logger = logging.getLogger(__name__)


class LayerDecodeGraphRunner(DecodeCudaGraphRunner):  # type: ignore[misc]
    """Captures each batch size of the whole model as SGLang's, and for some of them (`buckets_of`) every layer by
    itself. The sizes are SGLang's: those of --cuda-graph-max-bs and --cuda-graph-bs; with --disable-cuda-graph there is
    no such runner. SGLang measures and logs what both take together."""

    capture_bs: list[int]
    layer_graphs: LayerGraphs | None = None
    _layer_buckets: tuple[int, ...] = ()
    _static: dict[int, ForwardBatch]  # the batches that the layers' graphs see, by bucket

    def capture_one_shape(
        self, size: int, forward: Callable[..., Any], stream_idx: int | None = None, variant_label: str | None = None
    ) -> None:
        """Captures one batch size as SGLang's, then its layers: while the attention backend still has the metadata
        that the graph of the whole model reads, which are made anew for other sizes."""
        super().capture_one_shape(size, forward, stream_idx, variant_label)
        if self.layer_graphs is None:
            self.layer_graphs = LayerGraphs(self.backend, self, self.model_runner.layer_count, self._run_static)
            self._layer_buckets = buckets_of(self.capture_bs)
            self._static = {}
        if size not in self._layer_buckets:
            return
        batch, attn_backend, _ = self.capture_prepare(size)
        self._static[size] = batch
        set_dp_buffer_len(None, size, batch.dp_padding_mode.is_max_len(), None)
        set_is_extend_in_batch(False)
        with forward_context(ForwardContext(attn_backend=attn_backend)):
            self.layer_graphs.capture(size, batch)
        if size == self._layer_buckets[0]:
            logger.info(
                "KunServe: graphs of %d layers for %s requests, with static buffers of %.1f MiB",
                self.model_runner.layer_count,
                ", ".join(map(str, self._layer_buckets)),
                self.layer_graphs.static_bytes / 2**20,
            )

    def load(self, batch: ForwardBatch) -> int | None:
        """Loads a decode step as SGLang does for a replay, padded to a bucket of the layers. None for what SGLang would
        run without graphs, and where hidden states are wanted besides."""
        if not self.can_run_graph(batch) or batch.capture_hidden_mode.need_capture():
            return None
        sizes, self.capture_bs = self.capture_bs, list(self._layer_buckets)
        try:
            self.load_batch(batch)
        finally:
            self.capture_bs = sizes
        bucket = int(self.bs)
        # What SGLang records in its graph, before the first layer.
        self.attn_backend.init_forward_metadata_in_graph(self._static[bucket])
        return bucket

    def _run_static(self, batch: ForwardBatch, state: Activations | None, start: int, end: int) -> Activations:
        return self.model_runner.run_static(batch, state, start, end)  # type: ignore[no-any-return]
