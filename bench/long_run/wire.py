"""Answers as they come over the wire, whole and streamed, brought into one form."""

from __future__ import annotations

import json
import time
from collections import defaultdict
from dataclasses import dataclass, field
from typing import Any

import requests

from long_run.answers import Answer, Api, Choice, WrongAnswerError

Json = dict[str, Any]

_ABORT = "abort"


def chat_answer(api: Api, body: Json, *, stream: bool) -> Answer:
    """The answer to a chat that OpenAI's library sends."""
    create: Any = api.client.chat.completions.create
    if stream:
        return _joined(api, create(**body, stream=True, stream_options={"include_usage": True}))
    got = create(**body)
    choices = [
        _choice(
            each.message.content or "",
            [(call.function.name, call.function.arguments) for call in each.message.tool_calls or ()],
            [token.token for token in each.logprobs.content] if each.logprobs and each.logprobs.content else (),
            each.finish_reason,
        )
        for each in sorted(got.choices, key=lambda choice: choice.index)
    ]
    return Answer(tuple(choices), got.usage.completion_tokens)


def completion_answer(api: Api, body: Json, *, stream: bool) -> Answer:
    """The answer to a completion that OpenAI's library sends."""
    create: Any = api.client.completions.create
    if stream:
        return _joined(api, create(**body, stream=True, stream_options={"include_usage": True}))
    got = create(**body)
    choices = [
        _choice(each.text, (), (each.logprobs.tokens or ()) if each.logprobs else (), each.finish_reason)
        for each in sorted(got.choices, key=lambda choice: choice.index)
    ]
    return Answer(tuple(choices), got.usage.completion_tokens)


def native_answer(answer: Any, *, may_be_aborted: bool = False) -> Answer:
    """An answer of /generate."""
    answers = answer if isinstance(answer, list) else [answer]
    choices = []
    for each in answers:
        finish = each["meta_info"]["finish_reason"]
        kind = "none" if finish is None else finish["type"]
        if kind == _ABORT and not may_be_aborted:
            raise RuntimeError(f"aborted: {finish}")
        choices.append(Choice(each["text"], kind, tuple(each["output_ids"])))
    return Answer(tuple(choices), sum(each["meta_info"]["completion_tokens"] for each in answers))


def native_stream(api: Api, body: Json) -> Answer:
    """The last event of a stream of /generate, which has all that came before."""
    began_s, last = time.monotonic(), None
    with api.post("/generate", {**body, "stream": True}, stream=True) as answer:
        if answer.status_code != requests.codes.ok:
            raise RuntimeError(f"/generate: {answer.status_code} {answer.text[:300]}")
        for line in answer.iter_lines():
            api.within(began_s)
            if line == b"data: [DONE]":
                break
            if line:
                last = json.loads(line.removeprefix(b"data: "))
                if "error" in last:
                    raise RuntimeError(f"/generate: {last['error']}")
        else:
            raise WrongAnswerError("the stream ended without [DONE]")
    if last is None or last["meta_info"]["finish_reason"] is None:
        raise WrongAnswerError("the stream ended before the answer did")
    return native_answer(last)


@dataclass
class _Parts:
    """What has come of one of the answers in a stream."""

    text: str = ""
    calls: dict[int, list[str]] = field(default_factory=dict)  # name and arguments, by index
    tokens: list[str] = field(default_factory=list)
    finish: str | None = None


def _joined(api: Api, stream: Any) -> Answer:
    began_s = time.monotonic()
    parts: defaultdict[int, _Parts] = defaultdict(_Parts)
    completion_tokens = None
    with stream:
        for event in stream:
            api.within(began_s)
            if event.usage is not None:
                completion_tokens = event.usage.completion_tokens
            for choice in event.choices:
                part = parts[choice.index]
                part.finish = choice.finish_reason or part.finish
                if not hasattr(choice, "delta"):
                    part.text += choice.text
                    continue
                part.text += choice.delta.content or ""
                for call in choice.delta.tool_calls or ():
                    known = part.calls.setdefault(call.index, ["", ""])
                    known[0] += call.function.name or ""
                    known[1] += call.function.arguments or ""
    if not parts:
        raise WrongAnswerError("the stream ended without an answer")
    choices = []
    for _, part in sorted(parts.items()):
        # What SGLang 0.5.17 makes of arguments, and of text behind a call, depends on which tokens come together.
        calls = [(name, "") for _, (name, _) in sorted(part.calls.items())]
        choices.append(_choice("" if calls else part.text, calls, part.tokens, part.finish))
    return Answer(tuple(choices), completion_tokens)


def _choice(text: str, calls: Any, tokens: Any, finish: str | None) -> Choice:
    if finish is None:
        raise WrongAnswerError(f"the answer ended without a reason, after {text[-60:]!r}")
    if finish == _ABORT:
        raise RuntimeError(f"aborted after {text[-60:]!r}")
    shown = text + "".join(f"\n{name}({_ordered(arguments)})" for name, arguments in calls)
    return Choice(shown + ("\n" + "|".join(tokens) if tokens else ""), finish)


def _ordered(arguments: str) -> str:
    """Arguments of a tool; whole answers have them with other white space than streams."""
    try:
        return json.dumps(json.loads(arguments), sort_keys=True)
    except ValueError:
        return arguments
