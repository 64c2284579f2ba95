"""Lets requests that decode go along with a prefill while their replica is merged, on a CPU.

A prefill takes longer through a pipeline than at home, and a decode step costs nearly as much for one request as for
all. So a replica's running requests get their next token by its prefill, as with SGLang's --enable-mixed-chunk, and
their decode steps wait for no prefill of their own replica. On CUDA decode steps go through graphs, and are left alone.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sglang.srt.managers.schedule_batch import NextBatchPlan, ScheduleBatch

if TYPE_CHECKING:
    from kunserve_sgl.integration.scheduler.scheduler import KunserveScheduler


def mix(scheduler: KunserveScheduler, plan: NextBatchPlan) -> NextBatchPlan:
    """Returns `plan`, or one in which the requests of its running batch are in its prefill, each with its next token.
    All ranks of a replica call it at the same batch boundary."""
    prefill, running = plan.batch_to_run, plan.running_batch
    if prefill is None or not _mixes(scheduler) or not _can_be_mixed(prefill, running):
        return plan
    running.filter_batch()
    # There is room for the prefill's own tokens. Where there is none for one of each other request, the next decode
    # step retracts some.
    if running.is_empty() or not running.check_decode_mem():
        return plan
    running.prepare_for_decode()
    prefill.mix_with_running(running)
    # SGLang counts tokens whose results may have been processed already, or not yet, unless it always mixes.
    ends = prefill.seq_lens_cpu.tolist()
    prefill.prefix_lens = [end - new for end, new in zip(ends, prefill.extend_lens, strict=True)]
    prefill.decoding_reqs = running.reqs
    return NextBatchPlan(
        batch_to_run=prefill, running_batch=ScheduleBatch(reqs=[], batch_is_full=running.batch_is_full)
    )


def _mixes(scheduler: KunserveScheduler) -> bool:
    runtime = scheduler.runtime
    return (
        runtime is not None
        and runtime.plan.is_pipelined
        and scheduler.layers.device.type == "cpu"
        and not scheduler.enable_lora
        and not scheduler.model_config.is_multimodal
    )


def _can_be_mixed(prefill: Any, running: Any) -> bool:
    """Tells whether SGLang can have them in one batch: not where more than tokens goes in or comes out."""
    return (
        prefill is not running
        and prefill.forward_mode.is_extend()
        and not prefill.forward_mode.is_mixed()
        and not running.is_empty()
        and not running.is_prefill_only
        and not any(batch.return_logprob or batch.return_hidden_states for batch in (prefill, running))
        and prefill.input_embeds is None
    )
