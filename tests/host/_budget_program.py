"""A program that sizes the KV cache of models as a replica does, of a number of bytes that are said to be left:
`python _budget_program.py BYTES FRAME_BYTES DIRECTORY...`. It prints a line of JSON for each: what has been taken."""

from __future__ import annotations

import json
import os
import sys

import _model_program


def main() -> None:
    left_bytes, frame_bytes, *directories = sys.argv[1:]
    _model_program.attach_to_sglang()
    for directory in directories:
        child = os.fork()  # SGLang's state is the process's
        if child == 0:
            size(directory, int(left_bytes), frame_bytes)
        os.waitpid(child, 0)


def size(directory: str, left_bytes: int, frame_bytes: str) -> None:
    from sglang.srt.mem_cache.kv_cache_configurator import KVCacheConfigurator

    from kunserve_sgl.replica.pieces import activation_bytes

    KVCacheConfigurator._profile_available_bytes = lambda self, pre_model_load_memory: left_bytes
    _model_program.FLAGS = (
        *("--dp-size", "2", "--kunserve", "manual", "--dtype", "float32", "--kunserve-frame-bytes", frame_bytes),
        *("--skip-tokenizer-init", "--context-length", "256", "--log-level", "error"),
    )
    runner = _model_program.load(directory)
    kv, arguments = runner.kunserve_memory.kv, runner.server_args
    sink_and_slots = (1 + kv.granules) * kv.space.granule_slots
    most_tokens = arguments.chunked_prefill_size + runner.max_running_requests
    print(
        json.dumps(
            {
                "model": directory,
                "kv_bytes": sum(kv.mapped_bytes.values()),
                "granule_bytes": sum(kv.mapped_bytes.values()) * kv.space.granule_slots // sink_and_slots,
                "tokens": runner.max_total_num_tokens,
                "slots": kv.granules * kv.space.granule_slots,
                "activation_bytes": activation_bytes(most_tokens, runner.model_config.hidden_size, runner.dtype),
            }
        ),
        flush=True,
    )
    os._exit(0)


main()
