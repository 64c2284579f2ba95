"""The requests of the endurance run: all shapes in which clients ask, made by chance from a seed."""

from __future__ import annotations

import contextlib
import itertools
import json
import threading
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from random import Random
from typing import Any

import openai

from long_run.answers import Answer, Api, Request, WrongAnswerError
from long_run.wire import chat_answer, completion_answer, native_answer, native_stream

Json = dict[str, Any]

MODEL = "tiny"
_WORDS = (
    "time people water sound place year good sentence great help through line right mean old boy follow want show "
    "small large big even such turn here why land different home move try kind hand picture again change play spell "
    "air animal house point page letter mother answer city story short write please once upon there was"
).split()
_VOCABULARY = range(300, 2000)  # words and parts of words, nothing special
_WEATHER: Json = {
    "type": "object",
    "properties": {
        "city": {"enum": ["Paris", "Rome", "Oslo"]},
        "unit": {"enum": ["celsius", "fahrenheit"]},
        "days": {"type": "integer", "minimum": 1, "maximum": 9},
    },
    "required": ["city", "unit", "days"],
    "additionalProperties": False,
}
_CHOICE: Json = {"type": "object", "properties": {"which": {"enum": ["a", "b"]}}, "required": ["which"]}
_TOOLS = [
    {"type": "function", "function": {"name": name, "description": name, "parameters": parameters}}
    for name, parameters in (("weather", _WEATHER), ("choose", _CHOICE))
]
_BAD: Sequence[tuple[str, Json]] = (
    ("/v1/chat/completions", {"model": MODEL, "messages": []}),
    ("/v1/chat/completions", {"model": MODEL, "messages": [{"role": "stranger", "content": "a"}]}),
    ("/v1/chat/completions", {"model": MODEL, "messages": [{"role": "user", "content": "a"}], "temperature": -1}),
    ("/v1/chat/completions", {"model": MODEL, "messages": [{"role": "user", "content": "a"}], "max_tokens": 1 << 20}),
    ("/v1/chat/completions", {"model": MODEL, "messages": [{"role": "user", "content": "a " * 20000}]}),
    ("/v1/completions", {"model": MODEL, "prompt": 5}),
    ("/v1/completions", {"model": MODEL, "prompt": "a", "max_tokens": "many"}),
    ("/generate", {"input_ids": []}),
    ("/generate", {"text": "a", "sampling_params": {"max_new_tokens": -1}}),
    ("/generate", {"text": "a", "sampling_params": {"regex": "("}}),
    ("/generate", {"sampling_params": {}}),
    ("/generate", {"input_ids": [-1]}),
    ("/generate", {"input_ids": [5, 1 << 20]}),
    ("/generate", {"input_ids": [[5, 6, 7], []]}),
    ("/v1/completions", {"model": MODEL, "prompt": [-1]}),
)
_SLOW_ALTERNATIVES = 24  # of a schema that takes about half a second to compile on one core
_LATE_ABORT_S = 0.5


@dataclass(frozen=True)
class Sizes:
    """Tokens: what a replica's KV cache has room for at start, which the lengths of prompts and answers follow from."""

    capacity_tokens: int


Maker = Callable[[Random, Sizes], Request]


@dataclass(frozen=True)
class Kind:
    """A shape of requests. `weight` is how often it is asked in a burst. Of `is_light` kinds are the quiet times."""

    make: Maker
    weight: int = 1
    is_light: bool = False


def words(chance: Random, count: int) -> str:
    """A prompt of about as many tokens as words."""
    return " ".join(chance.choices(_WORDS, k=count))


def token_ids(chance: Random, count: int) -> list[int]:
    """A prompt of so many tokens, none of them special."""
    return chance.choices(_VOCABULARY, k=count)


def user(text: str) -> list[Json]:
    return [{"role": "user", "content": text}]


def chat(kind: str, messages: Sequence[Json], *, stream: bool = False, may_be_cut: bool = True, **body: Any) -> Request:
    """A greedy chat of a client of OpenAI's library."""

    def call(api: Api) -> Answer:
        return chat_answer(api, {"model": MODEL, "messages": messages, "temperature": 0, **body}, stream=stream)

    return Request(kind, call, may_be_cut=may_be_cut)


