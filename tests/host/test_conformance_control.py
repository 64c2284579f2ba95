"""Control routes under load, while replicas are merged and while they are not: each is answered, nobody ends, and
requests are answered as before."""

from __future__ import annotations

import contextlib
import random
import threading
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from _deployments import FLOAT32, Pair, using
from _http import Endpoint
from _prompts import PROMPTS

from body_fuzz import ROUTES, STATUSES, random_body
from kunserve_sgl.integration.launcher.request_bodies import (
    parse_drop,
    parse_lend,
    parse_plan,
    parse_resize,
    parse_restore,
)
from kunserve_sgl.tiny_model import write_tiny_model
from kunserve_sgl.tiny_model_spec import TinyModelSpec
from waiting import wait_until

pytestmark = [pytest.mark.server, using(FLOAT32)]

REPLICAS = (0, 1)
OK, REFUSED = 200, 400
MERGE = {"groups": [[0, 1]]}
BODIES = 200  # per route, and as many while merged
CLIENTS = 4  # that send them
NEW_TOKENS = 24
LONG_ANSWER = 3500  # takes far longer than a control request
SLOW_STEP_S = 0.1  # with it an answer of 100 tokens takes far longer, too
LOAD_STEP_S = 0.1  # a load of fewer batches is one all the same
RESET = {"action": "reset_tensors"}  # refused by replicas that are busy


def question(text: str, **options: Any) -> dict[str, Any]:
    sampling = {"temperature": 0, "max_new_tokens": NEW_TOKENS, "ignore_eos": True}
    return {"text": text, "sampling_params": sampling, **options}


@contextlib.contextmanager
def state(pair: Pair, merged: bool) -> Iterator[None]:
    if not merged:
        yield
        return
    pair.ours.ask("/kunserve/drop", MERGE)
    try:
        yield
    finally:
        pair.ours.ask("/kunserve/restore", {})


@contextlib.contextmanager
def load(pair: Pair) -> Iterator[None]:
    """Both replicas answer requests all the time, and as the stock server does."""
    expected = {text: pair.stock.ask("/generate", question(text))["output_ids"] for text in PROMPTS}
    ends = threading.Event()
    begun = [threading.Event() for _ in REPLICAS]

    def client(replica: int) -> None:
        order = random.Random(replica)
        while not ends.is_set():
            text = order.choice(PROMPTS)
            answer = pair.ours.ask("/generate", question(text, routed_dp_rank=replica))
            assert answer["output_ids"] == expected[text]
            assert answer["meta_info"]["dp_rank"] == replica
            begun[replica].set()

    with ThreadPoolExecutor(len(REPLICAS)) as threads:
        clients = [threads.submit(client, replica) for replica in REPLICAS]
        try:
            wait_until(lambda: all(e.is_set() for e in begun) or any(c.done() for c in clients), "both answer")
            yield
        finally:
            ends.set()
        for each in clients:
            each.result()


@contextlib.contextmanager
def busy(pair: Pair) -> Iterator[None]:
    """A request runs at each replica all the time, where those of `load` leave moments between them. An update of the
    parameters would wait for it."""
    body = question(PROMPTS[2])
    body["sampling_params"]["max_new_tokens"] = LONG_ANSWER
    streams = [pair.ours.events("/generate", {**body, "routed_dp_rank": replica}) for replica in REPLICAS]
    try:
        for stream in streams:
            next(stream)
        yield
    finally:
        for stream in streams:
            stream.close()


def shape(pair: Pair) -> Any:
    status = pair.ours.get("/kunserve/status").json()
    replicas = [(replica["state"], replica["lost"], replica["capacity_tokens"]) for replica in status["replicas"]]
    return status["epoch"], status["hosts"], status["homes"], replicas


