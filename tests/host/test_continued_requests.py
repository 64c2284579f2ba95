"""A replica that is killed in the middle of answers: others go on with them from the last token, and clients see but a
pause. Answers of all kinds at once, since a server can lose a replica only once."""

from __future__ import annotations

import json
import os
import random
import signal
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import pytest
import requests
from _deployments import TO_LOSE, using
from _http import CALL_DEADLINE_S, Endpoint, Json
from _questions import make_prompt
from _servers import RunningServer

from waiting import wait_until

pytestmark = [pytest.mark.server, using(TO_LOSE)]

LOST = 1
HAS_ENDED = f"replica {LOST} has ended; its requests: "
OTHER_MEMBER = 0
ANSWER_TOKENS = 140
# So far come answers before the kill. One that is not streamed is sent to the launcher 50 tokens at a time.
TOKENS_BEFORE = 60
BATCH_S = 0.1  # until the kill, so that no answer ends before it
SHORTER_BATCH_S = 0.05
LOGPROB_TOLERANCE = 1e-3
CHANCE = random.Random(83)


@dataclass
class Call:
    """What a client asks for, and what it has got so far."""

    path: str
    body: Json
    is_stream: bool
    events: list[Json] = field(default_factory=list)
    has_ended: bool = False

    def make(self, endpoint: Endpoint) -> Json:
        """The answer. That of a stream is its last event, with all texts of an OpenAI stream joined."""
        self.events.clear()
        self.has_ended = False
        if not self.is_stream:
            answer: Json = endpoint.ask(self.path, self.body)
            return answer
        for event in endpoint.events(self.path, self.body):
            self.events.append(event)
        self.has_ended = True
        return self.events[-1] if self.path == "/generate" else {"joined": joined(self.events)}

    @property
    def tokens(self) -> int:
        """Tokens that have come, or events where those do not say."""
        if not self.events:
            return 0
        return int(self.events[-1].get("meta_info", {}).get("completion_tokens", len(self.events)))


def joined(events: list[Json]) -> list[Any]:
    """The text of each choice, its finish reason, and the usage of an OpenAI stream."""
    texts: dict[int, str] = {}
    reasons: dict[int, Any] = {}
    usage: list[Any] = []
    for event in events:
        usage += [event["usage"]] if event.get("usage") else []
        for choice in event["choices"]:
            delta = choice["delta"].get("content") if "delta" in choice else choice["text"]
            texts[choice["index"]] = texts.get(choice["index"], "") + (delta or "")
            reasons[choice["index"]] = choice["finish_reason"] or reasons.get(choice["index"])
    return [sorted(texts.items()), sorted(reasons.items()), usage[-1:]]


def native(stream: bool, prompt: int = 30, *, sampling: Json | None = None, **fields: Any) -> Call:
    parameters = {"temperature": 0, "max_new_tokens": ANSWER_TOKENS, "ignore_eos": True, **(sampling or {})}
    body = {"input_ids": make_prompt(CHANCE, prompt), "sampling_params": parameters, "routed_dp_rank": LOST, **fields}
    return Call("/generate", body, stream)


def completion(stream: bool, **fields: Any) -> Call:
    body = {"model": "m", "prompt": list(make_prompt(CHANCE, 25)), "temperature": 0, "max_tokens": ANSWER_TOKENS}
    options = {"stream_options": {"include_usage": True}} if stream else {}
    return Call("/v1/completions", {**body, "ignore_eos": True, "routed_dp_rank": LOST, **options, **fields}, stream)


def chat(stream: bool, **fields: Any) -> Call:
    messages = [{"role": "user", "content": f"What is {CHANCE.randrange(1000)} and why?"}]
    body = {"model": "m", "messages": messages, "temperature": 0, "max_tokens": ANSWER_TOKENS, "ignore_eos": True}
    options = {"stream_options": {"include_usage": True}} if stream else {}
    return Call("/v1/chat/completions", {**body, "routed_dp_rank": LOST, **options, **fields}, stream)


def logprobs() -> Json:
    return {"return_logprob": True, "logprob_start_len": 3, "top_logprobs_num": 2, "token_ids_logprob": [5, 77]}


