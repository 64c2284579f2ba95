"""Where the same rank of other replicas lets its memory be used by messages: known by name where sockets lie in one
directory, else told by the coordinator, or by who lends."""

from __future__ import annotations

from kunserve_sgl.args import KunserveOptions
from kunserve_sgl.control import addresses
from kunserve_sgl.errors import TransientError
from kunserve_sgl.memory.errors import TransferError


class MemoryBook:
    """Is one rank's. Whom an address is of is proved by keys when it is used."""

    def __init__(self, options: KunserveOptions, rank: int) -> None:
        self._options = options
        self._rank = rank
        self._known: dict[int, tuple[int, str]] = {}  # incarnation and address, by replica
        self.own = ""  # for offers, once it is known

    def learn(self, replica: int, incarnation: int, address: str) -> None:
        """Takes note of an address. Raises TransferError for one where no rank can be."""
        if not self._options.controls_by_tcp:
            return
        if not addresses.is_memory_address(self._options, replica, self._rank, incarnation, address):
            raise TransferError(f"replica {replica} says that its memory is at {address!r:.80}")
        self._known[replica] = incarnation, address

    def address_of(self, replica: int, incarnation: int) -> str:
        """Returns where an incarnation of a replica is asked. Raises TransientError where that has not been told."""
        if not self._options.controls_by_tcp:
            return addresses.memory_bind_address(self._options, replica, self._rank, incarnation)
        known_incarnation, address = self._known.get(replica, (-1, ""))
        if known_incarnation != incarnation:
            raise TransientError(f"nobody has told where the memory of replica {replica} is, incarnation {incarnation}")
        return address
