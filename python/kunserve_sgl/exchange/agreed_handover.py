"""A handover whose way is chosen when all replicas are known, which is before the first batch that goes anywhere."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from typing_extensions import override

from kunserve_sgl.errors import InvariantError
from kunserve_sgl.exchange.activations import ActivationBuffer
from kunserve_sgl.exchange.connecting import Connected, Connecting
from kunserve_sgl.exchange.handover import Handover
from kunserve_sgl.exchange.tensor_layout import Activations
from kunserve_sgl.exchange.work import Answer, TensorNote, Work


class AgreedHandover(Handover):
    """Passes activations on by the handover that `agree` was given. All else raises InvariantError before that."""

    def __init__(self) -> None:
        self._agreed: Handover | None = None

    @property
    def is_agreed(self) -> bool:
        """Tells whether the way has been chosen."""
        return self._agreed is not None

    def agree(self, handover: Handover) -> None:
        """Takes the way for good. Raises InvariantError the second time: what is under way would be lost."""
        if self._agreed is not None:
            raise InvariantError("how activations are handed over has been chosen already")
        self._agreed = handover

    @property
    def _way(self) -> Handover:
        if self._agreed is None:
            raise InvariantError("nothing has been chosen yet to hand activations over")
        return self._agreed

    @override
    def connect(self, peers: Iterable[int], timeout_s: float) -> Connecting | Connected:
        return self._way.connect(peers, timeout_s)

    @override
    def forget(self, peer: int, incarnation: int) -> None:
        self._way.forget(peer, incarnation)

    @override
    def share(self, owner: int, buffer: ActivationBuffer) -> None:
        self._way.share(owner, buffer)

    @override
    def disconnect(self, peers: Iterable[int]) -> None:
        self._way.disconnect(peers)

    @override
    def give(
        self, owner: int, to: int, tensors: Activations, keep: torch.Tensor | None, place: int
    ) -> tuple[TensorNote, ...]:
        return self._way.give(owner, to, tensors, keep, place)

    @override
    def arrived(self, message: Work | Answer) -> None:
        self._way.arrived(message)

    @override
    def has_come(self, message: Work | Answer) -> bool:
        return self._way.has_come(message)

    @override
    def take(self, message: Work | Answer, place: int) -> Activations:
        return self._way.take(message, place)