# Path, body, and the status; each of those that are refused ended replicas, or is of the same kind.
REQUESTS: list[tuple[str, Any, int]] = [
    ("/release_memory_occupation", {}, REFUSED),
    ("/release_memory_occupation", {"tags": ["kv_cache"]}, REFUSED),
    ("/resume_memory_occupation", {}, REFUSED),
    ("/resume_memory_occupation", {"tags": ["weights"]}, REFUSED),
    ("/start_expert_distribution_record", None, REFUSED),
    ("/stop_expert_distribution_record", None, REFUSED),
    ("/dump_expert_distribution_record", None, REFUSED),
    ("/slow_down", {"forward_sleep_time": 1e9}, REFUSED),
    ("/set_internal_state", {"server_args": {"pp_max_micro_batch_size": 4.5}}, REFUSED),
    ("/set_internal_state", {"server_args": {"pp_max_micro_batch_size": 0}}, OK),
    ("/configure_logging", {"log_level": "loud"}, REFUSED),
    ("/start_profile", {"profile_by_stage": True}, REFUSED),
    ("/start_profile", {"activities": ["MEM"]}, REFUSED),
    ("/start_profile", {"activities": ["CUDA_PROFILER"]}, REFUSED),
    ("/start_profile", {"profile_id": "no/where"}, REFUSED),
    ("/start_profile", {"output_dir": "/proc/nowhere"}, REFUSED),
    ("/stop_profile", None, REFUSED),
    ("/weights_checker", {"action": "none of them"}, REFUSED),
    ("/weights_checker", RESET, REFUSED),
    ("/update_weights_from_disk", {"model_path": "/nowhere"}, REFUSED),
    ("/update_weights_from_disk", {"model_path": "/nowhere", "load_format": "zip"}, REFUSED),
    ("/update_weights_from_tensor", {"serialized_named_tensors": ["AAAA"]}, REFUSED),
    ("/update_weights_from_distributed", {"names": [], "dtypes": [], "shapes": []}, REFUSED),
    ("/update_weights_from_ipc", {"zmq_handles": {}}, REFUSED),
    (
        "/init_weights_update_group",
        {"master_address": "127.0.0.1", "master_port": 1, "rank_offset": 0, "world_size": 2},
        REFUSED,
    ),
    ("/send_weights_to_remote_instance", {"master_address": "127.0.0.1", "ports": "1"}, REFUSED),
    ("/get_weights_by_name", {"name": "model.layers.99.weight"}, REFUSED),
    ("/pause_generation", {"mode": "none of them"}, REFUSED),
    ("/load_lora_adapter", {"lora_name": "name", "lora_path": "/nowhere"}, REFUSED),
    ("/open_session", {"capacity_of_str_len": -1, "timeout": -1}, OK),
    ("/close_session", {"session_id": "nobody"}, OK),
    ("/freeze_gc", None, OK),
    ("/slow_down", {"forward_sleep_time": -1}, OK),
]


@pytest.mark.parametrize("merged", [False, True], ids=["parted", "merged"])
def test_control_requests_end_nobody(pair: Pair, merged: bool) -> None:
    with state(pair, merged):
        before = shape(pair)
        with load(pair), pair.ours.slowed(LOAD_STEP_S):
            for path, body, status in REQUESTS:
                with busy(pair) if body == RESET else contextlib.nullcontext():
                    answer = pair.ours.post(path, body)
                assert (path, body, answer.status_code) == (path, body, status), answer.text[:500]
        assert shape(pair) == before


PARSERS = {"plan": parse_plan, "drop": parse_drop, "restore": parse_restore, "lend": parse_lend}


def is_refused_by_itself(route: str, body: bytes) -> bool:
    try:
        if route == "kv":
            parse_resize(body, len(REPLICAS))
        else:
            PARSERS[route](body, len(REPLICAS))
    except ValueError:
        return True
    return False


@pytest.mark.parametrize("merged", [False, True], ids=["parted", "merged"])
def test_any_body_is_answered_under_load(pair: Pair, merged: bool) -> None:
    with state(pair, merged):
        before = shape(pair)
        post = pair.ours.post_raw
        with load(pair), pair.ours.slowed(LOAD_STEP_S), ThreadPoolExecutor(CLIENTS) as clients:
            for route in ROUTES:
                chance = random.Random(f"{route} {merged}")
                bodies = [random_body(chance, route) for _ in range(BODIES)]
                asked = [body for body in bodies if route == "plan" or is_refused_by_itself(route, body)]
                for body, answer in zip(asked, clients.map(partial(post, f"/kunserve/{route}"), asked), strict=True):
                    assert answer.status_code in STATUSES - ({OK} if route != "plan" else set()), body[:200]
        assert shape(pair) == before


