"""The model runner of KunServe: SGLang's; where a layer runs and what memory is behind it is decided here."""

from __future__ import annotations

import gc
import logging
import weakref
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from sglang.srt.model_executor.forward_batch_info import ForwardBatch, PPProxyTensors
from sglang.srt.model_executor.forward_context import ForwardContext, forward_context, set_forward_context
from sglang.srt.model_executor.model_runner import ModelRunner, ModelRunnerOutput
from sglang.srt.model_loader.loader import get_model_loader
from sglang.srt.utils.device_timer import device_timer_ctx
from sglang.srt.utils.nvtx_utils import profile_range

from kunserve_sgl.errors import ConfigurationError
from kunserve_sgl.exchange.attention_service import PartAttention
from kunserve_sgl.exchange.remote_attention import RemoteAttention
from kunserve_sgl.exchange.tensor_layout import Activations
from kunserve_sgl.integration.attach.attachment import current_attachment
from kunserve_sgl.integration.attention import cuda_backend
from kunserve_sgl.integration.runner.checkpoint_source import CheckpointSource
from kunserve_sgl.integration.runner.layer_graphs import LayerGraphs
from kunserve_sgl.integration.runner.layer_range import LayerRange
from kunserve_sgl.integration.runner.layer_runner import StageTensors
from kunserve_sgl.integration.runner.unloaded_layers import require_only_lent, why_to_load, without_layers
from kunserve_sgl.memory.checksum import Checksum
from kunserve_sgl.memory.source_chain import NamedSource
from kunserve_sgl.replica.own_batches import OwnBatches
from kunserve_sgl.replica.place import device_of
from kunserve_sgl.replica.replica_memory import MemoryOptions, ReplicaMemory
from kunserve_sgl.replica.taking_over import take_over

logger = logging.getLogger(__name__)

_NOTHING = nullcontext()


