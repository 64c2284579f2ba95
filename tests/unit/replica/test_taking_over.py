"""A rank that is started again takes its layers from a peer that serves, with real memory and sockets."""

from __future__ import annotations

import os
import resource
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
import torch
import zmq
from transition_world import (
    FRAME_BYTES,
    IN_PAIRS,
    LAYERS,
    MAX_SLOTS,
    ONE_EACH,
    ONE_MACHINE,
    Model,
    Rank,
    close_backends,
)

from kunserve_sgl.args import KunserveOptions
from kunserve_sgl.control import addresses
from kunserve_sgl.control.addresses import publish_coordinator
from kunserve_sgl.control.messages import Device, LayerLoan, Lend, Wanting
from kunserve_sgl.errors import TransientError
from kunserve_sgl.exchange import memory_reads
from kunserve_sgl.exchange.memory_reads import ReadAnswer, ReadOrder
from kunserve_sgl.exchange.offer_messages import OfferInbox
from kunserve_sgl.exchange.offers import OfferAddress
from kunserve_sgl.memory.errors import RestoreSourceError
from kunserve_sgl.memory.layer_sources import BufferSource
from kunserve_sgl.memory.source_chain import NamedSource
from kunserve_sgl.replica.aside_loans import AsideLoans
from kunserve_sgl.replica.replica_memory import MemoryOptions, ReplicaMemory
from kunserve_sgl.replica.taking_over import _Borrower, take_over
from kunserve_sgl.wire.asking import NOBODY_TO_ASK

ARRIVAL_S = 120.0
SELECT_FILES = 1024


# Which way is chosen, by that in which the lender lends.
_OPTIONS = {
    "mapped": {"kunserve_remote_attention": "map"},
    "read by messages": {"kunserve_remote_attention": "message"},
    "mapped, of both ways": {"kunserve_lacks_access": True},
    "read by messages, of both ways": {"kunserve_lacks_access": True},
}


class Newcomer:
    """Replica 1, started for the third time, and replica 0, which has everything."""

    def __init__(self, directory: Path, timeout_s: float = 60.0, way: str = "mapped") -> None:
        self.maps = way.startswith("mapped")
        machines = IN_PAIRS if "both" in way else ONE_MACHINE if self.maps else ONE_EACH
        self.lender = Rank(directory, replica=0, rank=0, replicas=2, reserve_frames=0, machines=machines)
        self.options = KunserveOptions(
            kunserve_directory=str(directory),
            kunserve_incarnation=2,
            kunserve_lenders=True,
            kunserve_transition_timeout=timeout_s,
            **_OPTIONS[way],
        )
        self.path = self.offer_address(1, 2).address
        self.aside = AsideLoans(self.lender.loans, self.offer_address)
        self.inbox = zmq.Context.instance().socket(zmq.PULL)
        self.inbox.bind(f"ipc://{directory / 'coordinator'}")
        publish_coordinator(self.options, f"ipc://{directory / 'coordinator'}")
        self.memory = ReplicaMemory(MemoryOptions(FRAME_BYTES, 0, 2, MAX_SLOTS), "cpu", 0, 1, "replica 1")
        self.model = Model()
        with torch.no_grad():
            for parameter in self.model.parameters():
                parameter.fill_(float("nan"))
        checksums = [self.lender.parameters.report(layer).checksum for layer in range(LAYERS)]
        self.memory.adopt_parameters(self.model, list(self.model.layers), checksums)
        copies = {layer: self.lender.parameters.region(layer).clone() for layer in range(LAYERS)}
        self.copy = NamedSource("a copy", BufferSource(copies))
        self.failed: list[BaseException] = []
        self._thread = threading.Thread(target=self._take_over)

    def offer_address(self, replica: int, incarnation: int) -> OfferAddress:
        """Where rank 0 takes offers."""
        if self.maps:
            return OfferAddress(addresses.frame_socket_path(self.options, replica, 0, incarnation), maps=True)
        return OfferAddress(addresses.memory_bind_address(self.options, replica, 0, incarnation), maps=False)

    def close(self) -> None:
        self.inbox.close(0)
        lender, backend = self.lender, self.memory.frames.vmm
        vars(self).clear()
        lender.close()
        close_backends([backend])

    def begin(self) -> None:
        self._thread.start()
        assert self.hear() == Wanting(1, 0, incarnation=2)

    def _take_over(self) -> None:
        try:
            take_over(self.memory, self.options, 0, Device())
        except RestoreSourceError as error:
            self.failed.append(error)

    def hear(self) -> Wanting:
        assert self.inbox.poll(1000 * ARRIVAL_S)
        return msgspec.msgpack.decode(self.inbox.recv(), type=Wanting)

    def end(self) -> None:
        assert self.hear() == Wanting(1, 0, is_done=True, incarnation=2)
        self._thread.join(ARRIVAL_S)
        assert not self._thread.is_alive()

    def require_same_model(self) -> None:
        for mine, theirs in zip(self.model.parameters(), self.lender.model.parameters(), strict=True):
            assert torch.equal(mine, theirs)
        snapshot = self.memory.frames.snapshot()
        assert snapshot.parameters == snapshot.total
        self.require_address_free()

    def require_address_free(self) -> None:
        # The socket of the rank that reports for duty has that name.
        if self.maps:
            assert not Path(self.path).exists()
        else:
            OfferInbox(self.path, 0, None).close()