def test_a_body_that_is_too_large_is_refused(pair: Pair) -> None:
    for body in (b" " * 20_000_000, (b" " * 65_536 for _ in range(40))):
        assert pair.ours.post_raw("/kunserve/drop", body).status_code == 413  # type: ignore[arg-type]


NAMES = (
    *(f"model.layers.{layer}.self_attn.{each}_proj.weight" for layer in range(4) for each in "kv"),
    *(f"model.layers.{layer}.input_layernorm.weight" for layer in range(4)),
    *("model.norm.weight", "model.embed_tokens.weight"),
)


@pytest.mark.parametrize("merged", [False, True], ids=["parted", "merged"])
def test_parameters_are_those_of_stock(pair: Pair, merged: bool) -> None:
    with state(pair, merged):
        for name in NAMES:
            body = {"name": name, "truncate_size": 3}
            expected = pair.stock.ask("/get_weights_by_name", body)
            assert expected
            assert pair.ours.ask("/get_weights_by_name", body) == [expected] * len(REPLICAS)


def test_a_flush_says_what_it_did_at_each_replica(pair: Pair) -> None:
    body = question(PROMPTS[2], routed_dp_rank=0)
    body["sampling_params"]["max_new_tokens"] = 3000
    stream = pair.ours.events("/generate", body)
    next(stream)
    answer = pair.ours.post("/flush_cache")
    assert (answer.status_code, answer.text) == (
        REFUSED, "replica 0: not flushed: 1 requests run and 0 wait\nreplica 1: cache flushed\n",
    )  # fmt: skip
    stream.close()
    assert pair.ours.post("/flush_cache?timeout=60").status_code == OK


def running(endpoint: Endpoint, count: int) -> None:
    endpoint.wait_for_requests_inside(lambda found: found == count, f"{count}")


def test_new_parameters_while_requests_are_paused(pair: Pair) -> None:
    """Retracted requests are computed again; those that keep their memory keep the parameters too."""
    body = question(PROMPTS[3])
    body["sampling_params"]["max_new_tokens"] = 100
    expected = pair.stock.ask("/generate", body)["output_ids"]
    new = {"model_path": str(pair.model)}
    for mode, status in (("in_place", REFUSED), ("retract", OK)):
        with ThreadPoolExecutor(2) as threads:
            with pair.ours.slowed(SLOW_STEP_S):
                asked: list[Future[Any]] = [
                    threads.submit(pair.ours.ask, "/generate", {**body, "routed_dp_rank": replica})
                    for replica in REPLICAS
                ]
                try:
                    running(pair.ours, len(REPLICAS))
                    assert pair.ours.post("/pause_generation", {"mode": mode}).status_code == OK
                    answer = pair.ours.post("/update_weights_from_disk", new)
                    assert answer.status_code == status, answer.text
                finally:
                    assert pair.ours.post("/continue_generation", {}).status_code == OK
            assert [each.result()["output_ids"] for each in asked] == [expected] * len(REPLICAS)
    assert "pause with mode retract" not in answer.text


def test_parameters_of_another_shape_change_nothing(pair: Pair, tmp_path: Path) -> None:
    other = tmp_path / "other"
    write_tiny_model(TinyModelSpec(dtype="float32", hidden=128), other)
    answer = pair.ours.post("/update_weights_from_disk", {"model_path": str(other)})
    assert answer.status_code == REFUSED
    assert f"those of {pair.model} were loaded again" in answer.json()["message"]
    with load(pair), state(pair, merged=True):
        pass


@pytest.mark.parametrize("merged", [False, True], ids=["parted", "merged"])
def test_a_profile(pair: Pair, merged: bool, tmp_path: Path) -> None:
    with state(pair, merged), load(pair):
        assert pair.ours.post("/start_profile", {"num_steps": 1, "output_dir": str(tmp_path)}).status_code == OK
        wait_until(lambda: len(list(tmp_path.glob("*.trace.json.gz"))) == len(REPLICAS), "both have written theirs")
