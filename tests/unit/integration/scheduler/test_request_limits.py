"""Limits of answers while the capacity changes: what a smaller one has room for, who is cut, and who is kept."""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sglang.srt.managers import schedule_policy
from sglang.srt.managers.schedule_policy import AddReqResult, PrefillAdder
from sglang.srt.managers.scheduler import Scheduler
from sglang.srt.mem_cache.radix_cache import RadixCache

from kunserve_sgl.integration.runner.elastic_allocator import make_elastic_allocator
from kunserve_sgl.integration.scheduler.known_requests import known_requests
from kunserve_sgl.integration.scheduler.request_limits import RequestLimits


class Request:
    """What limits and admission read of one of SGLang's."""

    def __init__(self, prompt: int, limit: int | None, answer: int = 0, ignore_eos: bool = False) -> None:
        self.rid = f"{prompt} tokens"
        self.origin_input_ids = array("q", [1]) * prompt
        self.output_ids = [2] * answer
        self.sampling_params = SimpleNamespace(max_new_tokens=limit, min_new_tokens=0, ignore_eos=ignore_eos)
        self.finished_reason: Any = None
        self.to_finish: Any = None

    def finished(self) -> bool:
        return self.finished_reason is not None


class Replica:
    """The lists of a scheduler, which the test fills, and SGLang's own limit on arrival."""

    max_new_tokens_limit = None
    server_args = SimpleNamespace(dcp_size=1)

    def __init__(self, capacity: int, page_size: int = 1, context: int = 100_000) -> None:
        self.page_size = page_size
        self.model_config = SimpleNamespace(context_len=context)
        self.waiting_queue: list[Request] = []
        self.running_batch = SimpleNamespace(reqs=[])
        self.last_batch = None
        self.result_queue: list[Any] = []
        self.chunked_req: Request | None = None
        self.grammar_manager = SimpleNamespace(grammar_queue=[])
        self.limits = RequestLimits(self)
        self.set_capacity(capacity)

    def set_capacity(self, tokens: int) -> None:
        self.max_total_num_tokens = tokens
        self.max_req_len = min(self.model_config.context_len - 1, tokens - 1)
        self.max_req_input_len = self.max_req_len - 5

    def arrive(self, request: Request) -> Request:
        self.limits.on_arrival(request)
        Scheduler.init_req_max_new_tokens(self, request)
        self.limits.limit_to_expected(request)
        return request

    @property
    def places(self) -> list[list[Any]]:
        """Where requests may be."""
        in_flight = SimpleNamespace(reqs=[])
        self.result_queue.append((in_flight, None))
        return [self.waiting_queue, self.running_batch.reqs, self.grammar_manager.grammar_queue, in_flight.reqs]


def limit_of(request: Request) -> int:
    limit: int = request.sampling_params.max_new_tokens
    return limit


@pytest.mark.parametrize("place", range(4))
def test_a_request_is_known_wherever_it_waits(place: int) -> None:
    replica = Replica(2000)
    request = replica.arrive(Request(1500, None))
    replica.places[place].append(request)
    assert known_requests(replica).all == [request]
    assert replica.limits.refusal(2000) is None
    assert "a request of 1500 tokens may get 1 more, and 1000 slots would leave room for 0" in str(
        replica.limits.refusal(1000)
    )


def test_a_prompt_in_the_middle_of_its_prefill_is_known_once() -> None:
    replica = Replica(2000)
    replica.chunked_req = replica.arrive(Request(1500, 10))
    replica.last_batch = SimpleNamespace(reqs=[replica.chunked_req])  # type: ignore[assignment]
    known = known_requests(replica)
    assert (known.running, known.waiting, known.for_grammar) == ([replica.chunked_req], [], [])
    assert replica.limits.refusal(1000) is not None


