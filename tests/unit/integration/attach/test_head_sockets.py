"""SGLang's sockets between the head and schedulers on a network: all of them, in one process, as SGLang makes them."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from kunserve_sgl.args import KunserveOptions
from kunserve_sgl.control import addresses
from kunserve_sgl.errors import TransientError
from kunserve_sgl.integration.attach import head_sockets
from unit.integration.imported import Imported

# Makes the sockets of a head and of the schedulers of two replicas. What is said over them is printed; so is whether
# those get anywhere who have no keys, the keys of another deployment, or those of another replica.
PROGRAM = """
import asyncio, json, os, sys, threading
from types import SimpleNamespace
import zmq
from sglang.srt.managers import data_parallel_controller, detokenizer_manager, io_struct, tokenizer_manager
from sglang.srt.managers.io_struct import AbortReq, sock_recv, sock_send
from sglang.srt.managers.load_snapshot import LoadSnapshot, ShmLoadSnapshotReader, shm_path_for
from sglang.srt.managers.scheduler import Scheduler
from sglang.srt.server_args import PortArgs
from kunserve_sgl.args import KunserveOptions
from kunserve_sgl.control import addresses
from kunserve_sgl.integration.attach import head_sockets
from kunserve_sgl.integration.controller.replica_start import requests_socket
from kunserve_sgl.integration.launcher.load_snapshots import LoadSnapshots
from kunserve_sgl.integration.scheduler import head_channels
from kunserve_sgl.wire.rejections import COORDINATOR

LIMIT_MS = 120_000
directory, other_directory = sys.argv[1:]

class Options(KunserveOptions):
    dp_size = 2; tokenizer_worker_num = 1; skip_tokenizer_init = False; enable_dp_attention = False; node_rank = 0
    load_balance_method = "round_robin"

options = Options(kunserve_control="network", kunserve_remote_attention="message", kunserve_directory=directory)
others = Options(kunserve_control="network", kunserve_remote_attention="message", kunserve_directory=other_directory)
for each in (options, others):
    addresses.make_keys(each, 2, 1)
    addresses.publish_coordinator(each, "tcp://127.0.0.1:1")
names = dict.fromkeys(("tokenizer", "scheduler_input", "detokenizer", "rpc", "metrics"), "ipc:///nowhere/at-all")
# What SGLang calls, and all that it asks of its arguments.
ports = PortArgs(**{f"{name}_ipc_name": value for name, value in names.items()}, nccl_port=1,
                 tokenizer_worker_ipc_name=None, decoupled_spec_ipc_config=None,
                 instance_id=f"kunservetest{os.getpid()}")
ports.scheduler_input_ipc_name = f"ipc://{directory}/input"

tokenizer = SimpleNamespace(server_args=options)
def make_tokenizer():
    bound = lambda: tokenizer.recv_from_detokenizer
    with head_sockets.tokenizer_ports(options, tokenizer_manager, ports, bound) as own:
        tokenizer_manager.TokenizerManager.init_ipc_channels(tokenizer, own)
detokenizer = SimpleNamespace()
def make_detokenizer():
    bound = lambda: detokenizer.recv_from_scheduler
    with head_sockets.detokenizer_ports(options, detokenizer_manager, ports, bound) as own:
        detokenizer_manager.DetokenizerManager.init_ipc_channels(detokenizer, own, options)
waiting = threading.Thread(target=make_detokenizer)  # for the tokenizer manager
waiting.start()
make_tokenizer()
waiting.join()
controller = SimpleNamespace(
    server_args=options, context=zmq.Context(), keys=addresses.curve_of(options, COORDINATOR)
)
told = PortArgs(**{**vars(ports)})
head_sockets.enter_head(options, told)
to_tokenizer = head_sockets.make_socket(controller.keys, controller.context, zmq.PUSH, told.tokenizer_ipc_name, False)
inputs = [requests_socket(controller, replica, 0) for replica in (0, 1)]

