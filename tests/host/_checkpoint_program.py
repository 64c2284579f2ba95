"""Loads models with SGLang, drops every layer and restores it from the checkpoint, in one process forked for each:
`python _checkpoint_program.py FRAME_BYTES DIRECTORY...` Every line begins with the name of the model's directory."""

from __future__ import annotations

import os
import sys
import traceback
from pathlib import Path

import torch


def run(model_path: str, frame_bytes: int) -> None:
    from sglang.benchmark import one_batch
    from sglang.srt.runtime_context import publish
    from sglang.srt.server_args import PortArgs, prepare_server_args

    from kunserve_sgl.errors import ConfigurationError
    from kunserve_sgl.integration.runner.checkpoint_source import CheckpointSource, check_loadable
    from kunserve_sgl.integration.runner.model_runner import decoder_layers
    from kunserve_sgl.memory.errors import RestoreSourceError
    from kunserve_sgl.memory.frame_pool import FramePool
    from kunserve_sgl.memory.layer_parameters import LayerParameters
    from kunserve_sgl.memory.vmm_memfd import MemfdVmm

    def say(*words: object) -> None:
        print(f"{Path(model_path).name}:", *words, flush=True)

    flags = ["--model-path", model_path, "--device", "cpu", "--dtype", "float32", "--max-total-tokens", "512"]
    server_args = prepare_server_args([*flags, "--context-length", "256", "--disable-overlap-schedule"])
    publish(server_args, role="scheduler")
    runner, _ = one_batch.load_model(server_args, PortArgs.init_new(server_args), 0, 0)
    runner = getattr(runner, "torch_runner", runner)
    layers = decoder_layers(runner.model)
    pool = FramePool(MemfdVmm(frame_bytes), "test")
    parameters = LayerParameters(pool)
    reports = parameters.adopt(runner.model, layers)
    source = CheckpointSource(runner.model, layers, runner.loader, runner.model_config)
    # All away at once: a layer must come back without the others.
    for report in reports:
        parameters.drop(report.layer)
    for report in reversed(reports):
        # Both raise where the checksum is not that of loading.
        if report.layer == 0:
            parameters.restore(report.layer, source)
        else:
            parts = parameters.restoring(report.layer, source, part_bytes=4096)
            for _ in range(3):
                next(parts)
            parts.close()
            say("stopped at", parameters.state(report.layer).value)
            say("parts:", sum(1 for _ in parameters.restoring(report.layer, source, part_bytes=4096)))
        parameters.verify(report.layer)
        say("restored", report.layer, *parameters._layers[report.layer].region.tensors())
    with torch.no_grad():
        layers[0].input_layernorm.weight.fill_(1.5)
    parameters.renew_checksum(0)
    parameters.drop(0)
    try:
        parameters.restore(0, source)
    except Exception as error:  # noqa: BLE001 - its type is what is printed
        say("changed weights:", type(error).__name__)
    say("lacks nothing:", source.lacks({report.layer: parameters.tensor_names(report.layer) for report in reports}))
    parameters.drop(1)
    weights = next(Path(model_path).glob("*.safetensors"))
    whole = weights.read_bytes()

    def say_why_not() -> None:
        try:
            parameters.restore(1, source)
        except RestoreSourceError as error:
            say("refused:", error)

    source.forget("somebody sent others")
    say_why_not()
    source.take(runner.loader)
    weights.unlink()
    say_why_not()
    weights.write_bytes(whole[:-1])
    say_why_not()
    source.take(runner.loader)
    say_why_not()
    weights.unlink()
    weights.write_bytes(whole)
    source.take(runner.loader)
    parameters.restore(1, source)
    try:
        check_loadable(layers[1], 1, {"self_attn.scales": torch.zeros(1)})
    except ConfigurationError as error:
        say("refused:", error)


def run_in_a_process(model_path: str, frame_bytes: int) -> bool:
    """Whether all went well in a process of its own, because SGLang's state is the process's."""
    child = os.fork()
    if child:
        _, status = os.waitpid(child, 0)
        return os.waitstatus_to_exitcode(status) == 0
    try:
        run(model_path, frame_bytes)
    except BaseException:  # noqa: BLE001  # whatever it is, it is what is wrong, and this process goes no further
        traceback.print_exc()
        os._exit(1)
    os._exit(0)


def main(frame_bytes: int, *model_paths: str) -> None:
    from sglang.srt.plugins import load_plugins

    load_plugins()
    # What every model needs, once for all.
    import sglang.benchmark.one_batch
    import sglang.srt.models.registry  # noqa: F401

    if not all(run_in_a_process(path, frame_bytes) for path in model_paths):
        sys.exit(1)


if __name__ == "__main__":
    main(int(sys.argv[1]), *sys.argv[2:])
