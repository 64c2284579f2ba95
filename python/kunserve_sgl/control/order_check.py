"""What a rank believes of the coordinator: every field of what it says is bounded, and checked against what the rank
knows of the deployment and of itself. A message that fails is ignored as a whole."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from kunserve_sgl.args import Activations
from kunserve_sgl.control.message_check import MOST_INCARNATIONS, MOST_SECONDS, MOST_TOKENS
from kunserve_sgl.control.messages import FromCoordinator, Lend, Order, Phase, Resize, Welcome
from kunserve_sgl.errors import ConfigurationError
from kunserve_sgl.policy.plan import ParameterLoan, Plan, ReplicaFacts
from kunserve_sgl.policy.plan_check import check_plan, check_transition
from kunserve_sgl.wire.rejections import COORDINATOR, BadMessageError, Sender, require, require_count, require_range


class OrderCheck:
    """Checks messages for one rank. `facts` are its own, of which only what is alike everywhere counts.
    `is_address(replica, rank, incarnation, inbox, frame_address)` says whether that rank can be reached there, and
    `is_memory_address(replica, rank, incarnation, address)` whether its memory is used by messages there; `activations`
    is what the flag says."""

    def __init__(
        self,
        replicas: int,
        ranks: int,
        facts: ReplicaFacts,
        is_address: Callable[[int, int, int, str, str], bool],
        is_memory_address: Callable[[int, int, int, str], bool],
        activations: Activations = Activations.AUTO,
    ) -> None:
        self._replica = facts.replica
        self._replicas = replicas
        self._ranks = ranks
        self._is_address = is_address
        self._is_memory_address = is_memory_address
        self._activations = activations
        # What others have free is theirs to know, and what is free here is looked at when it is needed.
        self._facts = [replace(facts, replica=replica, free_frames=MOST_TOKENS) for replica in range(replicas)]

    def check(self, message: FromCoordinator, sender: Sender, plan: Plan | None) -> None:
        """Raises BadMessageError for a message to ignore. `plan` is the one that this rank knows."""
        require(sender in (None, COORDINATOR), "it came from {}, which is not the coordinator", sender)
        if isinstance(message, Welcome):
            self._check_welcome(message)
        elif isinstance(message, Lend):
            self._check_lend(message)
        elif isinstance(message, Resize):
            require_range("number", message.number, 1, MOST_TOKENS)
            require_range("frames", abs(message.frames), 1, MOST_TOKENS)
        else:
            self._check_order(message, plan)

    def _check_welcome(self, welcome: Welcome) -> None:
        self._check_plan(welcome.plan, None)
        for what, addresses in (("inboxes", welcome.inboxes), ("frame addresses", welcome.frame_addresses)):
            is_whole = len(addresses) == self._replicas and all(len(row) == self._ranks for row in addresses)
            require(is_whole, "{} of other ranks than there are", what)
        require(len(welcome.incarnations) == self._replicas, "{} incarnations", len(welcome.incarnations))
        memory = welcome.memory_addresses
        is_whole = not memory or (len(memory) == self._replicas and all(len(row) == self._ranks for row in memory))
        require(is_whole, "memory addresses of other ranks than there are")
        require(len(welcome.maps) in (0, self._replicas), "{} peers whose memory is mapped or not", len(welcome.maps))
        for replica, incarnation in enumerate(welcome.incarnations):
            require_range("incarnation", incarnation, 0, MOST_INCARNATIONS)
            for rank in range(self._ranks):
                inbox, frames = welcome.inboxes[replica][rank], welcome.frame_addresses[replica][rank]
                is_address = self._is_address(replica, rank, incarnation, inbox, frames)
                require(is_address, "addresses {} and {}", inbox, frames)
                self._check_memory_address(replica, rank, incarnation, memory[replica][rank] if memory else "")
        chosen = welcome.activations
        is_fitting = chosen is not Activations.AUTO and self._activations in (Activations.AUTO, chosen)
        require(is_fitting, "activations {}, where they are {}", chosen.value, self._activations.value)
        self._activations = chosen

    def _check_order(self, order: Order, plan: Plan | None) -> None:
        require_range("transition", order.transition, 1, MOST_TOKENS)
        require_range("timeout_s", order.timeout_s, 0, MOST_SECONDS)
        require_range("old_epoch", order.old_epoch, 0, MOST_TOKENS)
        require_range("lend_timeout_s", order.lend_timeout_s, 0, MOST_SECONDS)
        require(order.phase is Phase.RELOAD or not order.loans, "loans in {}", order.phase.value)
        self._check_loans(order.loans)
        require_count("members", order.members, self._replicas)
        for member in order.members:
            require_range("member", member, 0, self._replicas - 1)
        require(order.plan.epoch == order.old_epoch + 1, "epoch {} after {}", order.plan.epoch, order.old_epoch)
        if order.phase is Phase.ABANDON:
            self._check_plan(order.plan, None)
        elif order.phase is Phase.PREPARE:  # the plan of a later phase has to be the one of the first
            self._check_plan(order.plan, plan if plan is not None and plan.epoch == order.old_epoch else None)

    def _check_lend(self, lend: Lend) -> None:
        require_range("number", lend.number, 1, MOST_TOKENS)
        require_count("loans", lend.loans, self._replicas)
        for loan in lend.loans:
            require_range("incarnation", loan.incarnation, 0, MOST_INCARNATIONS)
            require(loan.borrower != self._replica, "it is to lend to itself")
            require(len(loan.memory_addresses) in (0, self._ranks), "{} addresses", len(loan.memory_addresses))
            self._check_layers(loan.borrower, loan.layers)
            for rank, address in enumerate(loan.memory_addresses):
                self._check_memory_address(loan.borrower, rank, loan.incarnation, address)

    def _check_memory_address(self, replica: int, rank: int, incarnation: int, address: str) -> None:
        is_address = self._is_memory_address(replica, rank, incarnation, address)
        require(is_address, "memory of replica {} rank {} at {!r:.80}", replica, rank, address)

    def _check_loans(self, loans: Sequence[ParameterLoan]) -> None:
        """Raises BadMessageError for loans that cannot be."""
        require_count("loans", loans, self._replicas**2)
        for loan in loans:
            require_range("owner", loan.owner, 0, self._replicas - 1)
            require(loan.owner != loan.borrower, "replica {} borrows of itself", loan.owner)
            self._check_layers(loan.borrower, loan.layers)

    def _check_layers(self, borrower: int, layers: Sequence[int]) -> None:
        most = self._facts[0].layer_count
        require_range("borrower", borrower, 0, self._replicas - 1)
        require_count("layers", layers, most)
        require(len(set(layers)) == len(layers), "a layer twice")
        for layer in layers:
            require_range("layer", layer, 0, most - 1)

    def _check_plan(self, plan: Plan, old: Plan | None) -> None:
        """Raises BadMessageError for a plan that cannot be. `old` is the one that it follows, where that is known."""
        require_range("epoch", plan.epoch, 0, MOST_TOKENS)
        try:
            if old is None:
                check_plan(plan, self._facts)
            else:
                check_transition(old, plan, self._facts)  # looks at the plan as such, too
        except ConfigurationError as error:
            raise BadMessageError(str(error)) from error