def test_what_nobody_asked_for_is_cut_and_what_was_named_is_kept() -> None:
    replica = Replica(2000)
    unnamed, short, long = (replica.arrive(Request(100, limit)) for limit in (None, 50, 1500))
    assert [limit_of(each) for each in (unnamed, short, long)] == [1898, 50, 1500]
    replica.waiting_queue += [unnamed, short]
    assert replica.limits.refusal(1000) is None
    replica.running_batch.reqs.append(long)
    assert replica.limits.refusal(1000) == (
        "a request of 100 tokens may get 1500 more, and 1000 slots would leave room for 898"
    )
    long.finished_reason = "stop"
    assert replica.limits.refusal(1000) is None
    replica.limits.cut_to(1000)
    assert [limit_of(each) for each in (unnamed, short)] == [898, 50]
    as_in_stock = Replica(1000).arrive(Request(100, None))
    assert limit_of(as_in_stock) == 898


def test_an_answer_keeps_what_its_client_has() -> None:
    """One that is longer than the smaller capacity would allow keeps the slots until it ends."""
    replica = Replica(2000)
    request = replica.arrive(Request(100, None, answer=897))
    replica.running_batch.reqs.append(request)
    assert replica.limits.refusal(1000) is None
    request.output_ids += [2]
    assert replica.limits.refusal(1000) == (
        "a request of 100 tokens may get 899 more, and 1000 slots would leave room for 898"
    )


def test_a_cut_limit_is_no_less_than_the_least_answer() -> None:
    replica = Replica(2000)
    request = Request(100, None)
    request.sampling_params.min_new_tokens = 1200
    replica.waiting_queue.append(replica.arrive(request))
    replica.limits.cut_to(1000)
    assert request.sampling_params.min_new_tokens == limit_of(request) == 898


def test_slots_that_go_at_once_cut_what_was_named_too() -> None:
    replica = Replica(2000)
    named, unnamed, short = (replica.arrive(Request(100, limit)) for limit in (1500, None, 20))
    long_running, long_waiting = (replica.arrive(Request(100, 1500, answer=1000)) for _ in range(2))
    prompt = replica.arrive(Request(1200, 30))
    ended, refused = (replica.arrive(Request(1200, 30)) for _ in range(2))
    ended.finished_reason = refused.to_finish = "abort"
    replica.running_batch.reqs += [named, long_running, prompt, ended, refused]
    replica.waiting_queue += [unnamed, long_waiting, short]
    running = {id(request) for request in replica.running_batch.reqs}
    assert replica.limits.force_to(1000, running) == ([long_running], [prompt, long_waiting])
    assert [limit_of(each) for each in (named, unnamed, short)] == [898, 898, 20]
    assert limit_of(long_running) == 1001, "it ends with its next token"
    long_running.output_ids += [2]
    long_running.finished_reason = "length"
    replica.waiting_queue.remove(long_waiting)
    replica.running_batch.reqs = [named]
    assert replica.limits.refusal(1000) is None


def test_while_slots_are_to_go_requests_are_limited_by_what_will_be_left() -> None:
    replica = Replica(2000)
    replica.limits.expect_capacity(1000)
    assert limit_of(replica.arrive(Request(100, None))) == limit_of(replica.arrive(Request(100, 1500))) == 898
    assert limit_of(replica.arrive(Request(100, 20))) == 20
    assert limit_of(replica.arrive(Request(1200, 500))) == 500, "has no room there anyway: it keeps the slots"
    replica.limits.expect_capacity(None)
    assert limit_of(replica.arrive(Request(100, 1500))) == 1500


@pytest.fixture(autouse=True, scope="module")
def no_context_parallelism() -> Iterator[None]:
    """SGLang's admission asks the configuration of its process for it, and there is no such process here."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("is_dsa_prefill_cp_in_seq_split", "is_prefill_context_parallel_enabled"):
            patch.setattr(schedule_policy, name, lambda: False)
        yield


LIMITS = st.one_of(st.none(), st.integers(0, 3000))


@given(
    page_size=st.sampled_from([1, 4, 16]),
    arrivals=st.lists(
        st.tuples(st.integers(1, 1900), LIMITS, st.integers(0, 1500), st.booleans(), st.integers(0, 3)), max_size=12
    ),
    capacities=st.lists(st.integers(4, 130), min_size=1, max_size=5),
    announced=st.booleans(),
)
def test_whatever_a_smaller_capacity_is_accepted_with_can_run_in_it(
    page_size: int,
    arrivals: list[tuple[int, int | None, int, bool, int]],
    capacities: list[int],
    announced: bool,
) -> None:
    """By SGLang's own admission, in a replica where nothing else runs; and no answer has lost what its client has."""
    replica = Replica(2048, page_size, context=1800)
    places = replica.places
    for prompt, limit, answer, ignore_eos, place in arrivals:
        if prompt >= replica.max_req_input_len:  # refused on arrival
            continue
        request = replica.arrive(Request(prompt, limit, ignore_eos=ignore_eos))
        request.output_ids = [2] * min(answer, max(0, limit_of(request) - 1))
        places[place].append(request)
        if announced:
            replica.limits.expect_capacity(capacities[0] * 16)
    for pages in capacities:
        capacity = pages * 16
        if capacity < replica.max_total_num_tokens:
            if replica.limits.refusal(capacity) is not None:
                continue
            replica.limits.cut_to(capacity)
        replica.set_capacity(capacity)
        for request in known_requests(replica).all:
            assert len(request.output_ids) < max(1, limit_of(request))
            assert admission(request, capacity, page_size) is not AddReqResult.NO_TOKEN