def completion(kind: str, prompt: Any, *, stream: bool = False, **body: Any) -> Request:
    def call(api: Api) -> Answer:
        return completion_answer(api, {"model": MODEL, "prompt": prompt, "temperature": 0, **body}, stream=stream)

    return Request(kind, call)


def native(kind: str, body: Json, *, stream: bool = False) -> Request:
    def call(api: Api) -> Answer:
        return native_stream(api, body) if stream else native_answer(api.ask("/generate", body))

    return Request(kind, call)


def _chat(chance: Random, _sizes: Sizes) -> Request:
    return chat("chat", user(words(chance, chance.randrange(4, 30))))


def _chat_stream(chance: Random, _sizes: Sizes) -> Request:
    return chat("chat stream", user(words(chance, chance.randrange(4, 60))), stream=True)


def _chat_turns(chance: Random, _sizes: Sizes) -> Request:
    said = [words(chance, chance.randrange(4, 40)) for _ in range(4)]
    roles = ("system", "user", "assistant", "user")
    messages = [{"role": role, "content": text} for role, text in zip(roles, said, strict=True)]
    return chat("chat turns", messages, stream=chance.random() < 0.5)


def _chat_limit(chance: Random, _sizes: Sizes) -> Request:
    name = chance.choice(("max_tokens", "max_completion_tokens"))
    limit: Json = {name: chance.randrange(8, 90)}
    return chat("chat limit", user(words(chance, chance.randrange(60, 200))), may_be_cut=False, **limit)


def _chat_huge_limit(chance: Random, sizes: Sizes) -> Request:
    """More than even the merged capacity has: SGLang cuts it on arrival."""
    return chat("chat huge limit", user(words(chance, chance.randrange(20, 80))), max_tokens=3 * sizes.capacity_tokens)


def _chat_n(chance: Random, _sizes: Sizes) -> Request:
    messages = user(words(chance, chance.randrange(4, 30)))
    return chat("chat n", messages, stream=chance.random() < 0.5, n=chance.randrange(2, 4))


def _chat_logprobs(chance: Random, _sizes: Sizes) -> Request:
    messages = user(words(chance, chance.randrange(4, 60)))
    return chat("chat logprobs", messages, logprobs=True, top_logprobs=chance.randrange(1, 4))


def _chat_stop(chance: Random, _sizes: Sizes) -> Request:
    messages = user(words(chance, chance.randrange(4, 60)))
    return chat("chat stop", messages, stream=chance.random() < 0.5, stop=chance.sample(["e", "st", " a", "on"], 2))


def _tools(chance: Random, _sizes: Sizes) -> Request:
    return chat("tools", user(words(chance, 20)), stream=chance.random() < 0.5, tools=_TOOLS)


def _tools_required(chance: Random, _sizes: Sizes) -> Request:
    choice = chance.choice(("required", {"type": "function", "function": {"name": "weather"}}))
    messages = user(words(chance, chance.randrange(10, 60)))
    return chat("tools required", messages, stream=chance.random() < 0.5, tools=_TOOLS, tool_choice=choice)


def _tools_turns(chance: Random, _sizes: Sizes) -> Request:
    arguments = json.dumps({"city": "Oslo", "unit": "celsius", "days": chance.randrange(1, 9)})
    asked = {"id": "call_1", "type": "function", "function": {"name": "weather", "arguments": arguments}}
    messages = [
        *user(words(chance, 30)),
        {"role": "assistant", "content": None, "tool_calls": [asked]},
        {"role": "tool", "tool_call_id": "call_1", "content": words(chance, 20)},
    ]
    return chat("tools turns", messages, tools=_TOOLS)


def _schema(chance: Random, _sizes: Sizes) -> Request:
    wanted = {"type": "json_schema", "json_schema": {"name": "weather", "schema": _WEATHER}}
    messages = user(words(chance, chance.randrange(10, 60)))
    return chat("schema", messages, stream=chance.random() < 0.5, response_format=wanted)


