"""Requests without room in what is left are answered, wherever they are, and the others go on."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from sglang.srt.managers.io_struct import AbortReq
from sglang.srt.managers.schedule_batch import Req
from sglang.srt.sampling.sampling_params import SamplingParams

from kunserve_sgl.integration.scheduler.making_room import make_room
from kunserve_sgl.integration.scheduler.request_limits import RequestLimits

CAPACITY = 20


class Replica:
    """Where the requests of a scheduler are."""

    page_size = 1
    model_config = SimpleNamespace(context_len=1000)
    last_batch = chunked_req = None

    def __init__(self) -> None:
        self.waiting_queue: list[Req] = []
        self.running_batch = SimpleNamespace(reqs=[])
        self.grammar_manager = SimpleNamespace(grammar_queue=[])
        self.sent: list[AbortReq] = []
        self.ipc_channels = SimpleNamespace(
            send_to_tokenizer=SimpleNamespace(send_output=lambda message, request: self.sent.append(message))
        )
        self.limits = RequestLimits(self)

    def make_room(self) -> int:
        return make_room(self, self.limits, CAPACITY)


def request(name: str, prompt: int, answer: int = 0, most: int = 500) -> Req:
    made = Req(name, "", [1] * prompt, SamplingParams(max_new_tokens=most))
    made.output_ids.extend([2] * answer)
    return made


def test_who_waits_is_answered_at_once_and_who_runs_when_its_batch_has_ended() -> None:
    replica = Replica()
    waits, fits = request("waits", 30), request("fits", 5)
    prefills, retracted = request("prefills", 30), request("retracted", 5, answer=30)
    replica.waiting_queue = [waits, fits, retracted]
    replica.running_batch.reqs = [prefills]
    assert replica.make_room() == 0
    assert [request.rid for request in replica.waiting_queue] == ["fits"]
    assert fits.sampling_params.max_new_tokens == CAPACITY - 5 - 2
    for message, (name, tokens) in zip(replica.sent, (("waits", 30), ("retracted", 35)), strict=True):
        reason: Any = message.finished_reason
        assert (message.rid, reason["type"], int(reason["status_code"])) == (name, "abort", 503)
        assert reason["message"] == (
            f"the request of {tokens} tokens was admitted while there was more memory; {CAPACITY} slots are left"
        )
    assert prefills.to_finish is not None
    assert int(prefills.to_finish.to_json()["status_code"]) == 503
    replica.make_room()
    assert len(replica.sent) == 2, "nobody is answered twice"


def test_an_answer_that_is_longer_ends_with_its_next_token() -> None:
    replica = Replica()
    runs = request("runs", 5, answer=30)
    replica.running_batch.reqs = [runs]
    assert replica.make_room() == 5 + 30 + 2
    assert (runs.to_finish, runs.sampling_params.max_new_tokens) == (None, 31)
    runs.output_ids.append(2)
    runs.update_finish_state()
    assert runs.finished_reason.to_json()["type"] == "length"


def test_a_prompt_without_room_does_not_come_out_of_the_grammar_queue_as_it_was(monkeypatch: Any) -> None:
    replica = Replica()
    waits = request("waits", 30)
    monkeypatch.setattr(Req, "set_finish_with_abort", lambda req, message: setattr(req, "origin_input_ids", [0]))
    replica.grammar_manager.grammar_queue = [waits]
    replica.make_room()
    assert len(waits.origin_input_ids) == 1
    assert waits.to_finish is not None
    assert replica.sent == []
