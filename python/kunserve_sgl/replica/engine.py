"""What the runtime of a rank needs of the scheduler: slots, requests, and what keeps both in step. Protocols only.

SGLang's side is `integration/scheduler/engine.py`; tests have one fake. All of it is called in the scheduler's thread,
between two batches.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import torch

from kunserve_sgl.errors import TransientError
from kunserve_sgl.memory.slot_space import SlotRange
from kunserve_sgl.policy.output_lengths import Stops
from kunserve_sgl.replica.layer_runner import LayerRunner, RequestRows

Said = TypeVar("Said")


class SlotAllocator(Protocol):
    """Gives slots to requests, from ranges that come and go. A page of `page_size` slots is free, or a request's, or
    the radix cache's."""

    size: int  # tokens, of all ranges together
    page_size: int  # tokens

    @property
    def slot_ranges(self) -> tuple[SlotRange, ...]:
        """Lists what may be allocated from, the base range first."""
        ...

    def available_size(self) -> int:
        """Counts the tokens in free pages."""
        ...

    def add_slots(self, slots: SlotRange) -> None:
        """Lets requests use `slots`, which have memory behind them. Raises InvariantError where they overlap others."""

    def remove_slots(self, slots: SlotRange) -> None:
        """Takes free slots out. Raises InvariantError where one is in use, with nothing changed."""

    def count_in(self, slots: SlotRange) -> int:
        """Counts the tokens that may be allocated from `slots`, used or not."""
        ...

    def free_in(self, slots: SlotRange) -> torch.Tensor:
        """Returns the ids of the free pages in `slots`, int64[pages]."""
        ...

    def used_in(self, slots: SlotRange) -> torch.Tensor:
        """Returns the ids of the pages in `slots` that are somebody's, int64[pages], ascending."""
        ...

    @property
    def withheld(self) -> int:
        """Counts the tokens that are withheld; `size` is without them."""
        ...

    def withhold(self, tokens: int) -> None:
        """Withholds so many tokens, wherever they are, until as many slots are removed: what runs gives up so much, by
        the engine's own rules, if it has to."""

    def prefer(self, slots: SlotRange | None) -> None:
        """Allocates from `slots` first from now on; None for no preference."""


class SlotsInUseError(TransientError):
    """Says that the slots hold tokens of running requests, and that there is no room for those elsewhere. Nothing was
    changed."""


@dataclass(frozen=True, slots=True)
class Vacated:
    """Says what it took to empty a range of slots, in tokens."""

    evicted_tokens: int
    moved_tokens: int


class Sampling(Stops, Protocol):
    """Says what a request asks of the length of its answer."""

    @property
    def max_new_tokens(self) -> int:
        """Gives the number of tokens after which the answer ends."""
        ...


class FinishReason(Protocol):
    """Says why a request has ended."""

    def to_json(self) -> Mapping[str, Any]:
        """Returns the reason; `type` is "abort" where the request was not answered to its end."""
        ...


class Request(Protocol):
    """Is a request as the engine keeps it, by the engine's names."""

    @property
    def rid(self) -> str:
        """Names the request; no other request of the server has that name."""
        ...

    @property
    def origin_input_ids(self) -> Sequence[int]:
        """Gives the prompt's tokens."""
        ...

    @property
    def output_ids(self) -> Sequence[int]:
        """Gives the answer's tokens so far."""
        ...

    @property
    def extra_key(self) -> str | None:
        """Separates prefixes: requests that differ in it share no cached one."""
        ...

    @property
    def sampling_params(self) -> Sampling:
        """Says what the request asks of its answer."""
        ...

    @property
    def finished_reason(self) -> FinishReason | None:
        """Says why the request has ended; None until then."""
        ...

    def finished(self) -> bool:
        """Tells whether the request has ended; it may still be in a batch whose result has not been looked at."""
        ...


@dataclass(frozen=True, slots=True)
class LoadNow:
    """Says what the engine has to do at this moment.

    - running, waiting, for_grammar: the requests, each in one list. Those that wait for their grammar come into the
      queue after that.
    - prefill_rest_tokens: of a prompt in the middle of its prefill, what has no slots yet.
    - evictable_tokens: in the radix cache, and nobody's who runs.
    - max_running_requests: the engine runs no more at a time.
    - batches: that have run since the start.
    - is_paused: nothing runs until somebody says so.
    """

    running: Sequence[Request]
    waiting: Sequence[Request]
    for_grammar: Sequence[Request]
    prefill_rest_tokens: int
    evictable_tokens: int
    max_running_requests: int
    batches: int
    is_paused: bool