def _slow_schema(chance: Random, _sizes: Sizes) -> Request:
    """A grammar that nobody has asked for before, so it has to be compiled."""
    names = [f"a{chance.randrange(10**6)}" for _ in range(_SLOW_ALTERNATIVES)]
    alternatives = [
        {
            "type": "object",
            "properties": {
                name: {"type": "string", "pattern": f"^[a-f]{{1,{chance.randrange(3, 9)}}}-[0-9]{{2,5}}$"},
                "also": {"type": "string", "pattern": f"^[g-k]{{1,{chance.randrange(3, 9)}}}$"},
            },
            "required": [name, "also"],
            "additionalProperties": False,
        }
        for name in names
    ]
    schema = {"anyOf": alternatives}
    plain = chat(
        "slow schema",
        user(words(chance, chance.randrange(10, 150))),
        response_format={"type": "json_schema", "json_schema": {"name": "fresh", "schema": schema}},
    )

    def call(api: Api) -> Answer:
        answer = plain.call(api)
        for choice in answer.choices:
            if choice.finish == "stop" and not set(_object(choice.text)) <= {*names, "also"}:
                raise WrongAnswerError(f"{choice.text[:200]!r} is not as its schema says")
        return answer

    return Request(plain.kind, call, is_known=False)


def _object(text: str) -> Json:
    try:
        value = json.loads(text)
    except ValueError as error:
        raise WrongAnswerError(f"{text[:200]!r} is no JSON: {error}") from error
    if not isinstance(value, dict):
        raise WrongAnswerError(f"{text[:200]!r} is no object")
    return value


def _sampled(chance: Random, _sizes: Sizes) -> Request:
    messages, count = user(words(chance, chance.randrange(10, 80))), chance.randrange(1, 4)
    body = {"model": MODEL, "messages": messages, "temperature": 0.9, "top_p": 0.9, "n": count}

    def call(api: Api) -> Answer:
        answer = chat_answer(api, body, stream=False)
        if len(answer.choices) != count:
            raise WrongAnswerError(f"{len(answer.choices)} answers, and {count} were asked for")
        return answer

    return Request("sampled", call, is_known=False)


def _completion(chance: Random, _sizes: Sizes) -> Request:
    """Without a limit, which is 16 tokens there."""
    return completion("completion", words(chance, chance.randrange(4, 120)), stream=chance.random() < 0.5)


def _completion_batch(chance: Random, _sizes: Sizes) -> Request:
    prompts = [words(chance, chance.randrange(4, 60)) for _ in range(chance.randrange(2, 5))]
    return completion("completion batch", prompts, max_tokens=chance.randrange(8, 50))


def _completion_logprobs(chance: Random, _sizes: Sizes) -> Request:
    prompt = token_ids(chance, chance.randrange(4, 120))
    return completion("completion logprobs", prompt, max_tokens=30, logprobs=2, echo=chance.random() < 0.5)


def _sampling(chance: Random, **options: Any) -> Json:
    return {"temperature": 0, "max_new_tokens": chance.randrange(20, 90), "ignore_eos": True, **options}


def _generate(chance: Random, _sizes: Sizes) -> Request:
    body = {"input_ids": token_ids(chance, chance.randrange(60, 200)), "sampling_params": _sampling(chance)}
    return native("generate", body)


def _generate_stream(chance: Random, _sizes: Sizes) -> Request:
    body = {"input_ids": token_ids(chance, chance.randrange(60, 200)), "sampling_params": _sampling(chance)}
    return native("generate stream", body, stream=True)


def _generate_batch(chance: Random, _sizes: Sizes) -> Request:
    count = chance.randrange(2, 5)
    prompts = [token_ids(chance, chance.randrange(4, 90)) for _ in range(count)]
    body = {"input_ids": prompts, "sampling_params": [_sampling(chance) for _ in range(count)]}
    return native("generate batch", body)


def _generate_logprobs(chance: Random, _sizes: Sizes) -> Request:
    """Of chosen tokens, in a batch with requests that ask for none."""
    chosen = sorted(chance.sample(_VOCABULARY, 3))
    body = {"text": words(chance, 30), "return_logprob": True, "token_ids_logprob": chosen}
    return native("generate logprobs", {**body, "sampling_params": _sampling(chance)})


def _score(chance: Random, _sizes: Sizes) -> Request:
    items = [words(chance, chance.randrange(2, 10)) for _ in range(chance.randrange(1, 4))]
    body = {"model": MODEL, "query": words(chance, 20), "items": items, "label_token_ids": [400, 500]}

    def call(api: Api) -> Answer:
        scores = api.ask("/v1/score", body)["scores"]
        if [len(each) for each in scores] != [2] * len(items):
            raise WrongAnswerError(f"{scores} are no scores of {len(items)} items for 2 tokens")
        return Answer(())

    return Request("score", call, is_known=False)


