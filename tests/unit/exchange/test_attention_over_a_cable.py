"""Two replicas in two network namespaces that attend for each other and read each other's memory, with keys, over a
cable that is slow, loses packets, or is cut."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch
from test_attention_service import Rank, batches_of, matches

from kunserve_sgl.exchange.memory_reads import PROBE_LOAN, LoanReader, LoanSpan, Silences
from kunserve_sgl.exchange.remote_attention import KvUnreachableError
from kunserve_sgl.memory.errors import TransferError
from kunserve_sgl.wire.curve import Curve, make_keys
from namespaces import Network, two_namespaces
from waiting import wait_until

PORT = 7000  # nobody else is there
LAYERS = 60
BYTES = 3 << 19  # in chunks of two sizes
DELAY_S = 0.005
LOSS = 0.03  # of far fewer packets than a server sends
PATIENCE_S = 60.0
LITTLE_PATIENCE_S = 1.0


@pytest.fixture
def network() -> Iterator[Network]:
    with two_namespaces() as network:
        yield network


class Replica(Rank):
    """A rank on one of the machines. Its sockets are there, whichever thread uses them: ZMQ's own thread, of a context
    that has its first socket there, makes them."""

    def __init__(self, directory: Path, network: Network, member: int) -> None:
        self.curve = Curve(directory / "keys", (member, 0))
        machines = network.first, network.second
        self.ports = [f"tcp://{each.address}:{PORT}" for each in machines]
        with machines[member].inside():
            super().__init__(directory, member, 0, 2, 1, batches_of(2, seed=0), self.ports, self.curve)

    def close(self) -> None:
        super().close()
        self.curve.close()

    def attend_in_layers(self, layers: int) -> torch.Tensor | None:
        """What comes out of the last of so many. KvUnreachableError where an answer is missing."""
        division = self.divide()
        with self.remote.whole() as check:
            for _ in range(layers):
                found = self.attend(division)
            check([found])
        return found

    def read(self, patience_s: float) -> torch.Tensor:
        """Zeros of the other one."""
        here = torch.ones(BYTES, dtype=torch.uint8)
        other = 1 - self.member
        reader = LoanReader(self.ports[other], (other, 0), self.member, PROBE_LOAN, Silences(patience_s), self.curve)
        try:
            for _ in reader.transfer([LoanSpan(0, 0, here)], BYTES):
                pass
        finally:
            reader.close()
        return here


@pytest.fixture
def replicas(tmp_path: Path, network: Network) -> Iterator[list[Replica]]:
    make_keys(tmp_path / "keys", 2, 1)
    with ExitStack() as stack:
        made = []
        for member in range(2):
            made.append(Replica(tmp_path, network, member))
            stack.callback(made[-1].close)
        yield made


def test_a_slow_cable_that_loses_packets_loses_no_answer(network: Network, replicas: list[Replica]) -> None:
    network.cable.set(delay_s=DELAY_S, loss=LOSS)
    with ThreadPoolExecutor(4) as threads:
        attending = [threads.submit(each.attend_in_layers, LAYERS) for each in replicas]
        reading = [threads.submit(each.read, PATIENCE_S) for each in replicas]
        for replica, attended, read in zip(replicas, attending, reading, strict=True):
            assert matches(attended.result(), replica.batch)
            assert not read.result().any()
    frames = network.cable.frames()
    assert frames.lost > 0
    assert frames.passed_on > 2 * LAYERS


def test_a_cable_that_is_cut_ends_with_an_error_and_serves_when_it_is_mended(
    network: Network, replicas: list[Replica]
) -> None:
    for replica in replicas:
        assert matches(replica.attend_in_layers(1), replica.batch)
    asked, home = replicas
    home.others.gate.clear()  # the order comes, and the answer does not go before the cable is cut
    with ThreadPoolExecutor(1) as threads:
        attending = threads.submit(asked.attend_in_layers, 2)
        wait_until(lambda: asked.remote.asked[1] == 2, "it has asked")
        lost = network.cable.set(loss=1.0).lost
        asked.remote._timeout_s = LITTLE_PATIENCE_S
        home.others.gate.set()
        with pytest.raises(KvUnreachableError, match=r"replica \[1\] did not attend to its KV within 1 s"):
            attending.result()
    with pytest.raises(TransferError, match="it has not answered for 1 s"):
        asked.read(LITTLE_PATIENCE_S)
    assert network.cable.frames().lost > lost
    network.cable.set()
    asked.remote._timeout_s = PATIENCE_S
    for replica in replicas:
        assert matches(replica.attend_in_layers(LAYERS), replica.batch)
        assert not replica.read(PATIENCE_S).any()
