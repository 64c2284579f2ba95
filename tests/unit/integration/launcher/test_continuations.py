"""Requests of a replica that has ended, in the launcher with SGLang's own states: what is sent again, and what is
dropped."""

from __future__ import annotations

import asyncio
from array import array
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
from sglang.srt.managers import io_struct
from sglang.srt.managers.io_struct import (
    AbortReq,
    BatchEmbeddingOutput,
    BatchStrOutput,
    EmbeddingReqInput,
    GenerateReqInput,
    SessionParams,
    TokenizedEmbeddingReqInput,
    TokenizedGenerateReqInput,
)
from sglang.srt.managers.tokenizer_manager import ReqState, TokenizerManager
from sglang.srt.observability.req_time_stats import APIServerReqTimeStats
from sglang.srt.sampling.sampling_params import SamplingParams
from sglang.utils import TypeBasedDispatcher

from kunserve_sgl.integration.launcher import continuations
from kunserve_sgl.integration.launcher.continuations import MOST_MOVES, MOST_RETURNS, Continuations
from kunserve_sgl.integration.launcher.tokenizer_manager import KunserveTokenizerManager
from kunserve_sgl.integration.messages import (
    ContinuedGenerateReqInput,
    ReplicasAlive,
    RequestsEnded,
    RequestsLost,
    RequestsReturned,
    RequestWaited,
)

PROMPT = array("q", [11, 12, 13])


