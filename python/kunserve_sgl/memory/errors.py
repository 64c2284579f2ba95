"""Typed errors of the memory package, each one of KunServe's three kinds.

Every one of them leaves ranges, frames, ledger and layers as they were before the call, unless its own text
says otherwise.
"""

from __future__ import annotations

from kunserve_sgl.errors import ConfigurationError, InvariantError, TransientError


class FrameSizeError(ConfigurationError):
    """The frame size is not a positive multiple of what the backend can map."""


class BackendUnavailableError(ConfigurationError):
    """The machine lacks what the backend needs (driver, device, device feature)."""


class PeerAccessError(ConfigurationError):
    """A frame lies on a device that this device cannot read and write directly."""


class OutOfMemoryError(TransientError):
    """The machine has no physical memory or address space left for the request."""


class MappingFailedError(TransientError):
    """The operating system or driver refused a map or unmap; everything done before it was undone."""


class ViewInUseError(TransientError):
    """A tensor over the memory is still alive, so the memory cannot be taken away."""


class PoolFullError(TransientError):
    """The pool has fewer free frames than asked for."""


class TransferError(TransientError):
    """Frames could not be sent to or received from another process."""


class ForeignFrameError(InvariantError):
    """This backend did not create or import the frame, or has destroyed it."""


class SplitPieceError(InvariantError):
    """Frames that were created in one piece were to be mapped, unmapped, exported or destroyed otherwise than all
    together and in order."""


class ForeignRangeError(InvariantError):
    """This backend did not reserve the virtual range, or has released it."""


class OutOfRangeError(InvariantError):
    """A span reaches outside its virtual range."""


class AlreadyMappedError(InvariantError):
    """A span has a frame behind it already, or a frame is mapped already (or named twice)."""


class NotMappedError(InvariantError):
    """A span has no frame behind at least one of its positions."""


class FrameInUseError(InvariantError):
    """A frame is mapped or held, so it cannot be destroyed."""


class ClosedError(InvariantError):
    """The backend was closed, or broke in a way that could not be undone."""


class LedgerError(InvariantError):
    """The ledger refuses a change, or its books do not balance; the message says which line is off."""


class LoanError(InvariantError):
    """A loan is unknown, ended already, or its frames are still mapped."""


class LayerStateError(InvariantError):
    """A layer is not in the state that the operation needs."""


class LayerDroppedError(InvariantError):
    """A dropped layer was called."""


class StaleReferenceError(ConfigurationError):
    """Something outside the layer keeps the old memory of a parameter alive, so it cannot be moved."""


class RestoreSourceError(TransientError):
    """A source cannot supply the bytes of a layer."""


class ChecksumMismatchError(TransientError):
    """The bytes that a source supplied are not the bytes that were loaded; the layer stays dropped."""
