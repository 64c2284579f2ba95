"""The streams to which a scheduler gives work, and waiting for them."""

from __future__ import annotations

from typing import Any

import torch


def wait_for_streams(scheduler: Any) -> None:
    """Waits for what the scheduler's streams were given to do: batches, results on their way to the CPU, and what the
    caller's stream does. It does not wait for the device, which activations that a peer has not received keep busy."""
    if torch.device(scheduler.device).type == "cpu":
        return
    current = scheduler.device_module.current_stream()
    for stream in (current, scheduler.forward_stream, scheduler.copy_stream):
        stream.synchronize()
