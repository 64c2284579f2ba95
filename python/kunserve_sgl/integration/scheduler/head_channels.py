"""The ways from a scheduler to the head where that may be on another machine: sockets, and what it says of its load."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

from sglang.srt.managers import scheduler as upstream
from sglang.srt.managers.load_snapshot import snapshot_encoder
from sglang.srt.managers.scheduler_components import ipc_channels

from kunserve_sgl.integration.attach.head_sockets import scheduler_ports
from kunserve_sgl.integration.messages import LoadSnapshotTold


class _SnapshotSender:
    """Stands in for SGLang's writer of load snapshots, which writes into shared memory of its machine."""

    def __init__(self, send: Callable[[LoadSnapshotTold], None], publish_interval: int) -> None:
        self._send = send
        self.publish_interval = max(1, publish_interval)
        self.publish_counter = 0

    def write(self, snapshot: Any) -> None:
        self._send(LoadSnapshotTold(snapshot=snapshot_encoder.encode(snapshot)))


@contextlib.contextmanager
def channels_to_head(scheduler: Any, port_args: Any) -> Iterator[Any]:
    """Yields the ports with which SGLang's `scheduler` makes its sockets while this lasts."""
    options = scheduler.server_args
    if not options.is_on_network:
        yield port_args
        return

    def create(*_: Any, publish_interval: int = 1) -> _SnapshotSender:
        return _SnapshotSender(
            lambda told: scheduler.ipc_channels.send_to_tokenizer.send_output(told), publish_interval
        )

    me = scheduler.ps.dp_rank or 0, scheduler.ps.tp_rank
    before, upstream.create_load_snapshot_writer = upstream.create_load_snapshot_writer, create
    try:
        with scheduler_ports(options, ipc_channels, port_args, me) as ports:
            yield ports
    finally:
        upstream.create_load_snapshot_writer = before
