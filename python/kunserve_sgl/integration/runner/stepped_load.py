"""SGLang's loading of weights, which takes them by itself, made to stop between two of them."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterable, Iterator

import torch

Weights = Iterable[tuple[str, torch.Tensor]]

_PASSED_OVER_BYTES = 64 << 10  # what looking at a weight and passing it over counts for; it takes tens of microseconds


class _LeftError(Exception):
    """Ends the loader, where nobody wants the rest."""


class SteppedLoad:
    """Runs a loader in a thread of its own, of which and the caller only one runs at a time: the loader while `go_on`
    waits. It runs in the caller's inference mode, and on a GPU in its stream. As a context manager it ends the loader
    wherever that is."""

    def __init__(
        self,
        load: Callable[[Weights], object],
        weights: Iterable[tuple[str, torch.Tensor] | None],
        device: torch.device,
    ) -> None:
        """Calls `load`, on the first `go_on`, with `weights` but for each None, which stands for one that was passed
        over. `device` is where it writes to."""
        self._load = load
        self._weights = weights
        self._is_inference = torch.is_inference_mode_enabled()
        self._stream = torch.cuda.current_stream(device) if device.type == "cuda" else None
        self._left_bytes = 0
        self._is_left = False
        self._go, self._stopped = threading.Semaphore(0), threading.Semaphore(0)
        self._error: BaseException | None = None
        self._has_ended = False
        self._thread = threading.Thread(target=self._run, name="kunserve-load", daemon=True)
        self._thread.start()

    def __enter__(self) -> SteppedLoad:
        return self

    def __exit__(self, *raised: object) -> None:
        self._is_left = True
        self._go.release()
        self._thread.join()  # what it is at, it does to its end, as it would in the caller's thread
        self._error = None

    def go_on(self, most_bytes: int) -> bool:
        """Lets the loader take weights of about `most_bytes`, one at least; returns whether it has ended. Raises what
        it raises."""
        self._left_bytes = most_bytes
        self._go.release()
        self._stopped.acquire()
        if self._error is not None:
            error, self._error = self._error, None
            raise error
        return self._has_ended

    def _run(self) -> None:
        self._go.acquire()
        try:
            stream = contextlib.nullcontext() if self._stream is None else torch.cuda.stream(self._stream)
            with torch.inference_mode(self._is_inference), stream:
                if not self._is_left:
                    self._load(self._stopping())
        except _LeftError:
            pass
        except BaseException as error:  # noqa: BLE001 - `go_on` raises it
            self._error = error
        self._has_ended = True
        self._stopped.release()

    def _stopping(self) -> Iterator[tuple[str, torch.Tensor]]:
        for each in self._weights:
            self._left_bytes -= _PASSED_OVER_BYTES if each is None else each[1].nbytes
            if each is not None:
                yield each
            del each
            if self._left_bytes <= 0:
                self._stopped.release()
                self._go.acquire()
                if self._is_left:
                    raise _LeftError