def scheduler_of(replica, its_options=options, its_input=None):
    scheduler = SimpleNamespace(
        server_args=its_options,
        ps=SimpleNamespace(dp_rank=replica, tp_rank=0, pp_rank=0, attn_tp_rank=0, attn_cp_rank=0, dp_size=2),
    )
    own = PortArgs(**{**vars(told), "scheduler_input_ipc_name": inputs[replica if its_input is None else its_input][1]})
    with head_channels.channels_to_head(scheduler, own) as own:
        Scheduler.init_ipc_channels(scheduler, own)
        scheduler.ports = own
    return scheduler

import sglang.srt.managers.scheduler as upstream
upstream.get_observability = lambda: SimpleNamespace(
    enable_metrics=False, enable_metrics_for_all_schedulers=False, load_snapshot_publish_interval=3)
schedulers = [scheduler_of(replica) for replica in (0, 1)]
said = {}
for replica, scheduler in enumerate(schedulers):
    for socket, _ in inputs:
        socket.setsockopt(zmq.SNDTIMEO, LIMIT_MS)
    sock_send(inputs[replica][0], AbortReq(rid=f"request {replica}"))
    assert scheduler.recv_from_tokenizer.poll(LIMIT_MS)
    said[f"to replica {replica}"] = sock_recv(scheduler.recv_from_tokenizer).rid
    scheduler.ipc_channels.send_to_detokenizer.send_output(AbortReq(rid=f"answer {replica}"))
    assert detokenizer.recv_from_scheduler.poll(LIMIT_MS)
    said[f"to detokenizer {replica}"] = sock_recv(detokenizer.recv_from_scheduler).rid

async def receive():
    assert await tokenizer.recv_from_detokenizer.poll(LIMIT_MS)
    return await io_struct.async_sock_recv(tokenizer.recv_from_detokenizer)

sock_send(detokenizer.send_to_tokenizer, AbortReq(rid="text"))
said["from detokenizer"] = asyncio.run(receive()).rid
sock_send(to_tokenizer, AbortReq(rid="refused"))
said["from controller"] = asyncio.run(receive()).rid
schedulers[1].ipc_channels.send_to_tokenizer.send_output(AbortReq(rid="ended"))
said["from scheduler"] = asyncio.run(receive()).rid
writer = schedulers[1].load_snapshot_writer
said["interval"] = writer.publish_interval
shown = LoadSnapshots(ports.instance_id, 2)
for rank in (1, 9):  # there is no replica 9
    writer.write(LoadSnapshot(dp_rank=rank, num_running_reqs=7))
    shown.on_told(asyncio.run(receive()))
reader = ShmLoadSnapshotReader(shm_path_for(ports.instance_id), 2)
said["loads"] = [(load.dp_rank, load.num_running_reqs) for load in reader.read_all()]
os.unlink(shm_path_for(ports.instance_id))
unused = schedulers[0].ports.rpc_ipc_name, schedulers[0].ports.metrics_ipc_name
said["nobody"] = [os.path.dirname(each) for each in unused]

# Strangers
FAILED = zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL | zmq.EVENT_HANDSHAKE_FAILED_AUTH | zmq.EVENT_DISCONNECTED
places = {"tokenizer": (told.tokenizer_ipc_name, zmq.PUSH), "detokenizer": (told.detokenizer_ipc_name, zmq.PUSH),
          "requests": (inputs[0][1], zmq.PULL)}
def turned_away(address, kind, curve):
    with zmq.Context() as context, context.socket(kind) as socket:
        monitor = socket.get_monitor_socket(FAILED | zmq.EVENT_HANDSHAKE_SUCCEEDED)
        socket.setsockopt(zmq.LINGER, 0)
        if curve is not None:
            curve.call(socket, COORDINATOR)
        socket.connect(address)
        assert monitor.poll(LIMIT_MS)
        event = int.from_bytes(monitor.recv_multipart()[0][:2], "little")
        socket.disable_monitor()
        monitor.close(0)
        return bool(event & FAILED)