class AnswerLimits(Protocol):
    """Limits how many tokens the requests of this replica may have when they end."""

    def is_named(self, request: Request) -> bool:
        """Tells whether the request's client said how long the answer may be."""
        ...

    def expect_capacity(self, tokens: int | None) -> None:
        """Takes note that slots are to go and that so many will be left, which limits requests that come; None where
        slots have come."""

    def refusal(self, capacity: int) -> str | None:
        """Says why not every request that is known would get to its end with so many slots; None if each would."""
        ...

    def cut_to(self, capacity: int) -> None:
        """Limits the requests whose clients named no limit to what fits into so many slots."""

    def cut_where_possible(self, capacity: int) -> None:
        """Does so with the requests that have not had more yet. What does not fit waits for room, or is answered that
        there is none."""


class Engine(Protocol):
    """Is the scheduler of one rank. All ranks of a replica have the same requests, radix tree and free slots at the
    same batch boundary."""

    @property
    def allocator(self) -> SlotAllocator:
        """Gives out the replica's own slots."""
        ...

    @property
    def rows(self) -> RequestRows:
        """Holds the request rows of this rank."""
        ...

    @property
    def limits(self) -> AnswerLimits:
        """Limits the answers of the replica's requests."""
        ...

    @property
    def layers(self) -> LayerRunner:
        """Runs the model of this rank."""
        ...

    @property
    def batches(self) -> int:
        """Counts the batches that have run since the start."""
        ...

    @property
    def most_tokens(self) -> int:
        """Gives the most tokens that a batch can have: a chunk of prefill, and a token of every running request beside
        it."""
        ...

    @property
    def rank_timeout_s(self) -> float:
        """Says how long the ranks of this replica wait for each other in a collective, in seconds."""
        ...

    def load_now(self) -> LoadNow:
        """Says what there is to do now. It takes a pass over all requests."""
        ...

    def evictable_tokens(self) -> int:
        """Counts the tokens in the radix cache that no request uses."""
        ...

    def cached_tokens(self, request: Request) -> int:
        """Counts the tokens of the request's prompt that are in the radix cache. It changes nothing there: only one of
        the ranks asks."""
        ...

    def prefill_room_tokens(self) -> int:
        """Returns the room that a prompt in the middle of its prefill needs, with what others may take meanwhile; 0 if
        there is none."""
        ...

    def vacate(self, slots: SlotRange) -> Vacated:
        """Makes every slot of `slots` free: evicts from the radix cache what has no room elsewhere, moves the rest.
        Raises SlotsInUseError, with nothing changed."""
        ...

    def make_room(self, capacity: int) -> int:
        """Limits every request to what it has room for in so many slots, and answers those that have none. Returns how
        many tokens those need who have more already and end with their next token. All ranks call it at the same
        boundary."""
        ...

    def abandon_batches(self) -> int:
        """Gives up the batches under way, also one that was left in the middle: their requests go back into the queue
        with what they have so far, and every slot and row of this replica is free. Returns how many requests."""
        ...

    def capacity_changed(self) -> None:
        """Tells everything in the engine that keeps a copy of the allocator's size."""

    def all_ranks(self, succeeded: bool) -> bool:
        """Tells whether all ranks of this replica succeeded. It is a collective: every rank must call it. Fails where
        one has not within `rank_timeout_s`."""
        ...

    def slot_differences(self) -> Sequence[str]:
        """Says what is wrong with the owners of slots and request rows: each is free, or one owner's. It takes a pass
        over all of them."""
        ...

    def alike(self) -> Mapping[str, str]:
        """Says, by name, what is the same at all ranks of this replica at the same boundary."""
        ...

    def gather(self, mine: Said) -> Sequence[Said]:
        """Returns what each rank of this replica says, in their order. It is a collective: every rank must call it."""
        ...

    def synchronize(self) -> None:
        """Waits for all that batches and the caller gave the device to do. Activations that are being sent are none of
        it: with NCCL the peer's receive would be waited for."""
