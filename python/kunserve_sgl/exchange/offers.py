"""What a rank offers the same rank of another replica: memory that it has lent to it, and where that is."""

from __future__ import annotations

from typing import NamedTuple, Protocol, TypeVar

import msgspec
from typing_extensions import override

from kunserve_sgl.memory.frame_export import FrameExport


class LoanOffer(msgspec.Struct, frozen=True, array_like=True):
    """Offers what `owner` has lent as `loan_id`."""

    transition: int
    owner: int
    loan_id: int

    @property
    def peer(self) -> int:
        """Gives the replica that offers."""
        return self.owner


class KvOffer(LoanOffer, frozen=True, array_like=True, tag="kv"):
    """Offers layer `layer` of the slots in granules [first_granule, first_granule + granules) of replica `replica`, at
    home at `owner`; without descriptors at the memory service of `incarnation`, which is at `address` where that is not
    known by its name."""

    replica: int
    first_granule: int
    granules: int
    layer: int
    incarnation: int = 0
    address: str = ""


class ParameterOffer(LoanOffer, frozen=True, array_like=True, tag="parameters"):
    """Offers the region of layer `layer`, to be read; as `KvOffer`."""

    layer: int
    incarnation: int = 0
    address: str = ""


class ActivationOffer(msgspec.Struct, frozen=True, array_like=True, tag="activations"):
    """Offers the buffer for the activations of `owner`'s batches. Stays shared when the transition is over."""

    transition: int
    owner: int
    size_bytes: int


LentOffers = KvOffer | ParameterOffer
Offer = LentOffers | ActivationOffer
LentOffer = TypeVar("LentOffer", KvOffer, ParameterOffer)


class OfferChannel(Protocol):
    """Receives offers, and sends them. Accepting never waits for an offer that has not begun to arrive."""

    def close(self) -> None:
        """Takes no more offers."""

    def offer(self, borrower: int, address: str, offer: Offer, export: FrameExport) -> None:
        """Sends an offer to the same rank of replica `borrower`, who takes offers at `address`; it need not be
        accepting yet. Raises TransferError."""

    def accept(self) -> tuple[Offer, FrameExport] | None:
        """Returns the next offer, or None where none has arrived; the caller closes the export. Raises
        TransferError."""


class OfferAddress(NamedTuple):
    """Says where a rank takes offers of another, and whether it `maps` what that lends, or uses it by messages."""

    address: str
    maps: bool


class TwoChannels(OfferChannel):
    """Receives offers with descriptors by one channel and those without by another, and sends them so."""

    def __init__(self, mapped: OfferChannel, by_message: OfferChannel) -> None:
        self._mapped = mapped
        self._by_message = by_message

    @override
    def close(self) -> None:
        self._mapped.close()
        self._by_message.close()

    @override
    def offer(self, borrower: int, address: str, offer: Offer, export: FrameExport) -> None:
        (self._mapped if export.fds else self._by_message).offer(borrower, address, offer, export)

    @override
    def accept(self) -> tuple[Offer, FrameExport] | None:
        return self._mapped.accept() or self._by_message.accept()
