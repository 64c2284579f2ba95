"""Requests on their way from the controller to the replicas: what each is expected to need, and who gets it."""

from __future__ import annotations

from typing import Any

from kunserve_sgl.control.coordinator import Coordinator
from kunserve_sgl.integration.messages import ContinuedGenerateReqInput
from kunserve_sgl.policy.dispatch import Dispatcher
from kunserve_sgl.policy.output_lengths import ends_at_limit_only


class RequestDispatch:
    """Keeps the policy's dispatcher in step with the coordinator."""

    def __init__(self, replicas: int, coordinator: Coordinator) -> None:
        self.dispatcher = Dispatcher(replicas)
        self._replicas = replicas
        self._coordinator = coordinator
        self._seen: tuple[Any, Any] = (None, ())

    def follow_plan(self) -> None:
        """Tells the dispatcher which replicas share compute, and which are moving. It is called whenever the controller
        wakes up: working out groups takes time, so only when something is new."""
        plan, moving = self._coordinator.plan, self._coordinator.moving
        if plan is not None and (plan is not self._seen[0] or moving != self._seen[1]):
            self._seen = plan, moving
            self.dispatcher.set_groups(plan.pipelines, moving)

    def tokens_of(self, request: Any, longest_prompt: int) -> int:
        """Estimates what SGLang's tokenized request needs, in tokens. Nothing may be longer than a prompt may be."""
        prompt = len(request.input_ids or ())
        sampling = request.sampling_params
        room = max(0, longest_prompt - prompt)
        most = room if sampling.max_new_tokens is None else min(room, sampling.max_new_tokens)
        if isinstance(request, ContinuedGenerateReqInput):
            so_far = min(most, len(request.output_ids))
            prompt, most = prompt + so_far, most - so_far
        is_named = sampling.max_new_tokens is not None
        goes_to_the_end = is_named and ends_at_limit_only(sampling)
        return self.dispatcher.tokens_of(prompt, most, goes_to_the_end)

    def status(self) -> dict[int, dict[str, int]]:
        """Returns what GET /kunserve/status says of dispatch, per replica."""
        return {
            replica: {
                "work_tokens": self.dispatcher.work_tokens(replica),
                "requests_on_the_way": self.dispatcher.on_the_way(replica),
            }
            for replica in range(self._replicas)
        }
