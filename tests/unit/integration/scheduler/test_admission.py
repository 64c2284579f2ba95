"""A request that cannot be taken in is answered; what is no fault of the request ends the process, as before."""

from __future__ import annotations

import json
import re
from types import SimpleNamespace
from typing import Any

import dill
import pytest
from sglang.srt.sampling.custom_logit_processor import CustomLogitProcessor

from kunserve_sgl.errors import InvariantError
from kunserve_sgl.integration.scheduler import admission


class FakeReq:
    """Of SGLang's request, what an answer needs."""

    def __init__(self, rid: str, text: Any, ids: Any, sampling: Any, **_: Any) -> None:
        self.rid, self.origin_input_ids, self.reason = rid, ids, ""

    def set_finish_with_abort(self, reason: str) -> None:
        self.origin_input_ids, self.reason = [0], reason


class Halves(CustomLogitProcessor):
    def __call__(self, logits: Any, custom_param_list: Any = None) -> Any:
        return logits


@pytest.fixture
def scheduler(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(admission, "Req", FakeReq)
    made = SimpleNamespace(
        waiting_queue=[],
        grammar_manager=SimpleNamespace(grammar_queue=[]),
        tokenizer=None,
        model_config=SimpleNamespace(vocab_size=2048),
        init_req_max_new_tokens=lambda req: None,
    )
    made._add_request_to_queue = made.waiting_queue.append
    return made


def request(processor: str | None = None) -> Any:
    return SimpleNamespace(rid="r", http_worker_ipc=None, custom_logit_processor=processor)


def raising(error: Exception) -> Any:
    def take_in(_: Any) -> None:
        raise error

    return take_in


@pytest.mark.parametrize("error", [TypeError("no number"), KeyError("id"), ValueError("x"), OverflowError("2**70")])
def test_an_error_of_a_value_is_answered(scheduler: Any, error: Exception) -> None:
    admission.admit(scheduler, request(), raising(error))
    [answered] = scheduler.waiting_queue
    assert (answered.rid, answered.reason) == ("r", f"bad request: {error!r}")


@pytest.mark.parametrize("error", [RuntimeError("device"), InvariantError("frames")])
def test_any_other_error_goes_on(scheduler: Any, error: Exception) -> None:
    with pytest.raises(type(error)):
        admission.admit(scheduler, request(), raising(error))
    assert not scheduler.waiting_queue


@pytest.mark.parametrize("queue", ["waiting", "grammar"])
def test_an_error_after_it_was_taken_in_goes_on(scheduler: Any, queue: str) -> None:
    where = scheduler.waiting_queue if queue == "waiting" else scheduler.grammar_manager.grammar_queue

    def take_in(taken: Any) -> None:
        where.append(taken)
        raise ValueError("too late")

    with pytest.raises(ValueError, match="too late"):
        admission.admit(scheduler, request(), take_in)
    assert len(where) == 1


def test_a_processor_that_can_be_loaded_passes(scheduler: Any) -> None:
    taken: list[Any] = []
    admission.admit(scheduler, request(Halves.to_str()), taken.append)
    assert [each.rid for each in taken] == ["r"]


@pytest.mark.parametrize(
    ("processor", "message"),
    [
        ('{"callable": "00"}', "cannot be loaded \\(UnpicklingError"),
        ('{"callable": "zz"}', "cannot be loaded \\(ValueError"),
        ("[]", "cannot be loaded \\(TypeError"),
        ("nonsense", "cannot be loaded \\(JSONDecodeError"),
        (json.dumps({"callable": dill.dumps(5).hex()}), "cannot be loaded \\(TypeError"),
        (json.dumps({"callable": dill.dumps(dict).hex()}), "a dict, which cannot be called"),
    ],
)
def test_a_processor_that_cannot_be_loaded_is_refused(scheduler: Any, processor: str, message: str) -> None:
    def take_in(_: Any) -> None:
        pytest.fail("it would have ended in a batch with others")

    admission.admit(scheduler, request(processor), take_in)
    [answered] = scheduler.waiting_queue
    assert re.match(f"custom_logit_processor: {message}", answered.reason)


def test_an_empty_prompt_is_refused() -> None:
    empty, full = FakeReq("r", None, [], None), FakeReq("r", None, [5], None)
    admission.refuse_empty(empty)
    admission.refuse_empty(full)
    assert "prompt is empty" in empty.reason
    assert not full.reason
