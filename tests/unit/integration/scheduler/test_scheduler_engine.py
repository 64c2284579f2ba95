"""SGLang's scheduler behind the port: what the runtime is told of requests and of the radix cache."""

from __future__ import annotations

import json
import random
from array import array
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from sglang.srt.mem_cache.base_prefix_cache import InsertParams, MatchPrefixParams
from sglang.srt.mem_cache.radix_cache import RadixCache, RadixKey

from kunserve_sgl.errors import ConfigurationError
from kunserve_sgl.integration.scheduler.engine import SglangEngine
from unit.integration.imported import Imported


def engine_of(**scheduler: Any) -> SglangEngine:
    idle = {
        "tree_cache": RadixCache.create_simulated(page_size=1),
        "token_to_kv_pool_allocator": SimpleNamespace(page_size=4),
        "waiting_queue": [],
        "running_batch": SimpleNamespace(reqs=[]),
        "last_batch": None,
        "chunked_req": None,
        "chunked_prefill_size": 64,
        "grammar_manager": SimpleNamespace(grammar_queue=[]),
        "max_running_requests": 4,
        "forward_ct": 7,
        "_engine_paused": False,
    }
    return SglangEngine(SimpleNamespace(**{**idle, **scheduler}), SimpleNamespace(), SimpleNamespace())


def test_a_prompt_in_the_middle_of_its_prefill() -> None:
    """Its chunk that is under way has its slots already, but is no prefix yet."""
    request = SimpleNamespace(full_untruncated_fill_ids=range(500), prefix_indices=range(100), kv_committed_len=200)
    other = SimpleNamespace()
    engine = engine_of(chunked_req=request, waiting_queue=[other])
    now = engine.load_now()
    assert (now.running, now.waiting, now.for_grammar) == ([request], [other], [])
    assert (now.prefill_rest_tokens, now.batches, now.is_paused) == (300, 7, False)
    chunks = 7  # of 64 tokens, for 400
    assert engine.prefill_room_tokens() == 400 + (chunks + 1) * (2 + 1) * 4
    assert engine_of().prefill_room_tokens() == engine_of().load_now().prefill_rest_tokens == 0


def test_a_cache_whose_entries_cannot_be_moved_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="does not support the prefix cache SimpleNamespace"):
        engine_of(tree_cache=SimpleNamespace())


@pytest.mark.parametrize("page_size", [1, 4])
def test_cached_tokens_are_those_that_a_match_finds(page_size: int) -> None:
    chance = random.Random(page_size)
    tree = RadixCache.create_simulated(page_size=page_size)
    prompts = [array("q", [chance.randrange(3) for _ in range(chance.randrange(1, 40))]) for _ in range(40)]
    for prompt in prompts[::2]:
        aligned = len(prompt) // page_size * page_size
        tree.insert(InsertParams(key=RadixKey(prompt[:aligned]), value=torch.arange(aligned)))
    shape = repr(nodes(tree.root_node))
    engine = engine_of(tree_cache=tree)
    counts = [engine.cached_tokens(SimpleNamespace(origin_input_ids=p, extra_key=None)) for p in prompts]
    assert repr(nodes(tree.root_node)) == shape, "asking changed the tree"
    assert counts == [len(tree.match_prefix(MatchPrefixParams(key=RadixKey(p))).device_indices) for p in prompts]
    assert sum(counts) > 0


def nodes(node: Any) -> Any:
    return node.last_access_time, list(node.key or ()), [nodes(child) for child in node.children.values()]


_TWO_RANKS = """
import json, os, sys
from types import SimpleNamespace
import torch
from sglang.srt.mem_cache.radix_cache import RadixCache
from kunserve_sgl.integration.scheduler.engine import SglangEngine

store, long_s, short_s = sys.argv[1], float(sys.argv[2]), float(sys.argv[3])
from_other, to_first = os.pipe()
goes_on, to_other = os.pipe()
rank = 0 if os.fork() else 1
torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
arguments = SimpleNamespace(dist_timeout=long_s)
scheduler = SimpleNamespace(
    tree_cache=RadixCache.create_simulated(page_size=1),
    ps=SimpleNamespace(tp_size=2),
    tp_cpu_group=torch.distributed.group.WORLD,
    server_args=arguments,
)
engine = SglangEngine(scheduler, None, None)
found = [engine.all_ranks(mine[rank]) for mine in ((True, True), (True, False), (False, True), (True, True))]
if rank == 1:
    os.write(to_first, json.dumps(found).encode())
    os.read(goes_on, 1)  # and calls nothing meanwhile
    os._exit(0)
others = json.loads(os.read(from_other, 1000))
arguments.dist_timeout = short_s
try:
    engine.all_ranks(True)
    how = ""
except RuntimeError as error:
    how = str(error)
os.write(to_other, b"x")
os.wait()
print(json.dumps([found, others, how]))
"""


def test_ranks_agree_and_one_that_does_not_come_is_waited_for_until_the_deadline(
    imported: Imported, tmp_path: Path
) -> None:
    found, others, how = json.loads(imported.run(_TWO_RANKS, str(tmp_path / "store"), "600", "0.5"))
    assert found == others == [True, False, False, True]
    assert "timed out" in how.lower()
