"""Run in a process of its own: loads a model with SGLang, drops every layer and restores it from the checkpoint."""

from __future__ import annotations

import sys

import torch


def main(model_path: str, frame_bytes: int) -> None:
    from sglang.srt.plugins import load_plugins

    load_plugins()
    from sglang.benchmark import one_batch
    from sglang.srt.runtime_context import publish
    from sglang.srt.server_args import PortArgs, prepare_server_args

    from kunserve_sgl.errors import ConfigurationError
    from kunserve_sgl.integration.runner.checkpoint_source import check_loadable, checkpoint_source
    from kunserve_sgl.integration.runner.model_runner import decoder_layers
    from kunserve_sgl.memory.frame_pool import FramePool
    from kunserve_sgl.memory.layer_parameters import LayerParameters
    from kunserve_sgl.memory.vmm_memfd import MemfdVmm

    flags = ["--model-path", model_path, "--device", "cpu", "--dtype", "float32", "--max-total-tokens", "512"]
    server_args = prepare_server_args([*flags, "--context-length", "256", "--disable-overlap-schedule"])
    publish(server_args, role="scheduler")
    runner, _ = one_batch.load_model(server_args, PortArgs.init_new(server_args), 0, 0)
    runner = getattr(runner, "torch_runner", runner)
    layers = decoder_layers(runner.model)
    pool = FramePool(MemfdVmm(frame_bytes), "test")
    parameters = LayerParameters(pool)
    reports = parameters.adopt(runner.model, layers)
    source = checkpoint_source(runner.model, layers, runner.loader, runner.model_config)
    # All away at once: a layer must come back without the others.
    for report in reports:
        parameters.drop(report.layer)
    for report in reversed(reports):
        parameters.restore(report.layer, source)  # raises where the checksum is not that of loading
        parameters.verify(report.layer)
        print("restored", report.layer, *parameters._layers[report.layer].region.tensors(), flush=True)
    with torch.no_grad():
        layers[0].input_layernorm.weight.fill_(1.5)
    parameters.renew_checksum(0)
    parameters.drop(0)
    try:
        parameters.restore(0, source)
    except Exception as error:  # noqa: BLE001 - its type is what is printed
        print("changed weights:", type(error).__name__, flush=True)
    try:
        check_loadable(layers[1], 1, {"self_attn.scales": torch.zeros(1)})
    except ConfigurationError as error:
        print("refused:", error, flush=True)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
