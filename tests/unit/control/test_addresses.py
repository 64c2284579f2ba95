"""The addresses of a deployment: messages arrive there."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import pytest
import zmq

from kunserve_sgl.args import KunserveOptions
from kunserve_sgl.control import addresses
from kunserve_sgl.errors import ConfigurationError, TransientError


def options(directory: str, transport: str = "ipc") -> KunserveOptions:
    return KunserveOptions(kunserve_control=transport, kunserve_directory=directory)


@pytest.mark.parametrize("transport", ["ipc", "tcp"])
def test_messages_arrive_at_the_addresses(transport: str) -> None:
    with tempfile.TemporaryDirectory() as directory, zmq.Context() as context:
        mine = options(directory, transport)
        with pytest.raises(TransientError, match="no coordinator has written"):
            addresses.coordinator_address(mine)
        endpoints = []
        sockets = [context.socket(zmq.PULL) for _ in range(3)]
        for pull, address in zip(
            sockets,
            [
                addresses.coordinator_bind_address(mine),
                addresses.inbox_bind_address(mine, 0, 1, 0),
                addresses.inbox_bind_address(mine, 0, 1, 1),
            ],
            strict=True,
        ):
            pull.bind(address)
            endpoints.append(pull.getsockopt_string(zmq.LAST_ENDPOINT))
        addresses.publish_coordinator(mine, endpoints[0])
        assert addresses.coordinator_address(mine) == endpoints[0]
        assert len(set(endpoints)) == 3
        for pull, endpoint in zip(sockets, endpoints, strict=True):
            assert endpoint.startswith("ipc://" + directory if transport == "ipc" else "tcp://127.0.0.1:")
            with context.socket(zmq.PUSH) as push:
                push.connect(endpoint)
                push.send(endpoint.encode())
                assert pull.poll(120_000)
                assert pull.recv() == endpoint.encode()
            pull.close()


def test_what_is_left_of_a_memory_socket_goes_with_its_incarnation(tmp_path: Path) -> None:
    mine = options(str(tmp_path))
    with zmq.Context() as context, context.socket(zmq.ROUTER) as router:
        router.bind(addresses.memory_bind_address(mine, 1, 0, 2))
        addresses.remove_files(mine, 1, 12)
        assert list(tmp_path.iterdir())
    addresses.remove_files(mine, 1, 2)
    assert not list(tmp_path.iterdir())


def test_processes_that_our_launcher_did_not_start_have_no_addresses() -> None:
    with pytest.raises(ConfigurationError, match=r"not started by kunserve_sgl.launch_server"):
        addresses.inbox_bind_address(KunserveOptions(), 0, 0, 0)


def test_the_collectives_meet_in_the_private_directory() -> None:
    assert addresses.collective_store_path(options("/somewhere")) == "/somewhere/collectives"
    with pytest.raises(ConfigurationError):
        addresses.collective_store_path(options(""))


def test_host_copies_are_shared_by_all_who_know_the_directory(tmp_path: Path) -> None:
    mine = options(str(tmp_path))
    addresses.make_host_copies(mine, 2)
    paths = [addresses.host_copy_path(mine, rank) for rank in range(2)]
    descriptors = [int(os.readlink(path).rpartition("/")[2]) for path in paths]
    written = subprocess.run([sys.executable, "-c", f"open({paths[1]!r}, 'r+b').write(b'layers')"], check=True)
    assert written.returncode == 0
    assert [Path(path).read_bytes() for path in paths] == [b"", b"layers"]
    for descriptor in descriptors:
        assert not os.get_inheritable(descriptor)
        os.close(descriptor)
    with pytest.raises(FileNotFoundError):
        Path(paths[1]).read_bytes()


def test_files_of_one_incarnation_are_removed_and_no_others(tmp_path: Path) -> None:
    mine = replace(options(str(tmp_path)), kunserve_incarnation=1)
    again = replace(mine, kunserve_incarnation=11)

    def files(which: KunserveOptions, replica: int) -> set[Path]:
        incarnation = which.kunserve_incarnation
        names = [addresses.frame_socket_path(which, replica, rank, incarnation) for rank in range(2)]
        names += [addresses.inbox_bind_address(which, replica, rank, incarnation) for rank in range(2)]
        names += [
            addresses.requests_bind_address(which, replica, incarnation),
            addresses.rank_store_url(which, replica),
        ]
        return {Path(name.removeprefix("ipc://").removeprefix("file://")) for name in names}

    kept = files(mine, 11) | files(again, 1)
    for path in files(mine, 1) | kept:
        path.touch()
    addresses.remove_files(mine, 1, 1)
    assert set(tmp_path.iterdir()) == kept
    addresses.remove_files(mine, 1, 1)


def test_on_a_network_inboxes_are_at_nodes_of_the_deployment(tmp_path: Path) -> None:
    mine = replace(options(str(tmp_path), "network"), kunserve_host="127.0.0.2")
    assert addresses.inbox_bind_address(mine, 1, 0, 0) == "tcp://127.0.0.2:*"
    hosts = {"10.1.0.1", "127.0.0.2"}
    for address, is_known, is_possible in (
        ("tcp://10.1.0.1:4000", True, True),
        ("tcp://10.1.0.2:4000", False, True),
        ("tcp://10.1.0.1:0", False, False),
        ("tcp://10.1.0.1:4000/", False, False),
        ("tcp://10.1.0.256:4000", False, False),
        ("tcp://0.0.0.0:4000", False, False),
        ("tcp://localhost:4000", False, False),
        ("ipc://10.1.0.1:4000", False, False),
    ):
        assert addresses.is_inbox_address(mine, 1, 0, 0, address, hosts) is is_known
        assert addresses.is_inbox_address(mine, 1, 0, 0, address) is is_possible
    local = options(str(tmp_path), "tcp")
    assert not addresses.is_inbox_address(local, 1, 0, 0, "tcp://10.1.0.1:4000", hosts)
    assert addresses.is_inbox_address(local, 1, 0, 0, "tcp://127.0.0.1:4000", hosts)
