"""The tokenizer manager of KunServe: SGLang's, which checks what requests say, waits for nobody that has ended, and
ends in order itself."""

from __future__ import annotations

from typing import Any

from sglang.srt.environ import envs
from sglang.srt.managers import tokenizer_control_mixin
from sglang.srt.managers.io_struct import (
    BatchTokenizedEmbeddingReqInput,
    BatchTokenizedGenerateReqInput,
    TokenizedEmbeddingReqInput,
    TokenizedGenerateReqInput,
)
from sglang.utils import TypeBasedDispatcher
from typing_extensions import override

from kunserve_sgl.integration.launcher.calls import Calls
from kunserve_sgl.integration.launcher.checked_requests import CheckedRequests
from kunserve_sgl.integration.launcher.control_requests import ControlRequests
from kunserve_sgl.integration.launcher.ending import Ending, KunserveSignalHandler
from kunserve_sgl.integration.messages import ReplicaEnded

_REQUESTS = (TokenizedGenerateReqInput, TokenizedEmbeddingReqInput)
_BATCHES = (BatchTokenizedGenerateReqInput, BatchTokenizedEmbeddingReqInput)


class KunserveTokenizerManager(CheckedRequests, ControlRequests):
    """Waits only for replicas that are there. Upstream waits for `dp_size` answers to what it asks all replicas,
    without a deadline."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._alive: int = self.server_args.dp_size
        self.ending = Ending(self)
        self.signal_handler_class = KunserveSignalHandler
        self.calls = Calls(self)
        handlers: list[Any] = [(ReplicaEnded, self._on_replica_ended)]
        self._result_dispatcher += TypeBasedDispatcher(handlers)

    def _on_replica_ended(self, message: ReplicaEnded) -> None:
        """Lets whatever is being waited for end with as many answers as there are replicas. Answers do not say whose
        they are: where the replica had answered before it ended, its answer stands for one that comes too late."""
        self._alive = message.alive
        for name, *_ in tokenizer_control_mixin._COMMUNICATOR_SPECS:
            communicator = getattr(self, f"{name}_communicator")
            communicator.set_fan_out(self._alive)
            if communicator._result_fan_out is not None:
                communicator._result_fan_out = self._alive
                if len(communicator._result_values) >= self._alive:
                    communicator._result_event.set()
        self._end_model_update()

    def _handle_update_weights_from_disk_req_output(self, recv_obj: Any) -> None:
        self.model_update_tmp.append(recv_obj)
        self._end_model_update()

    def _end_model_update(self) -> None:
        result = self.model_update_result
        if result is not None and not result.done() and len(self.model_update_tmp) >= self._alive:
            # Who waits for one answer of one replica from the start takes it as it is.
            is_one = self.model_update_expected_workers == 1
            result.set_result(self.model_update_tmp[0] if is_one else self.model_update_tmp)

    # The end

    @override
    def _dispatch_to_scheduler(self, obj: Any) -> None:
        """Sends a request on; those that come while the server ends are answered like those that were open."""
        if self.ending.reason is not None and isinstance(obj, (*_REQUESTS, *_BATCHES)):
            for request in obj if isinstance(obj, _BATCHES) else (obj,):
                self.ending.answer(request.rid)
            return
        super()._dispatch_to_scheduler(obj)

    @override
    def dump_requests_before_crash(self, *args: Any, **kwargs: Any) -> None:
        """Dumps the requests only: how processes are looked into before the end is in `ending.py`. SGLang waits here,
        in the event loop, for a GPU to settle and to write core dumps, also where there is none."""
        with (
            envs.SGLANG_PYSPY_DUMP_BEFORE_CRASH.override(False),
            envs.SGLANG_CUDA_COREDUMP_BEFORE_CRASH.override(False),
        ):
            super().dump_requests_before_crash(*args, **kwargs)