@pytest.fixture(params=_OPTIONS)
def newcomer(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Newcomer]:
    made = Newcomer(tmp_path, way=request.param)
    yield made
    made.close()


def test_all_layers_come_from_a_peer(newcomer: Newcomer, caplog: pytest.LogCaptureFixture) -> None:
    before = newcomer.lender.pool.snapshot()
    newcomer.begin()
    newcomer.aside.on_lend(Lend(4, (LayerLoan(1, 2, tuple(range(LAYERS))),)))
    with caplog.at_level("INFO"):
        while newcomer.aside.is_busy:
            newcomer.aside.advance(is_serving=True)
        newcomer.end()
    newcomer.require_same_model()
    assert f"KunServe: the layers have come from replica 0 ({LAYERS}) in " in caplog.text
    newcomer.aside.on_lend(Lend(4))
    assert newcomer.lender.pool.snapshot() == before


def test_a_coordinator_that_does_not_talk_to_it_ends_the_start(
    newcomer: Newcomer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing can be sent to who has refused a connection, at any time."""

    def send(socket: zmq.Socket[bytes], data: bytes, flags: int = 0) -> None:
        assert flags & zmq.NOBLOCK
        raise zmq.Again

    monkeypatch.setattr(zmq.Socket, "send", send)
    with pytest.raises(TransientError, match=f"cannot be told what is wanted here: {NOBODY_TO_ASK}"):
        take_over(newcomer.memory, newcomer.options, 0, Device())


@pytest.mark.parametrize("fails", [False, True])
def test_a_coordinator_that_stops_talking_to_it_leaves_nothing_open(
    newcomer: Newcomer, fails: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """What had failed before says why the start does."""
    said: list[Wanting] = []

    def send(socket: zmq.Socket[bytes], data: bytes, flags: int = 0) -> None:
        said.append(msgspec.msgpack.decode(data, type=Wanting))
        if said[-1].is_done:
            raise zmq.Again

    def take(borrower: object, patience_s: float) -> Counter[str]:
        if fails:
            raise OSError("the device is gone")
        return Counter()

    monkeypatch.setattr(zmq.Socket, "send", send)
    monkeypatch.setattr(_Borrower, "take_what_is_lent", take)
    error: type[Exception] = OSError if fails else TransientError
    with pytest.raises(error, match="the device is gone" if fails else "cannot be told what is wanted here"):
        take_over(newcomer.memory, newcomer.options, 0, Device())
    assert [wanting.is_done for wanting in said] == [False, True]
    assert ("cannot be told what is wanted here" in caplog.text) is fails
    newcomer.require_address_free()


def test_files_may_have_any_number(newcomer: Newcomer) -> None:
    """select() takes none above 1,023."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    numbers = [os.open(os.devnull, os.O_RDONLY)]
    try:
        while numbers[-1] < SELECT_FILES:
            numbers.append(os.dup(numbers[0]))
        newcomer.begin()
        newcomer.aside.on_lend(Lend(4, (LayerLoan(1, 2, tuple(range(LAYERS))),)))
        newcomer.aside.advance(is_serving=False)
        newcomer.end()
    finally:
        for number in numbers:
            os.close(number)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    newcomer.require_same_model()


def test_a_layer_that_comes_twice_is_taken_once(newcomer: Newcomer) -> None:
    """Another is told to lend all where one of two lenders has died."""
    newcomer.begin()
    newcomer.aside.on_lend(Lend(4, (LayerLoan(1, 2, (0, 1)),)))
    newcomer.aside.advance(is_serving=False)
    newcomer.aside.on_lend(Lend(4))
    newcomer.aside.on_lend(Lend(5, (LayerLoan(1, 2, tuple(range(LAYERS))),)))
    newcomer.aside.advance(is_serving=False)
    newcomer.end()
    newcomer.require_same_model()


def test_bytes_that_are_wrong_come_from_elsewhere(newcomer: Newcomer, caplog: pytest.LogCaptureFixture) -> None:
    newcomer.memory.sources.append(newcomer.copy)
    with torch.no_grad():
        newcomer.lender.model.layers[1].weight[0, 0] += 1
    newcomer.begin()
    newcomer.aside.on_lend(Lend(4, (LayerLoan(1, 2, tuple(range(LAYERS))),)))
    with caplog.at_level("INFO"):
        newcomer.aside.advance(is_serving=False)
        newcomer.end()
    assert f"the layers have come from a copy (1), replica 0 ({LAYERS - 1}) in " in caplog.text
    newcomer.memory.parameters.verify(1)


@pytest.mark.parametrize("stops_at", [0, 1])
def test_a_lender_that_stands_still_is_waited_for_once(
    tmp_path: Path, stops_at: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """At its first chunk or within a layer. All layers come from elsewhere then, and each but the first at once."""
    monkeypatch.setattr(memory_reads, "CHUNK_BYTES", FRAME_BYTES)
    monkeypatch.setattr(memory_reads, "WINDOW_BYTES", FRAME_BYTES)
    newcomer = Newcomer(tmp_path, timeout_s=8.0, way="read by messages")
    goes_on = threading.Event()
    try:
        newcomer.memory.sources.append(newcomer.copy)
        reads, read = newcomer.lender.reads, newcomer.lender.reads.answer

        def stop(order: ReadOrder, payload: memoryview) -> tuple[ReadAnswer, memoryview]:
            if order.start >= stops_at * FRAME_BYTES:
                assert goes_on.wait(ARRIVAL_S)
            return read(order, payload)

        newcomer.lender.service._serve = {**newcomer.lender.service._serve, ReadOrder: stop}
        newcomer.begin()
        newcomer.aside.on_lend(Lend(4, (LayerLoan(1, 2, tuple(range(LAYERS))),)))
        with caplog.at_level("INFO"):
            newcomer.aside.advance(is_serving=False)
            newcomer.end()
        newcomer.require_same_model()
        assert reads.given_bytes.total() == stops_at * FRAME_BYTES
        assert f"the layers have come from a copy ({LAYERS}) in " in caplog.text
        assert caplog.text.count("it has not answered for 2 s") == 1
        assert caplog.text.count("it has not answered before") == LAYERS - 1
    finally:
        goes_on.set()
        newcomer.close()


@pytest.mark.parametrize("has_copy", [True, False])
def test_where_nobody_lends_they_come_from_what_there_is(tmp_path: Path, has_copy: bool) -> None:
    newcomer = Newcomer(tmp_path, timeout_s=0.2)
    try:
        if has_copy:
            newcomer.memory.sources.append(newcomer.copy)
        newcomer.begin()
        newcomer.aside.on_lend(Lend(4, (LayerLoan(1, 2, (2,)),)))
        newcomer.aside.advance(is_serving=False)
        newcomer.end()
        assert bool(newcomer.failed) is not has_copy
        if has_copy:
            newcomer.require_same_model()
    finally:
        newcomer.close()


def test_the_first_layer_may_be_as_late_as_the_controller(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """However short the time for a lender is; what comes after it may be late then."""
    newcomer = Newcomer(tmp_path, timeout_s=0.0)
    try:
        newcomer.memory.sources.append(newcomer.copy)
        with caplog.at_level("INFO"):
            newcomer.begin()
            newcomer.aside.on_lend(Lend(4, (LayerLoan(1, 2, tuple(range(LAYERS))),)))
            newcomer.aside.advance(is_serving=False)
            newcomer.end()
        assert "replica 0 (1)" in caplog.text
        newcomer.require_same_model()
    finally:
        newcomer.close()


def test_nobody_is_asked_where_nobody_lives(newcomer: Newcomer) -> None:
    newcomer.options.kunserve_lenders = False
    newcomer.memory.sources.append(newcomer.copy)
    take_over(newcomer.memory, newcomer.options, 0, Device())
    newcomer.require_same_model()
    assert not newcomer.inbox.poll(0)