class KunserveModelRunner(ModelRunner):  # type: ignore[misc]
    """Runs batches on one tensor-parallel rank of one replica."""

    own_batches: OwnBatches | None = None  # set by the scheduler, where there is another replica
    _checkpoint: CheckpointSource | None = None  # where there is another replica
    _has_run = False
    _remote: RemoteAttention | None = None  # where KV that lies elsewhere is attended to by messages
    _planned: weakref.ref[ForwardBatch] | None = None  # whose metadata the attention backend holds
    _prepared: weakref.ref[ForwardBatch] | None = None  # that was padded last for running without graphs
    _context: ForwardContext | None = None  # the last one that layers ran in

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        current_attachment().mark_used(type(self))

    def load_model(self) -> None:
        """Loads the model as SGLang does, and moves the parameters of its layers into frames."""
        checksums = self._load_without_layers()
        if checksums is None:
            super().load_model()
        # Right after loading and re-packing: the old copies must be gone before SGLang measures what is left for KV.
        replica = self.ps.dp_rank or 0
        self.kunserve_memory = ReplicaMemory(
            memory_options(self.server_args),
            self.device,
            self.gpu_id,
            replica,
            owner=f"replica {replica} rank {self.ps.tp_rank}",
        )
        self.kunserve_memory.adopt_parameters(self.model, decoder_layers(self.model), checksums)
        if self.server_args.dp_size > 1:
            self._layer_range = LayerRange(self.model)
            self._add_sources()
        if checksums is not None:
            options = self.server_args
            take_over(self.kunserve_memory, options, self.ps.tp_rank, device_of(self._torch_device, options))

    def _load_without_layers(self) -> list[Checksum] | None:
        """Loads what the model has beside its layers, where it is started again and these can come from elsewhere.
        Returns their checksums; None where the model has to be loaded as a whole, and nothing has been kept."""
        expected = self.server_args.kunserve_checksums
        if not expected:
            return None
        why = why_to_load(self.model_config, self.server_args)
        if not why:
            try:
                checksums = [Checksum.of_text(text) for text in expected[self.ps.tp_rank]]
                with without_layers(len(checksums)) as skipped:
                    super().load_model()
                require_only_lent(self.model, decoder_layers(self.model), self._torch_device)
                if skipped.count:
                    return checksums
                why = f"--load-format: {type(self.loader).__name__} does not give single weights"
            except Exception as error:  # noqa: BLE001 - whatever a model says that misses weights
                why = f"{type(error).__name__}: {error}"
        logger.warning("KunServe: all layers are loaded from the checkpoint: %s", why)
        for name in ("model", "loader"):
            self.__dict__.pop(name, None)
        gc.collect()
        return None

    @property
    def _torch_device(self) -> torch.device:
        return torch.device("cuda", self.gpu_id) if self.device == "cuda" else torch.device(self.device)

    def _add_sources(self) -> None:
        """Says where dropped layers may come back from, and lets them."""
        memory, layers = self.kunserve_memory, decoder_layers(self.model)
        if self.server_args.kunserve_host_copy:
            memory.share_host_copy(self.server_args, self.ps.tp_rank)
        self._checkpoint = CheckpointSource(self.model, layers, self.loader, self.model_config)
        memory.sources.append(NamedSource("the checkpoint", self._checkpoint))
        lacks = self._checkpoint.lacks({layer: memory.parameters.tensor_names(layer) for layer in range(len(layers))})
        logger.info(
            "KunServe: dropped layers come back from a peer that keeps them, %selse from the checkpoint %s%s",
            "else from the copy in host memory, " if self.server_args.kunserve_host_copy else "",
            self.model_config.model_path,
            f", which does not have {lacks}" if lacks else "",
        )

    def on_parameters_written(self, from_disk: bool) -> None:
        """Takes note that SGLang has written new parameters, `from_disk` or as somebody sent them."""
        if self._checkpoint is None:
            return
        if from_disk:
            self._checkpoint.take(get_model_loader(self.load_config, self.model_config))
        else:
            self._checkpoint.forget("the parameters have been updated since they were loaded from it")

    def forward(self, forward_batch: ForwardBatch, *args: Any, **kwargs: Any) -> ModelRunnerOutput:
        """Runs all layers on a batch, wherever they are hosted, and the logits here. SGLang's further arguments count
        where there is no other replica."""
        if self.own_batches is None or forward_batch.forward_mode.is_idle() or forward_batch.batch_size == 0:
            self._forget_metadata()
            return super().forward(forward_batch, *args, **kwargs)
        result = self.own_batches.forward(forward_batch)
        if not self._has_run:
            # A model may keep views of its weights from its first batch on, which is the warm-up.
            self._has_run = True
            self.kunserve_memory.report_undroppable()
        return result

    def run_layers(
        self,
        forward_batch: ForwardBatch,
        state: PPProxyTensors | None,
        start: int,
        end: int,
        *,
        first: bool,
        last: bool,
    ) -> ModelRunnerOutput:
        """Runs the model over layers [start, end), with the embedding before them if `first`, with norm and logits
        behind them if `last`. `state` is what came out of the layers before, each tensor (tokens, hidden size). What
        comes out is `logits_output`: the logits, or the next state.

        All layers at once go through SGLang's forward pass, with its captured graphs. A part of them runs as there
        without graphs, on the batch's own tensors: SGLang's way there would cost more than a short segment, for
        what is refused when replicas are merged. Layers of a decode step run by their own graphs, where there are any
        for it; embedding, norm and logits never do. On CUDA layers of which KV is attended to elsewhere have no graphs.
        """
        has_graphs = not self._reads_elsewhere(start, end)
        if first and last and has_graphs:
            self._forget_metadata()
            return super().forward(forward_batch)
        if has_graphs and (graphs := self.layer_graphs) and start < end and forward_batch.forward_mode.is_decode():
            if state is None:
                state, first = StageTensors(self._run_eagerly(forward_batch, None, 0, 0, True, False).tensors), False
            with forward_context(ForwardContext(attn_backend=self.attn_backend)):
                tensors = graphs.run(forward_batch, state.tensors, start, end)
            if tensors is not None:
                self._planned = None
                state, start = StageTensors(tensors), end
                if not last:
                    return ModelRunnerOutput(logits_output=state, can_run_graph=True)
        output = self._run_eagerly(forward_batch, state, start, end, first, last)
        return ModelRunnerOutput(logits_output=output, can_run_graph=False)

    def _run_eagerly(
        self, forward_batch: ForwardBatch, state: PPProxyTensors | None, start: int, end: int, first: bool, last: bool
    ) -> Any:
        is_decode = forward_batch.forward_mode.is_decode()
        # A decode step needs that only where its size is agreed on with others.
        if not is_decode or forward_batch.global_num_tokens_cpu is not None:
            self._prepare(forward_batch)
        kwargs = self._pp_kwargs(state) if is_decode else self._extend_forward_kwargs(forward_batch, state)
        context = self._context
        if context is None or context.attn_backend is not self.attn_backend:
            context = self._context = ForwardContext(attn_backend=self.attn_backend)
        before = set_forward_context(context)
        try:
            with (
                self._observed(start, end, is_decode) if self._is_observed else _NOTHING,
                self._layer_range.only(start, end, first=first, last=last),
            ):
                if start < end:
                    self._plan_attention(forward_batch)
                return self.model.forward(forward_batch.input_ids, forward_batch.positions, forward_batch, **kwargs)
        finally:
            set_forward_context(before)

    @property
    def _is_observed(self) -> bool:
        return self.device_timer is not None or torch.autograd._profiler_enabled()

    @contextmanager
    def _observed(self, start: int, end: int, is_decode: bool) -> Iterator[None]:
        """Names the block to a profiler and to SGLang's timer of the device, as far as there are such."""
        kind = "decode" if is_decode else "extend"
        with profile_range(f"layers {start} to {end}"), device_timer_ctx(self.device_timer, kind):
            yield

    def _prepare(self, forward_batch: ForwardBatch) -> None:
        if self._prepared is None or self._prepared() is not forward_batch:
            self._prepare_eager_forward_batch(forward_batch)
            self._prepared = weakref.ref(forward_batch)

    def run_static(self, batch: ForwardBatch, state: Activations | None, start: int, end: int) -> Activations:
        """Runs layers [start, end) on a batch whose tensors and metadata are static, as a graph is captured from; on
        the embedding where `state` is None. It neither plans nor waits."""
        kwargs = self._pp_kwargs(None if state is None else StageTensors(state))
        with self._layer_range.only(start, end, first=state is None, last=False):
            output = self.model.forward(batch.input_ids, batch.positions, batch, **kwargs)
        tensors: Activations = output.tensors
        return tensors

    def part_attention(self) -> PartAttention:
        """Makes what attends to parts of batches in this runner's pool, for one thread."""
        if self.device == "cuda":
            return cuda_backend.part_attention(self, self._torch_device)
        attention: PartAttention = self.attn_backend.part_attention(self.model, self.dtype)
        return attention

    def attend_elsewhere(self, remote: RemoteAttention) -> None:
        """Lets KV of batches that lies elsewhere be attended to there."""
        self._remote = remote
        if self.device == "cuda":
            cuda_backend.divide(self, remote, self._torch_device)
        else:
            self.attn_backend.divide(remote, self.model, self.dtype)

    def _reads_elsewhere(self, start: int, end: int) -> bool:
        """Tells whether layers [start, end) run here whose KV is attended to elsewhere: messages are in no graph."""
        remote = self._remote
        return self.device == "cuda" and remote is not None and any(map(remote.pattern, range(start, end)))

    @property
    def layer_count(self) -> int:
        """Counts the decoder layers of the whole model."""
        return self._layer_range.layer_count

    @property
    def layer_graphs(self) -> LayerGraphs | None:
        """Holds the graphs of single layers; None without another replica, on a CPU, and with --disable-cuda-graph."""
        graphs: LayerGraphs | None = getattr(self.decode_cuda_graph_runner, "layer_graphs", None)
        return graphs

    def _decode_cuda_graph_runner_cls(self) -> type:
        """Returns the class that captures decode steps; called on CUDA only."""
        if self.server_args.dp_size == 1:
            found: type = super()._decode_cuda_graph_runner_cls()
            return found
        from kunserve_sgl.integration.runner.decode_graphs import LayerDecodeGraphRunner

        return LayerDecodeGraphRunner

    def _forget_metadata(self) -> None:
        """Takes note that the attention backend is about to hold metadata of SGLang's making, or of another batch."""
        self._planned = self._prepared = None
        if self.layer_graphs is not None:
            self.layer_graphs.forget()

    def _plan_attention(self, forward_batch: ForwardBatch) -> None:
        """Makes the attention backend's metadata for the batch, unless it made them last: a segment that goes in slices
        needs them once. Those of another batch are written over."""
        if self._planned is not None and self._planned() is forward_batch:
            return
        self._forget_metadata()
        self.attn_backend.init_forward_metadata(forward_batch)
        self._planned = weakref.ref(forward_batch)

    def init_kv_cache_configurator(self) -> None:
        """Makes SGLang's configurator, which is ours, build the KV cache over this rank's memory."""
        super().init_kv_cache_configurator()
        self.kv_cache_configurator.memory = self.kunserve_memory


def memory_options(server_args: Any) -> MemoryOptions:
    """Reads the memory flags of `server_args`."""
    return MemoryOptions(
        frame_bytes=server_args.kunserve_frame_bytes,
        reserve_frames=server_args.kunserve_reserve_frames,
        max_replicas=server_args.kunserve_max_replicas or server_args.dp_size,
        max_slots=server_args.kunserve_max_slots,
    )


def decoder_layers(model: torch.nn.Module) -> list[torch.nn.Module]:
    """Returns the decoder layers of one of SGLang's language models, in order."""
    layers = getattr(getattr(model, "model", None), "layers", None)
    if not isinstance(layers, torch.nn.ModuleList) or not len(layers):
        raise ConfigurationError(
            f"KunServe finds no decoder layers at model.layers of {type(model).__name__}; run it with --kunserve off"
        )
    return list(layers)