class Launcher:
    """The tokenizer manager as far as answers come in, without sockets. `sent` is what the controller was sent."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, incremental: bool = False) -> None:
        self.sent: list[Any] = []
        self.due: list[Callable[[], None]] = []
        monkeypatch.setattr(TokenizerManager, "_dispatch_to_scheduler", lambda manager, what: self.sent.append(what))
        made: Any = KunserveTokenizerManager.__new__(KunserveTokenizerManager)
        made.server_args = SimpleNamespace(
            dp_size=2, batch_notify_size=16, speculative_algorithm=None, skip_tokenizer_init=True
        )
        made.rid_to_state, made.child_rid_to_logical_rid, made.logical_rid_to_child_rids = {}, {}, {}
        made.enable_metrics = made.enable_lora = False
        made.skip_tokenizer_init = False
        made.incremental_streaming_output = incremental
        made.dump_requests_folder = made.crash_dump_folder = ""
        made.config_value = lambda name: "v0"
        made.ending = SimpleNamespace(reason=None)
        made.continuations = Continuations(
            made.rid_to_state,
            lambda what: TokenizerManager._dispatch_to_scheduler(made, what),
            made.answer,
            lambda _seconds, call: self.due.append(call),
        )
        self.manager = made

    def ask(self, name: str = "r", stream: bool = True, taken: Any = (), **fields: Any) -> ReqState:
        """Sends a request, before which the controller is sent what is `taken`."""
        sampling = fields.pop("sampling", {"max_new_tokens": 9})
        values: dict[str, Any] = {
            **{"input_text": "", "input_ids": PROMPT, "input_embeds": None, "mm_inputs": None, "token_type_ids": None},
            **{"return_logprob": False, "logprob_start_len": -1, "top_logprobs_num": 0, "token_ids_logprob": None},
            **fields,
        }
        request = TokenizedGenerateReqInput(
            rid=name, stream=stream, sampling_params=SamplingParams(**sampling), **values
        )
        obj = GenerateReqInput(rid=name, input_ids=list(PROMPT), stream=stream)
        for field in ("return_logprob", "top_logprobs_num", "token_ids_logprob"):
            setattr(obj, field, values[field])
        obj.return_text_in_logprobs = False
        return self._send(request, obj, taken)

    def embed(self, name: str = "r") -> ReqState:
        request = TokenizedEmbeddingReqInput(
            rid=name,
            input_text="",
            input_ids=PROMPT,
            mm_inputs=None,
            token_type_ids=None,
            sampling_params=SamplingParams(),
        )
        return self._send(request, EmbeddingReqInput(rid=name, input_ids=list(PROMPT)))

    def _send(self, request: Any, obj: Any, before: Any = ()) -> ReqState:
        stats = APIServerReqTimeStats(disagg_mode=None)
        state = ReqState([], False, asyncio.Event(), obj, stats)
        self.manager.rid_to_state[request.rid] = state
        request.time_stats = stats
        self.manager._dispatch_to_scheduler(request)
        assert self.sent.pop() is request
        for message in before:
            assert self.sent.pop(0) == message
        return state

    def answer(self, name: str, text: str, *tokens: int, so_far: int, finish: Any = None, **fields: Any) -> None:
        """Takes in what a replica has answered. `so_far` counts the tokens with these."""
        values: dict[str, Any] = {field.name: None for field in dataclasses_of(BatchStrOutput)}
        values |= {
            **{"rids": [name], "finished_reasons": [finish], "output_strs": [text], "output_ids": [array("q", tokens)]},
            **{"prompt_tokens": [3], "completion_tokens": [so_far], "reasoning_tokens": [0], "cached_tokens": [2]},
            **{"cached_tokens_details": [{"device": 2, "host": 0}], "retraction_counts": [0], "dp_ranks": [0]},
            **fields,
        }
        asyncio.run(self.manager._handle_batch_output(BatchStrOutput(**values)))

    def lose(self, *names: str, can_go_on: bool = True, has_begun: bool = True) -> None:
        """Lets the replica end that has these."""
        begun = list(names) if has_begun else []
        lost = RequestsLost(names=list(names), begun=begun, reason="replica 1 has ended", can_go_on=can_go_on)
        self.manager._on_requests_lost(lost)

    def give_back(self, *names: str) -> None:
        """Lets a replica give these back."""
        reason = "replica 1 has 9 slots for now, of 20"
        self.manager._on_requests_returned(RequestsReturned(names=list(names), reason=reason))

    def last(self, state: ReqState) -> Any:
        return state.out_list[-1]


def dataclasses_of(struct: Any) -> Any:
    return [SimpleNamespace(name=name) for name in struct.__struct_fields__]


STOPPED = {"type": "stop", "matched": 2}


@pytest.fixture
def launcher(monkeypatch: pytest.MonkeyPatch) -> Launcher:
    return Launcher(monkeypatch)


def test_a_stream_goes_on_from_the_last_token(launcher: Launcher) -> None:
    state = launcher.ask()
    launcher.answer("r", "ab", 1, 2, so_far=2)
    launcher.lose("r")
    (again,) = launcher.sent
    assert isinstance(again, ContinuedGenerateReqInput)
    assert again.rid.startswith("r_")
    assert (list(again.output_ids), list(again.input_ids), again.sampling_params.max_new_tokens) == (
        [1, 2],
        [*PROMPT],
        9,
    )
    assert (again.cached_tokens, again.cached_tokens_details) == (2, {"device": 2, "host": 0})
    # The detokenizer begins with the first token.
    launcher.answer(again.rid, "abc", 3, so_far=3)
    launcher.answer(again.rid, "d", 4, so_far=4, finish=STOPPED)
    out = launcher.last(state)
    assert (out["text"], out["output_ids"]) == ("abcd", [1, 2, 3, 4])
    assert (out["meta_info"]["id"], out["meta_info"]["completion_tokens"]) == ("r", 4)
    assert state.finished
    assert launcher.manager.rid_to_state == launcher.manager.continuations._open == {}
    assert launcher.manager.continuations._client_names == {}


def test_the_controller_is_told_at_once_of_all_that_has_been_answered(launcher: Launcher) -> None:
    """By the names that their last replicas know."""
    for name in "abc":
        launcher.ask(name)
    launcher.lose("a")
    (again,) = launcher.sent
    launcher.sent.clear()
    launcher.answer(again.rid, "x", 1, so_far=1, finish=STOPPED)
    launcher.manager._handle_abort_req(AbortReq(rid="b"))
    (tell,) = launcher.due
    assert launcher.sent == []
    tell()
    (ended,) = launcher.sent
    assert isinstance(ended, RequestsEnded)
    assert ended.names == [again.rid, "b"]
    launcher.answer("c", "x", 1, so_far=1, finish=STOPPED)
    launcher.due[-1]()
    assert launcher.sent[-1].names == ["c"]


def test_a_name_that_is_used_again_is_not_taken_for_the_request_that_has_ended(launcher: Launcher) -> None:
    """The controller, which takes messages in order, would not know what its replica had."""
    launcher.ask("a")
    launcher.answer("a", "x", 1, so_far=1, finish=STOPPED)
    told_before = RequestsEnded(names=["a"])
    again = launcher.ask("a", taken=[told_before])
    for tell in launcher.due:
        tell()
    assert launcher.sent == []
    launcher.answer("a", "x", 1, so_far=1, finish=STOPPED)
    assert again.finished
    launcher.due[-1]()
    assert launcher.sent == [told_before]


@pytest.mark.parametrize("replicas", [1, 2])
def test_without_a_controller_nobody_is_told_of_what_has_ended(monkeypatch: pytest.MonkeyPatch, replicas: int) -> None:
    """The scheduler of a single replica knows no such message, and would end."""
    sent: list[Any] = []

    def init(manager: Any) -> None:
        manager.server_args = SimpleNamespace(dp_size=replicas)
        manager.rid_to_state, manager._result_dispatcher = {}, TypeBasedDispatcher([])
        manager._load_snapshots = SimpleNamespace(on_told=lambda told: None)

    async def answer() -> None:
        manager: Any = KunserveTokenizerManager()
        manager.continuations.on_sent(SimpleNamespace(rid="a"))
        manager.continuations.forget("a")
        await asyncio.sleep(0)  # what is due has its turn
        await asyncio.sleep(0)

    monkeypatch.setattr(TokenizerManager, "__init__", init)
    monkeypatch.setattr(TokenizerManager, "_dispatch_to_scheduler", lambda manager, what: sent.append(what))
    monkeypatch.setattr(continuations, "ENDED_AFTER_S", 0.0)
    asyncio.run(answer())
    assert sent == ([] if replicas == 1 else [RequestsEnded(names=["a"])])


def test_text_that_a_client_has_is_left_out_in_whatever_pieces_it_comes(launcher: Launcher) -> None:
    """The beginning of a text may be held back, as the beginning of a stop text is, or of a character."""
    state = launcher.ask()
    launcher.answer("r", "abc", 1, 2, so_far=2)
    launcher.lose("r")
    name = launcher.sent[0].rid
    for text in ("", "a", "b"):
        launcher.answer(name, text, so_far=2)
    launcher.answer(name, "cd", 3, so_far=3, finish=STOPPED)
    assert launcher.last(state)["text"] == "abcd"


def test_what_the_replica_that_has_ended_sent_and_comes_late_is_dropped(launcher: Launcher) -> None:
    state = launcher.ask()
    launcher.answer("r", "a", 1, so_far=1)
    launcher.lose("r")
    name = launcher.sent[0].rid
    launcher.answer("r", "late", 7, so_far=2)
    launcher.answer(name, "ab", 2, so_far=2)
    launcher.answer("r", "late too", 8, so_far=3, finish=STOPPED)
    launcher.manager._handle_abort_req(AbortReq(rid="r"))
    assert not state.finished
    launcher.answer(name, "c", 3, so_far=3, finish=STOPPED)
    assert (launcher.last(state)["text"], launcher.last(state)["output_ids"]) == ("abc", [1, 2, 3])


def test_increments_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    launcher = Launcher(monkeypatch, incremental=True)
    state = launcher.ask()
    launcher.answer("r", "ab", 1, 2, so_far=2)
    launcher.lose("r")
    launcher.answer(launcher.sent[0].rid, "abc", 3, so_far=3)
    assert (launcher.last(state)["text"], launcher.last(state)["output_ids"]) == ("c", [3])


def test_log_probabilities_are_kept(launcher: Launcher) -> None:
    def of(*values: float, prompt: tuple[float, ...] = ()) -> dict[str, Any]:
        tokens = [[int(-10 * value)] for value in values]
        names = ("token_logprobs", "top_logprobs", "token_ids_logprobs")
        found: dict[str, Any] = {f"input_{name}_{kind}": [list(prompt)] for name in names for kind in ("val", "idx")}
        for name in names:
            found |= {f"output_{name}_val": [list(values)], f"output_{name}_idx": [tokens]}
        return found

    state = launcher.ask(return_logprob=True, logprob_start_len=0, top_logprobs_num=0)
    launcher.answer("r", "ab", 1, 2, so_far=2, **of(-0.1, -0.2, prompt=(-1.0, -2.0)))
    launcher.lose("r")
    (again,) = launcher.sent
    assert again.logprob_start_len == -1
    launcher.answer(again.rid, "abc", 3, so_far=3, finish=STOPPED, **of(-0.3))
    meta = launcher.last(state)["meta_info"]
    assert [value for value, *_ in meta["output_token_logprobs"]] == [-0.1, -0.2, -0.3]
    assert [value for value, *_ in meta["input_token_logprobs"]] == [-1.0, -2.0]


def test_what_had_no_answer_is_sent_as_it_was(launcher: Launcher) -> None:
    launcher.ask("r", logprob_start_len=0)
    embedding = launcher.embed("e")
    launcher.lose("r", "e")
    one, other = launcher.sent
    assert (type(one), list(one.input_ids), list(one.output_ids)) == (ContinuedGenerateReqInput, [*PROMPT], [])
    assert one.logprob_start_len == 0
    assert type(other) is TokenizedEmbeddingReqInput
    values: dict[str, Any] = {field.name: None for field in dataclasses_of(BatchEmbeddingOutput)}
    values |= {"rids": [other.rid], "finished_reasons": [STOPPED], "embeddings": [[1.0]], "prompt_tokens": [3]}
    values |= {"cached_tokens": [0], "retraction_counts": [0]}
    asyncio.run(launcher.manager._handle_batch_output(BatchEmbeddingOutput(**values)))
    assert launcher.last(embedding)["meta_info"]["id"] == "e"


WHOLE = {"return_hidden_states": True}, {"input_embeds": [[1.0]]}, {"return_routed_experts": True}


@pytest.mark.parametrize("fields", WHOLE)
def test_what_only_a_whole_answer_has_begins_anew_where_nobody_has_seen_it(
    launcher: Launcher, fields: dict[str, Any]
) -> None:
    state = launcher.ask(stream=False, **fields)
    launcher.answer("r", "ab", 1, 2, so_far=2)
    launcher.lose("r")
    (again,) = launcher.sent
    assert not again.output_ids
    launcher.answer(again.rid, "xyz", 7, 8, 9, so_far=3, finish=STOPPED)
    assert (launcher.last(state)["text"], launcher.last(state)["output_ids"]) == ("xyz", [7, 8, 9])


def refusal_of(launcher: Launcher, state: ReqState) -> str:
    assert launcher.sent == []
    finish = launcher.last(state)["meta_info"]["finish_reason"]
    assert (finish["type"], finish["status_code"]) == ("abort", 503)
    assert state.finished
    assert launcher.manager.rid_to_state == {}
    message: str = finish["message"]
    return message


@pytest.mark.parametrize(
    ("fields", "why"),
    [
        *[(fields, "its stream has begun, and ") for fields in WHOLE],
        ({"session_params": SessionParams(id="s")}, "what its session had so far was at the replica"),
        ({"mm_inputs": object()}, "its images, audio or video were handed over to the replica"),
    ],
)
def test_what_cannot_go_on_is_answered_with_the_reason(launcher: Launcher, fields: dict[str, Any], why: str) -> None:
    state = launcher.ask(**fields)
    launcher.answer("r", "ab", 1, 2, so_far=2)
    launcher.lose("r")
    message = refusal_of(launcher, state)
    assert message.startswith(f"replica 1 has ended; the request cannot go on elsewhere: {why}")
    # What has been sent stays, also in the last message.
    assert (launcher.last(state)["text"], launcher.last(state)["output_ids"]) == ("ab", [1, 2])


def test_the_last_message_of_increments_repeats_none(monkeypatch: pytest.MonkeyPatch) -> None:
    launcher = Launcher(monkeypatch, incremental=True)
    state = launcher.ask()
    launcher.answer("r", "ab", 1, 2, so_far=2)
    launcher.lose("r", can_go_on=False)
    assert refusal_of(launcher, state) == "replica 1 has ended"
    assert (launcher.last(state)["text"], launcher.last(state)["output_ids"]) == ("", [])


def test_a_request_that_two_replicas_end_with_is_not_tried_again(launcher: Launcher) -> None:
    state = launcher.ask()
    launcher.lose("r")
    name = launcher.sent.pop().rid
    launcher.lose("r")  # what is said twice counts once
    assert not launcher.sent
    assert not state.finished
    launcher.lose(name)
    assert "the request was at 2 replicas when they ended" in refusal_of(launcher, state)


@pytest.mark.parametrize("begun", [(True, False, False, True), (False, True, False, False, True)])
def test_a_replica_that_had_not_begun_with_a_request_does_not_count(
    launcher: Launcher, begun: tuple[bool, ...]
) -> None:
    state = launcher.ask()
    name = "r"
    for has_begun in begun[:-1]:
        launcher.lose(name, has_begun=has_begun)
        name = launcher.sent.pop().rid
        assert not state.finished
    launcher.lose(name, has_begun=begun[-1])
    assert f"the request was at {len(begun)} replicas when they ended" in refusal_of(launcher, state)


def test_nobody_is_tried_for_ever(launcher: Launcher) -> None:
    """What ends a replica before it begins with a request is not known."""
    state = launcher.ask()
    name = "r"
    for _ in range(MOST_MOVES - 1):
        launcher.lose(name, has_begun=False)
        name = launcher.sent.pop().rid
    launcher.lose(name, has_begun=False)
    assert f"the request was at {MOST_MOVES} replicas when they ended" in refusal_of(launcher, state)


@pytest.mark.parametrize("of_all", [False, True])
def test_what_its_client_has_given_up_is_not_sent_again(launcher: Launcher, of_all: bool) -> None:
    state = launcher.ask()
    launcher.ask("other")
    launcher.manager._dispatch_to_scheduler(AbortReq(rid="" if of_all else "r", abort_all=of_all))
    launcher.sent.clear()
    launcher.lose("r", "other", "of nobody")
    assert launcher.last(state)["meta_info"]["finish_reason"]["type"] == "abort"
    assert [again.rid.split("_")[0] for again in launcher.sent] == ([] if of_all else ["other"])


def test_an_abort_after_that_ends_it_by_the_name_that_the_client_knows(launcher: Launcher) -> None:
    state = launcher.ask()
    launcher.lose("r")
    launcher.manager._handle_abort_req(AbortReq(rid=launcher.sent[0].rid))
    assert launcher.last(state)["meta_info"]["id"] == "r"


def test_the_messages_survive_both_ways_of_sending(launcher: Launcher) -> None:
    launcher.ask()
    launcher.answer("r", "ab", 1, 2, so_far=2)
    launcher.lose("r")
    again = launcher.sent[0]
    again.time_stats = None
    read = io_struct.msgpack_decode(io_struct.msgpack_encode(again))
    assert type(read) is ContinuedGenerateReqInput
    assert (read.rid, read.output_ids, read.input_ids, read.cached_tokens) == (again.rid, array("q", [1, 2]), PROMPT, 2)
    lost = RequestsLost(names=["a"], begun=["a"], reason="b", can_go_on=True)
    for message in (lost, RequestWaited(name="a", waited_s=0.5), ReplicasAlive(alive=[0])):
        assert io_struct.msgpack_decode(io_struct.msgpack_encode(message)) == message


def test_what_a_replica_gives_back_goes_on_and_the_controller_knows_that_it_is_there_no_more(
    launcher: Launcher,
) -> None:
    state, other = launcher.ask(routed_dp_rank=1), launcher.ask("other", stream=False)
    launcher.answer("r", "ab", 1, 2, so_far=2)
    launcher.give_back("r", "unknown", "other")
    ended, again, anew = launcher.sent
    assert ended == RequestsEnded(names=["r", "unknown", "other"])
    assert (again.was_returned, again.routed_dp_rank, list(again.output_ids)) == (True, None, [1, 2])
    assert (anew.was_returned, list(anew.output_ids)) == (True, [])
    launcher.answer("r", "abX", 3, so_far=3, finish=STOPPED)
    assert not state.finished, "what comes late under the old name counts no more"
    launcher.answer(again.rid, "abc", 3, so_far=3, finish=STOPPED)
    assert (state.finished, launcher.last(state)["text"], other.finished) == (True, "abc", False)


def test_what_has_waited_for_room_says_so_when_it_is_sent_again(launcher: Launcher) -> None:
    """Whether its replica has lost it or given it back."""
    launcher.ask()
    for name, waited_s in (("r", 20.0), ("unknown", 50.0)):
        launcher.manager._on_request_waited(RequestWaited(name=name, waited_s=waited_s))
    launcher.lose("r")
    again = launcher.sent[-1]
    assert again.waited_s == 20.0
    again.time_stats = None
    assert io_struct.msgpack_decode(io_struct.msgpack_encode(again)).waited_s == 20.0
    launcher.manager._on_request_waited(RequestWaited(name=again.rid, waited_s=45.0))
    launcher.give_back(again.rid)
    assert launcher.sent[-1].waited_s == 45.0


def test_giving_back_is_no_loss(launcher: Launcher) -> None:
    """However often: nothing has ended, so nothing speaks against the request."""
    launcher.ask()
    for _ in range(2 * MOST_MOVES):
        launcher.give_back(launcher.sent[-1].rid if launcher.sent else "r")
    assert len([each for each in launcher.sent if isinstance(each, ContinuedGenerateReqInput)]) == 2 * MOST_MOVES


def test_what_is_given_back_again_and_again_is_taken_in_as_it_is(launcher: Launcher) -> None:
    """Where the controller takes a replica for larger than it is, or nothing more can wait there, it would go to and
    fro without a pause."""
    launcher.ask()
    for _ in range(MOST_RETURNS + 1):
        launcher.give_back(launcher.sent[-1].rid if launcher.sent else "r")
    sent = [each for each in launcher.sent if isinstance(each, ContinuedGenerateReqInput)]
    assert [each.has_waited for each in sent] == [False] * MOST_RETURNS + [True]