def _generate_n(chance: Random, _sizes: Sizes) -> Request:
    return native("generate n", {"text": words(chance, 40), "sampling_params": _sampling(chance, n=2)})


def _long_prompt(chance: Random, sizes: Sizes) -> Request:
    """It has to be computed in chunks, and leaves little room beside it."""
    prompt = token_ids(chance, chance.randrange(sizes.capacity_tokens // 2, sizes.capacity_tokens * 2 // 3))
    return native("long prompt", {"input_ids": prompt, "sampling_params": _sampling(chance)})


def _disconnect(chance: Random, _sizes: Sizes) -> Request:
    messages, events = user(words(chance, chance.randrange(10, 100))), chance.randrange(1, 20)

    def call(api: Api) -> Answer:
        create: Any = api.client.chat.completions.create
        with create(model=MODEL, messages=messages, stream=True, extra_body={"ignore_eos": True}) as stream:
            for _ in itertools.islice(stream, events):
                pass
        return Answer(())

    return Request("disconnect", call, is_known=False)


def _impatient(chance: Random, _sizes: Sizes) -> Request:
    """A client that gives up before it has an answer."""
    messages, seconds = user(words(chance, chance.randrange(10, 100))), chance.uniform(0.05, 1.0)

    def call(api: Api) -> Answer:
        create: Any = api.client.with_options(timeout=seconds).chat.completions.create
        with contextlib.suppress(openai.APITimeoutError):
            create(model=MODEL, messages=messages, extra_body={"ignore_eos": True})
        return Answer(())

    return Request("impatient", call, is_known=False)


def _abort(chance: Random, _sizes: Sizes) -> Request:
    rid = uuid.UUID(int=chance.getrandbits(128)).hex
    body = {"input_ids": token_ids(chance, 60), "sampling_params": _sampling(chance, max_new_tokens=400)}
    wait_s = chance.uniform(0.0, _LATE_ABORT_S)

    def call(api: Api) -> Answer:
        abort = threading.Timer(wait_s, lambda: api.post("/abort_request", {"rid": rid}))
        abort.start()
        try:
            answer = native_answer(api.ask("/generate", {**body, "rid": rid}), may_be_aborted=True)
        finally:
            abort.join(api.deadline_s)
        return answer

    return Request("abort", call, is_known=False)


def _bad(chance: Random, _sizes: Sizes) -> Request:
    path, body = chance.choice(_BAD)

    def call(api: Api) -> Answer:
        answer = api.post(path, body)
        if not 400 <= answer.status_code < 500:
            raise WrongAnswerError(f"{path} {json.dumps(body)[:100]} was answered {answer.status_code}")
        return Answer(())

    return Request("bad", call, is_known=False)


KINDS: Mapping[str, Kind] = {
    "chat": Kind(_chat, 4, is_light=True),
    "chat stream": Kind(_chat_stream, 4, is_light=True),
    "chat turns": Kind(_chat_turns, 2, is_light=True),
    "chat limit": Kind(_chat_limit, 3),
    "chat huge limit": Kind(_chat_huge_limit),
    "chat n": Kind(_chat_n, 2, is_light=True),
    "chat logprobs": Kind(_chat_logprobs),
    "chat stop": Kind(_chat_stop, is_light=True),
    "tools": Kind(_tools, 2, is_light=True),
    "tools required": Kind(_tools_required),
    "tools turns": Kind(_tools_turns, is_light=True),
    "schema": Kind(_schema),
    "slow schema": Kind(_slow_schema),
    "sampled": Kind(_sampled),
    "completion": Kind(_completion),
    "completion batch": Kind(_completion_batch, 2),
    "completion logprobs": Kind(_completion_logprobs),
    "generate": Kind(_generate, 3),
    "generate stream": Kind(_generate_stream, 3),
    "generate batch": Kind(_generate_batch, 3),
    "generate logprobs": Kind(_generate_logprobs),
    "score": Kind(_score),
    "generate n": Kind(_generate_n),
    "long prompt": Kind(_long_prompt),
    "disconnect": Kind(_disconnect),
    "impatient": Kind(_impatient),
    "abort": Kind(_abort),
    "bad": Kind(_bad),
}
