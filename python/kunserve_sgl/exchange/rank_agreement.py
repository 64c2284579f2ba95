"""What all ranks of a replica have received: rank 0 acts on nothing that another rank lacks.

A replica that dies may have sent its last message to some ranks only, or the activations that it announces. If rank 0
went on with that, it would wait in a collective for a rank that waits for them, and neither could be reached any more.
"""

from __future__ import annotations

from collections.abc import Callable, Collection

import msgspec

from kunserve_sgl.exchange.work import Answer, Have, PeerOrder, Work

_ANSWER, _COPY = -2, -1
# Of what other ranks have and rank 0 has not, or has forgotten meanwhile.
_MOST_KEPT = 2000
_Key = tuple[int, int, int]


def have_of(message: PeerOrder | Answer, rank: int) -> Have:
    """Returns what `rank` tells rank 0 of a message that it has received."""
    if isinstance(message, Answer):
        return Have(rank, message.owner, message.batch, _ANSWER, message.error)
    # A batch may come twice on its way, for other layers.
    return Have(rank, message.owner, message.batch, message.segments[0].start if isinstance(message, Work) else _COPY)


class RankAgreement:
    """Holds back at rank 0 what not all of the `ranks` of the replica have received."""

    def __init__(self) -> None:
        self.ranks = 1
        self._held: dict[_Key, PeerOrder | Answer] = {}
        self._haves: dict[_Key, dict[int, str]] = {}  # ranks, with the error of an answer

    @property
    def holds_back(self) -> bool:
        """Tells whether something is held back."""
        return bool(self._held)

    def held_of(self, owner: int) -> int:
        """Counts the orders of `owner` that are held back."""
        return sum(key[0] == owner and key[2] != _ANSWER for key in self._held)

    def receive(self, message: PeerOrder | Answer) -> PeerOrder | Answer | None:
        """Takes in what rank 0 has received; returns it where all others have it too, else None."""
        if self.ranks == 1:
            return message
        key = _key(have_of(message, 0))
        self._held[key] = message
        return self._release(key)

    def note(self, have: Have) -> PeerOrder | Answer | None:
        """Takes in what another rank has received; returns the message where all have it now, else None."""
        key = _key(have)
        self._haves.setdefault(key, {})[have.rank] = have.error
        if len(self._haves) > _MOST_KEPT:
            del self._haves[next(iter(self._haves))]
        return self._release(key)

    def forget_orders_but(self, owners: Collection[int]) -> None:
        """Drops the orders of all but `owners`."""
        self._keep(lambda key: key[2] == _ANSWER or key[0] in owners)

    def forget_orders_of(self, owner: int) -> None:
        """Drops the orders of `owner`."""
        self._keep(lambda key: key[2] == _ANSWER or key[0] != owner)

    def forget_answers(self) -> None:
        """Drops the answers."""
        self._keep(lambda key: key[2] != _ANSWER)

    def _keep(self, is_kept: Callable[[_Key], bool]) -> None:
        self._held = {key: message for key, message in self._held.items() if is_kept(key)}
        self._haves = {key: ranks for key, ranks in self._haves.items() if is_kept(key)}

    def _release(self, key: _Key) -> PeerOrder | Answer | None:
        errors = self._haves.get(key, {})
        if key not in self._held or len(errors) < self.ranks - 1:
            return None
        del self._haves[key]
        message = self._held.pop(key)
        # What failed at one rank has failed for all, which are to leave the batch together.
        if isinstance(message, Answer) and not message.error and (error := next(filter(None, errors.values()), "")):
            return msgspec.structs.replace(message, error=error)
        return message


def _key(have: Have) -> _Key:
    return have.owner, have.batch, have.start