said["strangers"] = {
    f"{who} at {where}": turned_away(*place, curve)
    for where, place in places.items()
    for who, curve in (
        ("nobody", None),
        ("another deployment", addresses.curve_of(others, (0, 0))),
        ("another replica", addresses.curve_of(options, (1, 0))),
    )
}
print(json.dumps(said))
"""


@pytest.fixture(scope="module")
def said(imported: Imported, tmp_path_factory: pytest.TempPathFactory) -> dict[str, object]:
    directories = [str(tmp_path_factory.mktemp(name)) for name in ("mine", "other")]
    told = json.loads(imported.run(PROGRAM, *directories).splitlines()[-1])
    return {**told, "directory": directories[0]}


def test_head_and_schedulers_reach_each_other(said: dict[str, object]) -> None:
    for replica in (0, 1):
        assert said[f"to replica {replica}"] == f"request {replica}"
        assert said[f"to detokenizer {replica}"] == f"answer {replica}"
    assert said["from detokenizer"] == "text"
    assert said["from controller"] == "refused"
    assert said["from scheduler"] == "ended"


def test_loads_are_where_sglang_reads_them(said: dict[str, object]) -> None:
    assert said["interval"] == 3
    assert [1, 7] in said["loads"]  # type: ignore[operator]


def test_schedulers_look_for_nobody_outside_their_directory(said: dict[str, object]) -> None:
    assert said["nobody"] == [f"ipc://{said['directory']}"] * 2


def test_who_has_no_key_of_the_deployment_gets_nowhere(said: dict[str, object]) -> None:
    own_ways = {f"another replica at {place}": False for place in ("tokenizer", "detokenizer")}
    turned_away = {
        f"{who} at {where}": True
        for who in ("nobody", "another deployment", "another replica")
        for where in ("tokenizer", "detokenizer", "requests")
    }
    assert said["strangers"] == {**turned_away, **own_ways}


def options(directory: Path, control: str) -> KunserveOptions:
    return KunserveOptions(
        kunserve_control=control, kunserve_remote_attention="message", kunserve_directory=str(directory)
    )


@pytest.mark.parametrize("control", ["ipc", "tcp"])
def test_without_a_network_ports_are_sglangs(tmp_path: Path, control: str) -> None:
    mine, module, ports = options(tmp_path, control), SimpleNamespace(get_zmq_socket=print), object()
    made: Callable[[], None] = lambda: None  # noqa: E731
    for ways in (head_sockets.tokenizer_ports, head_sockets.detokenizer_ports):
        with ways(mine, module, ports, made) as own:
            assert (own, module.get_zmq_socket) == (ports, print)
    with head_sockets.scheduler_ports(mine, module, ports, (0, 0)) as own:
        assert (own, module.get_zmq_socket) == (ports, print)
    assert not list(tmp_path.iterdir())


def test_the_head_is_awaited_with_a_deadline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mine = options(tmp_path, "network")
    ports = SimpleNamespace(tokenizer_ipc_name="", detokenizer_ipc_name="")
    later = threading.Timer(0.2, addresses.publish_on_head, (mine, "detokenizer", "tcp://10.0.0.1:2"))
    later.start()
    addresses.publish_on_head(mine, "tokenizer", "tcp://10.0.0.1:1")
    head_sockets.enter_head(mine, ports)
    assert vars(ports) == {"tokenizer_ipc_name": "tcp://10.0.0.1:1", "detokenizer_ipc_name": "tcp://10.0.0.1:2"}
    monkeypatch.setattr(head_sockets, "_START_DEADLINE_S", 0.1)
    with pytest.raises(TransientError, match=r"no process has written .*missing.address, for 0 s"):
        head_sockets.await_head(lambda: addresses.address_on_head(mine, "missing"))