@given(
    page_size=st.sampled_from([1, 4, 16]),
    prompt=st.integers(1, 1900),
    ignore_eos=st.booleans(),
    pages=st.integers(4, 130),
    missing=st.integers(0, 20),
    has_cache=st.booleans(),
)
def test_what_has_come_to_the_end_of_its_room_elsewhere_can_run_with_all_its_tokens(
    page_size: int, prompt: int, ignore_eos: bool, pages: int, missing: int, has_cache: bool
) -> None:
    """Where it takes what there is: it has its whole answer, or nearly, and one more token is computed."""
    capacity = pages * 16
    replica = Replica(capacity, page_size)
    if prompt >= replica.max_req_input_len:  # refused on arrival
        return
    request = replica.arrive(Request(prompt, None, ignore_eos=ignore_eos))
    request.output_ids = [2] * max(0, limit_of(request) - missing)
    assert admission(request, capacity, page_size, has_cache) is not AddReqResult.NO_TOKEN


def admission(request: Request, capacity: int, page_size: int, has_cache: bool = True) -> AddReqResult:
    """What SGLang's prefill says to the request in an empty replica, all of it in one chunk."""
    allocator = make_elastic_allocator(
        capacity, page_size, first_slot=0, device="cpu", dtype=torch.float32, kvcache=None, need_sort=False
    )
    tree = RadixCache.create_simulated(disable=not has_cache, page_size=page_size)
    adder = PrefillAdder(page_size, tree, allocator, SimpleNamespace(reqs=[]), 0.7, 100_000, None)
    tokens = len(request.origin_input_ids) + len(request.output_ids)
    fields: dict[str, Any] = {
        **vars(request),
        "full_untruncated_fill_ids": array("q", [1]) * tokens,
        "prefix_indices": torch.empty(0, dtype=torch.int64),
        "host_hit_length": 0,
        "last_node": tree.root_node,
        "needs_host_load_back": lambda: False,
        "retracted_stain": bool(request.output_ids),
    }
    candidate = SimpleNamespace(**fields)

    def set_extend_range(start: int, stop: int) -> None:
        candidate.extend_range = SimpleNamespace(start=start, end=stop, length=stop - start)

    candidate.set_extend_range = set_extend_range
    result: AddReqResult = adder.add_one_req(candidate, has_chunked_req=False, truncation_align_size=None)
    if result is AddReqResult.NO_TOKEN and adder.can_run_list:
        return AddReqResult.OTHER  # it was taken, and no other would have room beside it
    return result


def test_requests_are_cut_where_slots_have_gone_and_their_answers_allow_it() -> None:
    """The others keep their limit: one that does not fit any more is answered that there is no room."""
    replica = Replica(1000)
    unnamed, named, long_already = Request(100, None), Request(100, 700), Request(100, None, answer=600)
    replica.waiting_queue = [replica.arrive(request) for request in (unnamed, named, long_already)]
    before = limit_of(long_already)
    replica.set_capacity(500)
    replica.limits.cut_where_possible(500)
    assert limit_of(unnamed) == replica.limits.most_new_tokens(500, 100) < 400
    assert limit_of(named) == 700
    assert limit_of(long_already) == before