_TEXT = {"type": "string", "minLength": 110, "maxLength": 110}
SCHEMA = json.dumps({"type": "object", "properties": {"a": _TEXT}, "required": ["a"]})
CALLS = {
    "stream": native(True),
    "whole": native(False),
    "stream with logprobs": native(True, **logprobs()),
    "whole with logprobs": native(False, **logprobs()),
    "stream with penalties": native(
        True, sampling={"frequency_penalty": 0.3, "presence_penalty": 0.5, "repetition_penalty": 1.2}
    ),
    "whole with penalties": native(False, sampling={"frequency_penalty": 0.4}),
    "regex": native(True, sampling={"regex": "([a-z]{3} ){100}", "ignore_eos": False}),
    "schema": native(False, sampling={"json_schema": SCHEMA, "ignore_eos": False}),
    "hidden states": native(False, return_hidden_states="last"),
    "completion": completion(False, n=2, logprobs=2),
    "completion stream": completion(True),
    "two completions stream": completion(True, n=2),
    "chat": chat(False),
    "chat stream": chat(True, logprobs=True, top_logprobs=2),
}


def comparable(answer: Json) -> Any:
    """What must not differ from an undisturbed answer: all but names, times and who has answered."""
    if "joined" in answer:
        return answer["joined"]
    if "choices" in answer:
        choices = [{name: choice[name] for name in choice if name != "logprobs"} for choice in answer["choices"]]
        return choices, answer["usage"]["prompt_tokens"], answer["usage"]["completion_tokens"]
    meta = answer["meta_info"]
    counts = {name: meta[name] for name in ("finish_reason", "prompt_tokens", "completion_tokens", "cached_tokens")}
    return answer["text"], answer["output_ids"], counts


def numbers(value: Any) -> list[float]:
    """All numbers in an answer's log-probabilities, in order."""
    if isinstance(value, dict):
        return [each for name in sorted(value) for each in numbers(value[name])]
    if isinstance(value, list):
        return [each for inner in value for each in numbers(inner)]
    return [value] if isinstance(value, (int, float)) else []


def logprobs_of(answer: Json) -> Any:
    if "choices" in answer:
        return [choice.get("logprobs") for choice in answer["choices"]]
    meta = answer.get("meta_info", {})
    return {name: meta[name] for name in meta if "logprobs" in name}


def with_ends(endpoint: Endpoint, calls: dict[str, Call]) -> dict[str, Call]:
    """Further calls, whose answers end in the middle of what the first ones answer: by a text across several tokens,
    and by a token that is suppressed until then."""
    whole = calls["whole"].make(endpoint)
    stop = whole["text"][int(len(whole["text"]) * 0.8) :][:6]
    assert whole["text"].find(stop) > len(whole["text"]) / 2, "the text comes too early"
    token = whole["output_ids"][10]
    base = calls["whole"].body
    ends: dict[str, Json] = {
        "stop": {"stop": [stop]},
        "least tokens": {"ignore_eos": False, "stop_token_ids": [token], "min_new_tokens": 110},
    }
    found = {}
    for end, values in ends.items():
        for is_stream in (False, True):
            name = f"{end}, stream {is_stream}"
            # Of prompts that are alike, which one the others find in the cache would be chance.
            body = {**base, "sampling_params": {**base["sampling_params"], **values}, "extra_key": name}
            found[name] = Call("/generate", body, is_stream)
    return found


def make_all(endpoint: Endpoint, calls: dict[str, Call], meanwhile: Callable[[], None]) -> dict[str, Json]:
    """The answers to calls that are made at the same time, during which something happens."""
    with ThreadPoolExecutor(len(calls)) as clients:
        futures = {name: clients.submit(call.make, endpoint) for name, call in calls.items()}
        meanwhile()
        return {name: future.result() for name, future in futures.items()}


def failures(expected: dict[str, Json], found: dict[str, Json]) -> list[str]:
    problems = []
    for name, answer in found.items():
        if comparable(answer) != comparable(expected[name]):
            problems.append(f"{name}:\n  {comparable(answer)}\n  {comparable(expected[name])}")
        one, other = numbers(logprobs_of(answer)), numbers(logprobs_of(expected[name]))
        if len(one) != len(other) or any(abs(a - b) > LOGPROB_TOLERANCE for a, b in zip(one, other, strict=True)):
            problems.append(f"{name}: log-probabilities:\n  {logprobs_of(answer)}\n  {logprobs_of(expected[name])}")
    return problems


