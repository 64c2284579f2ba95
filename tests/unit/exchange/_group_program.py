"""A process for the tests of groups across machines: the store of a coordinator, or a rank that makes groups over it.

The store says its address, and serves until its input ends. A rank makes groups with its peer, sends it numbers, and
says what it has got; or why that was not possible, and after how many seconds.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

import zmq

from kunserve_sgl.args import KunserveOptions
from kunserve_sgl.control import addresses
from kunserve_sgl.control.group_store import group_store_of
from kunserve_sgl.errors import TransientError
from kunserve_sgl.wire.rejections import COORDINATOR, Rejections

REPLICAS = 2


def options_of(directory: str, host: str) -> KunserveOptions:
    return KunserveOptions(
        kunserve_control="network",
        kunserve_remote_attention="message",
        kunserve_directory=directory,
        kunserve_host=host,
    )


def serve(options: KunserveOptions) -> None:
    curve = addresses.curve_of(options, COORDINATOR)
    store = group_store_of(options, curve, Rejections(), REPLICAS)
    assert store is not None
    print(store.address, flush=True)
    poller = zmq.Poller()
    for file in (store.socket, sys.stdin):
        poller.register(file, zmq.POLLIN)
    while store.socket in dict(ready := poller.poll()) or not ready:
        store.serve()


def exchange(options: KunserveOptions, replica: int, address: str, timeout_s: float) -> None:
    import torch

    from kunserve_sgl.exchange.collective_transport import CollectiveTransport
    from kunserve_sgl.exchange.group_store import SocketStore

    curve = addresses.curve_of(options, (replica, 0))
    assert curve is not None
    transport = CollectiveTransport(
        SocketStore(address, curve),
        replica,
        0,
        backend="gloo",
        device=torch.device("cpu"),
        timeout_s=timeout_s,
        host=options.kunserve_host,
    )
    peer = 1 - replica
    began_s = time.monotonic()
    try:
        transport.connect([peer])
    except TransientError as error:
        print(f"refused: {error}", flush=True)
        print(time.monotonic() - began_s, flush=True)
        return
    notes = transport.send(peer, {"x": torch.arange(6.0).reshape(2, 3) + 100 * replica})
    got = transport.expect(peer, notes).take()["x"]
    assert got is not None
    print(got.flatten().tolist(), flush=True)
    sys.stdin.read()


def main() -> None:
    role, directory, host, *rest = sys.argv[1:]
    options = options_of(directory, host)
    assert Path(directory).is_dir()
    if role == "store":
        serve(options)
    else:
        replica, address, timeout_s = rest
        exchange(options, int(replica), address, float(timeout_s))


if __name__ == "__main__":
    main()
