"""How a process of the server that has failed ends: with a line in the server's directory, for those that outlive it.

The exit code of a process says little, and what it logged is lost between the lines of the others. Standard library
only: processes sign up before they import anything else.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

from kunserve_sgl.errors import KunserveError, TransientError

logger = logging.getLogger(__name__)

CONTROLLER = "data-parallel controller"
DETOKENIZER = "detokenizer"
FAILED = 1  # exit code
_FOLDER = "last-words"
_MOST_CHARACTERS = 1000

_mine: Path | None = None


class StartFailedError(TransientError):
    """Says that a child has ended before it was ready, and why, as the child saw it."""


def scheduler_name(replica: int, rank: int) -> str:
    """Names a scheduler process as its last words and the log do."""
    return f"replica {replica} rank {rank}"


def sign_up(directory: str, who: str) -> None:
    """Says who this process is, and where its words would go. What was left by one of that name before it is gone."""
    global _mine
    folder = Path(directory, _FOLDER)
    folder.mkdir(exist_ok=True)
    _mine = folder / who
    _mine.unlink(missing_ok=True)


def leave(why: BaseException | str) -> None:
    """Leaves the reason why this process fails. The first one counts; nothing happens in a process that has not signed
    up."""
    if _mine is None:
        return
    try:
        with _mine.open("x") as file:
            file.write(_line(why))
    except FileExistsError:
        return
    except OSError as error:
        logger.error("KunServe: could not leave the reason of the end: %s", error)


def left_by(function: Callable[..., Any]) -> Callable[..., Any]:
    """Wraps `function`, whose failure this process leaves as its last words: SGLang catches and logs it further up."""

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        try:
            return function(*args, **kwargs)
        except Exception as error:
            leave(error)
            raise

    return call


@contextlib.contextmanager
def ending_alone(server_args: Any) -> Iterator[None]:
    """Ends this process where the block fails, if it has been started while others serve: by SGLang's way it would end
    its starter too, and with that the server."""
    try:
        yield
    except Exception as error:
        leave(error)
        if not server_args.kunserve_incarnation:
            raise
        logger.exception("KunServe: this replica has not started")
        end_process()


def end_process(exit_code: int = FAILED) -> NoReturn:
    """Ends this process, from any thread. Threads and sockets of libraries do not keep it alive: an interpreter that
    ends waits for them without a deadline."""
    try:
        logging.shutdown()
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(exit_code)


def words_of(directory: str, who: str) -> str | None:
    """Returns what that process has left, None where it left nothing."""
    try:
        return Path(directory, _FOLDER, who).read_text() or None
    except FileNotFoundError:
        return None


def pass_on(directory: str, who: str, words: str | None) -> None:
    """Leaves here what a process has left on another machine. What was left by one of that name before it is gone."""
    folder = Path(directory, _FOLDER)
    folder.mkdir(exist_ok=True)
    if words is None:
        (folder / who).unlink(missing_ok=True)
    else:
        (folder / who).write_text(_line(words))


def first_words(directory: str) -> str | None:
    """Returns the oldest words that any process has left, with its name."""
    folder = Path(directory, _FOLDER)
    found = sorted(folder.iterdir(), key=lambda path: path.stat().st_mtime_ns) if folder.is_dir() else []
    return next((f"{path.name}: {words}" for path in found if (words := words_of(directory, path.name))), None)


def reason_of_end(directory: str, ended: Sequence[tuple[str, int]], is_starting: bool) -> str:
    """Says why the server ends, as far as the launcher can know. `ended` are its own children that have ended, with
    their exit codes. A replica that ended earlier, and without which the others went on, is not why."""
    for who in (CONTROLLER, DETOKENIZER):
        if words := words_of(directory, who):
            return f"{who}: {words}" if who != CONTROLLER else words
    first = first_words(directory)
    if is_starting and first is not None:
        return first
    if ended:
        return ", ".join(f"{name} ended with exit code {code}" for name, code in ended)
    return first or "a process of the server has failed; the log says more"


def _line(why: BaseException | str) -> str:
    text = why if isinstance(why, (str, KunserveError)) else f"{type(why).__name__}: {why}"
    return re.sub(r"\s+", " ", str(text)).strip()[:_MOST_CHARACTERS]