@pytest.mark.ends_server
def test_answers_of_a_replica_that_is_killed_go_on_elsewhere(server: RunningServer) -> None:
    """It is merged with another one, whose answers go on too, while a third one serves."""
    endpoint = server.endpoint
    calls = CALLS | with_ends(endpoint, CALLS)
    calls["of the other member"] = native(True)
    calls["of the other member"].body["routed_dp_rank"] = OTHER_MEMBER
    late = native(True)
    endpoint.flush_cache()
    expected = make_all(endpoint, calls, lambda: None)
    late_expected = late.make(endpoint)
    endpoint.flush_cache()
    endpoint.ask("/kunserve/drop", {"groups": [[OTHER_MEMBER, LOST]]})
    compile_grammars(endpoint)
    streams = [call for call in calls.values() if call.is_stream]
    pid = server.scheduler_pid(LOST)
    before: list[bool] = []
    late_answers: list[requests.Response] = []

    def lose_a_replica() -> None:
        wait_until(lambda: all(call.tokens >= TOKENS_BEFORE for call in streams), "all streams have begun")
        os.kill(pid, signal.SIGSTOP)
        before.extend(call.has_ended for call in streams)
        late_answers.append(begin(endpoint, late))
        os.kill(pid, signal.SIGKILL)
        wait_until(lambda: HAS_ENDED in server.log(), "its requests have been sent again")
        endpoint.ask_to_slow_down(None)

    with endpoint.slowed(BATCH_S):
        found = make_all(endpoint, calls, lose_a_replica)
        late_found = last_of(late_answers[0])
    assert not any(before), "answers had ended before the kill"
    assert not (problems := failures(expected, found)), "\n".join(problems)
    assert comparable(late_found) == comparable(late_expected)


@pytest.mark.ends_server
def test_what_a_second_replica_had_not_begun_with_goes_on_at_a_third(server: RunningServer) -> None:
    """Two are killed, one after the other, and the second one has been stopped before it was sent what the first one
    had."""
    endpoint = server.endpoint
    calls = {f"stream {number}": native(True) for number in range(4)} | {f"whole {n}": native(False) for n in range(4)}
    expected = make_all(endpoint, calls, lambda: None)
    endpoint.flush_cache()
    pids = [server.scheduler_pid(replica) for replica in range(3)]
    streams = [call for call in calls.values() if call.is_stream]

    def lose_two() -> None:
        wait_until(lambda: all(call.tokens for call in streams), "all streams have begun")
        for stopped in (0, 2):
            os.kill(pids[stopped], signal.SIGSTOP)
        os.kill(pids[LOST], signal.SIGKILL)
        wait_until(lambda: HAS_ENDED in server.log(), "they have been sent again")
        # The controller has dispatched them: it takes what comes from the launcher in order.
        assert endpoint.post("/kunserve/plan", {"groups": [[0, 2]]}).status_code in (200, 409)
        os.kill(pids[0], signal.SIGKILL)
        wait_until(lambda: "replica 0 has ended; its requests: " in server.log(), "they have been sent once more")
        os.kill(pids[2], signal.SIGCONT)

    with endpoint.slowed(SHORTER_BATCH_S):
        found = make_all(endpoint, calls, lose_two)
    # Which of them had been cached is of no interest here.
    assert {name: answer["output_ids"] for name, answer in found.items()} == {
        name: answer["output_ids"] for name, answer in expected.items()
    }
    assert "is not tried again" not in server.log()


def compile_grammars(endpoint: Endpoint) -> None:
    """Lets the replica that will be lost have the grammars, so that answers with one begin with the others. Those that
    go on with them have to compile them."""
    for name in ("regex", "schema"):
        sampling = {**CALLS[name].body["sampling_params"], "max_new_tokens": 1}
        body = {"input_ids": make_prompt(CHANCE, 5), "sampling_params": sampling, "routed_dp_rank": LOST}
        endpoint.ask("/generate", body)


def begin(endpoint: Endpoint, call: Call) -> requests.Response:
    """A stream whose head has come."""
    body = {**call.body, "stream": True}
    return requests.post(endpoint.base_url + call.path, json=body, stream=True, timeout=CALL_DEADLINE_S)


def last_of(answer: requests.Response) -> Json:
    *_, last, done = [line.removeprefix("data: ") for line in answer.iter_lines(decode_unicode=True) if line]
    assert done == "[DONE]"
    event: Json = json.loads(last)
    return event
