"""Operations that happen entirely or not at all: each part comes with its way back, in case a later one fails."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager

from kunserve_sgl.errors import InvariantError, KunserveError
from kunserve_sgl.memory.virtual_range import Fence, Frame, Span
from kunserve_sgl.memory.vmm import VmmBackend


@contextmanager
def undoing(owner: str) -> Iterator[ExitStack]:
    """Runs the callbacks, last first, if the block fails. Raises InvariantError, in the name of `owner`, where one of
    them fails too: the books and the machine then disagree."""
    undo = ExitStack()
    try:
        yield undo
    except BaseException as failure:
        try:
            undo.close()
        except KunserveError as error:
            raise InvariantError(
                f"{owner}: a failed operation could not be undone: {error}; it had failed because: {failure}"
            ) from error
        raise


def map_span(vmm: VmmBackend, undo: ExitStack, span: Span, frames: Sequence[Frame]) -> None:
    """Maps `frames` behind `span`. Raises as `VmmBackend.map`."""
    vmm.map(span, frames)
    undo.callback(vmm.unmap, span, after=())


def unmap_span(vmm: VmmBackend, undo: ExitStack, span: Span, after: Iterable[Fence] | None) -> tuple[Frame, ...]:
    """Unmaps `span`, and returns the frames that were behind it. Raises as `VmmBackend.unmap`."""
    frames = vmm.unmap(span, after)
    undo.callback(vmm.map, span, frames)
    return frames
