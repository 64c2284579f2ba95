"""Every request that a replica has, wherever it waits: the one place that knows them all."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class KnownRequests:
    """Lists SGLang's requests by where they are; each is in one of these lists. One that has ended may still be in a
    batch whose result has not been processed.

    `running` are in a batch, or in the middle of their prefill; `waiting` are in the queue, those that were retracted
    among them; `for_grammar` wait for their grammar to be compiled and come into the queue after that.
    """

    running: list[Any]
    waiting: list[Any]
    for_grammar: list[Any]

    @property
    def all(self) -> list[Any]:
        """Lists all of them, the running ones first."""
        return [*self.running, *self.waiting, *self.for_grammar]


def known_requests(scheduler: Any) -> KnownRequests:
    """Finds all requests that the scheduler knows. What it has not taken out of its sockets yet is checked against the
    capacity of the moment in which it comes."""
    waiting = list(scheduler.waiting_queue)
    for_grammar = list(scheduler.grammar_manager.grammar_queue)
    running = [request for batch in batches(scheduler) for request in batch.reqs]
    if scheduler.chunked_req is not None:
        running.append(scheduler.chunked_req)
    return KnownRequests(_without(running, [*waiting, *for_grammar]), waiting, for_grammar)


def batches(scheduler: Any) -> list[Any]:
    """Returns the batches that may still free or read slots: the current ones, and those whose results are to be
    processed."""
    found = [scheduler.running_batch, scheduler.last_batch]
    found += [batch for batch, _ in getattr(scheduler, "result_queue", ())]
    return _without([batch for batch in found if batch is not None], ())


def _without(items: Iterable[Any], others: Iterable[Any]) -> list[Any]:
    """Returns each of `items` once, in their order, but none of `others`."""
    left_out = {id(other) for other in others}
    distinct = {id(item): item for item in items if id(item) not in left_out}
    return list(distinct.values())
