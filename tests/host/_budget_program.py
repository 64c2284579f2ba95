"""A program that sizes the KV cache of a model as a replica does, of a number of bytes that are said to be left:
`python _budget_program.py DIRECTORY BYTES FRAME_BYTES`. It prints a line of JSON with what has been taken."""

from __future__ import annotations

import json
import os
import sys

import _model_program


def main() -> None:
    directory, left_bytes, frame_bytes = sys.argv[1], int(sys.argv[2]), sys.argv[3]
    _model_program.attach_to_sglang()
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
