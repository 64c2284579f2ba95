"""What SGLang asks all replicas, where some of those end that were asked."""

from __future__ import annotations

from collections.abc import Collection
from http import HTTPStatus
from typing import Any

from fastapi import HTTPException
from sglang.srt.managers.communicator import FanOutCommunicator


class AskedReplicas:
    """Stands for one of SGLang's communicators, which wait for as many answers as replicas were asked, without a
    deadline. This one waits for those only that were asked and have been there ever since.

    Answers do not say whose they are: where a replica had answered before it ended, its answer stands for one that
    comes too late.
    """

    def __init__(self, communicator: FanOutCommunicator[Any], alive: Collection[int]) -> None:
        """`alive` are the replicas that are there."""
        self._communicator = communicator
        self._alive = frozenset(alive)
        self._question: Any = None  # that was open when a replica last ended or came back
        self._asked: frozenset[int] = frozenset()  # of those who were asked it, who have been there ever since

    async def __call__(self, question: Any) -> Any:
        """Returns the answers. Raises HTTPException where nobody is left who was asked."""
        answers = await self._communicator(question)
        if not answers:
            raise nobody_left()
        return answers

    def set_fan_out(self, count: int) -> None:
        """Says how many replicas the next question goes to."""
        self._communicator.set_fan_out(count)

    def on_alive(self, alive: Collection[int]) -> None:
        """Takes in which replicas are there from now on. One that is back has not got what is being asked."""
        before, self._alive = self._alive, frozenset(alive)
        waiting = self._communicator
        waiting.set_fan_out(len(self._alive))
        if (question := waiting._result_event) is None:
            self._question = None
            return
        if question is not self._question:  # it was asked since
            self._question, self._asked = question, before
        self._asked &= self._alive
        waiting._result_fan_out = len(self._asked)
        if len(waiting._result_values) >= len(self._asked):
            question.set()


def nobody_left() -> HTTPException:
    """Says so to the client, where nobody is left who was asked."""
    return HTTPException(HTTPStatus.SERVICE_UNAVAILABLE, "all replicas that were asked have ended")
