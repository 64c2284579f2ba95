"""What is asked in the endurance run and what came back: requests, answers, and whether an answer is the right one."""

from __future__ import annotations

import enum
import time
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import httpx
import openai
import requests

LENGTH = "length"  # why an answer ended that has come to its limit


class WrongAnswerError(AssertionError):
    """What was answered cannot be right, whatever the model says."""


class LateError(RuntimeError):
    """The answer was not there at its deadline."""


class Outcome(enum.Enum):
    """How a request ended."""

    RIGHT = "right"
    WRONG = "wrong"
    LOST = "lost"
    LATE = "late"


@dataclass(frozen=True)
class Choice:
    """One of the answers to a request. `text` has calls of tools and log probabilities' tokens too; `tokens` are empty
    where the route does not tell them."""

    text: str
    finish: str
    tokens: tuple[int, ...] = ()


@dataclass(frozen=True)
class Answer:
    """What was answered. `completion_tokens` is what the server says that it generated, None where it did not say."""

    choices: tuple[Choice, ...]
    completion_tokens: int | None = None


@dataclass(frozen=True)
class Request:
    """`call` sends it and returns the answer; it raises WrongAnswerError for one that cannot be right.

    `is_known` says that it must have the answer that the idle server gives. `may_be_cut` says that its client has named
    no limit, or more than the KV cache holds: the answer may be shorter or longer, as the capacity was.
    """

    kind: str
    call: Callable[[Api], Answer]
    is_known: bool = True
    may_be_cut: bool = False


@dataclass(frozen=True)
class Result:
    """A request that has ended, in seconds since the start of the run."""

    kind: str
    cycle: int
    phase: str
    began_s: float
    seconds: float
    outcome: Outcome
    detail: str = ""


class Api:
    """The clients of one phase, for one server: OpenAI's, and plain HTTP for SGLang's own routes. Each request has
    `deadline_s`, also where its answer drips."""

    def __init__(self, base_url: str, deadline_s: float) -> None:
        self.base_url = base_url
        self.deadline_s = deadline_s
        # As many connections as there are clients, and no second try: what was lost shall be seen.
        self.client = openai.OpenAI(
            base_url=f"{base_url}/v1", api_key="none", timeout=httpx.Timeout(deadline_s), max_retries=0
        )

    def __enter__(self) -> Api:
        return self

    def __exit__(
        self, _kind: type[BaseException] | None, _error: BaseException | None, _traceback: TracebackType | None
    ) -> None:
        self.client.close()

    def post(self, path: str, body: Any, *, stream: bool = False) -> requests.Response:
        """POST to a route of SGLang's own, or a body that OpenAI's client would not send."""
        return requests.post(self.base_url + path, json=body, timeout=self.deadline_s, stream=stream)

    def ask(self, path: str, body: Any) -> Any:
        """The JSON answer to a POST that must succeed."""
        answer = self.post(path, body)
        if answer.status_code != requests.codes.ok:
            raise RuntimeError(f"{path}: {answer.status_code} {answer.text[:300]}")
        return answer.json()

    def within(self, began_s: float) -> None:
        """Raises LateError when a request that began at `began_s` (`time.monotonic()`) is past its deadline."""
        if time.monotonic() - began_s > self.deadline_s:
            raise LateError(f"no end within {self.deadline_s:g} s")


def difference(expected: Answer, got: Answer, *, may_be_cut: bool) -> str:
    """Why `got` is not the answer that was `expected`; empty where it is."""
    if len(expected.choices) != len(got.choices):
        return f"{len(got.choices)} answers instead of {len(expected.choices)}"
    cut = False
    for index, (one, other) in enumerate(zip(expected.choices, got.choices, strict=True)):
        if one == other:
            continue
        if may_be_cut and LENGTH in (one.finish, other.finish) and _begins_alike(one, other):
            cut = True
            continue
        return f"answer {index} is {_shown(other)} instead of {_shown(one)}"
    if not cut and expected.completion_tokens != got.completion_tokens:
        return f"{got.completion_tokens} tokens instead of {expected.completion_tokens}"
    return ""


def _begins_alike(one: Choice, other: Choice) -> bool:
    """Whether the one that came to its limit is how the other begins, or the same."""
    short, long = sorted((one, other), key=lambda choice: len(choice.text))
    if short.finish != LENGTH:
        return False
    # The last token may be the first part of a character.
    return long.text.startswith(short.text.rstrip("\N{REPLACEMENT CHARACTER}")) and (
        long.tokens[: len(short.tokens)] == short.tokens
    )


def _shown(choice: Choice) -> str:
    text = choice.text if len(choice.text) <= 60 else f"{choice.text[:40]}...{choice.text[-17:]}"
    return f"{text!r} ({choice.finish})"


def ended(request: Request, api: Api, expected: Answer | None) -> tuple[Outcome, str]:
    """Send a request, wait for its end, and say how it ended."""
    try:
        got = request.call(api)
    except WrongAnswerError as error:
        return Outcome.WRONG, str(error)
    except (LateError, openai.APITimeoutError, requests.Timeout) as error:
        return Outcome.LATE, f"{type(error).__name__}: {error}"
    except Exception as error:  # noqa: BLE001 - whatever a client meets is a lost answer, and the run fails by it
        return Outcome.LOST, f"{type(error).__name__}: {error}"[:500]
    if expected is not None and (detail := difference(expected, got, may_be_cut=request.may_be_cut)):
        return Outcome.WRONG, detail
    return Outcome.RIGHT, ""
