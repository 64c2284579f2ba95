"""A rank's end of the sockets: it reports, learns where the others are, and takes orders; rubbish stops nobody."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from random import Random
from types import SimpleNamespace
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
import zmq
from transition_world import LAYERS, NoAttention, Rank, close_backends

from kunserve_sgl.args import Activations, KunserveOptions
from kunserve_sgl.control.addresses import curve_of, make_keys, publish_coordinator
from kunserve_sgl.control.messages import (
    Device,
    FromCoordinator,
    Hello,
    LayerLoan,
    Lend,
    LoadReport,
    Order,
    OrderReply,
    Phase,
    Resize,
    ResizeRefused,
    Result,
    ToCoordinator,
    Welcome,
)
from kunserve_sgl.errors import InvariantError
from kunserve_sgl.exchange.activations import ActivationBuffer
from kunserve_sgl.exchange.attention_work import AttentionShape
from kunserve_sgl.exchange.handover import CollectiveHandover, MappedHandover
from kunserve_sgl.exchange.work import CopySlots
from kunserve_sgl.memory.shared_buffer import SharedBuffer
from kunserve_sgl.policy.demand import ReplicaLoad
from kunserve_sgl.policy.plan import ParameterLoan, Plan, ReplicaFacts, normal_plan
from kunserve_sgl.replica import place as place_module
from kunserve_sgl.replica.link_measuring import Peer
from kunserve_sgl.replica.place import Place, device_of
from kunserve_sgl.replica.replica_memory import make_vmm
from kunserve_sgl.replica.runtime import RankRuntime
from kunserve_sgl.wire.framing import control_message
from kunserve_sgl.wire.rejections import COORDINATOR, UNREADABLE
from message_fuzz import fuzzed

ARRIVAL_S = 120.0


class Coordinator:
    """The sockets of a coordinator."""

    def __init__(self, options: KunserveOptions) -> None:
        make_keys(options, 2, 1)
        self.curve = curve_of(options, COORDINATOR)
        context: zmq.Context[zmq.Socket[bytes]] = zmq.Context.instance() if self.curve is None else self.curve.context
        self.inbox = context.socket(zmq.PULL)
        if self.curve is not None:
            self.curve.listen(self.inbox)
        self.inbox.bind("tcp://127.0.0.1:*")
        self.address = self.inbox.getsockopt_string(zmq.LAST_ENDPOINT)
        self.outbox = context.socket(zmq.PUSH)
        self.outbox.setsockopt(zmq.LINGER, 0)
        if self.curve is not None:
            self.curve.call(self.outbox, (1, 0))

    def take(self) -> ToCoordinator:
        assert self.inbox.poll(int(1000 * ARRIVAL_S)), "nothing has arrived"
        return msgspec.msgpack.decode(self.inbox.recv(), type=ToCoordinator)

    def send(self, message: Any) -> None:
        payload = message if isinstance(message, bytes) else msgspec.msgpack.encode(message)
        self.outbox.send(control_message(payload))

    def close(self) -> None:
        self.inbox.close(0)
        self.outbox.close(0)
        if self.curve is not None:
            self.curve.close()


@pytest.fixture(params=["ipc", "tcp"])
def coordinator(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Coordinator]:
    made = Coordinator(KunserveOptions(kunserve_control=request.param, kunserve_directory=str(tmp_path)))
    yield made
    made.close()


@pytest.fixture
def runtime(tmp_path: Path, coordinator: Coordinator) -> Iterator[RankRuntime]:
    with running(tmp_path, coordinator, replica=1) as made:
        yield made


class SmallAttention(NoAttention):
    def shape(self, layer: int) -> AttentionShape:
        return AttentionShape(1, 1, 8, 8, 8, "float32")


@contextmanager
def running(
    directory: Path, coordinator: Coordinator, replica: int, by: str = "map", **more: Any
) -> Iterator[RankRuntime]:
    parts = directory / "parts"
    parts.mkdir()
    rank = Rank(parts, replica=replica, rank=0, replicas=2, reserve_frames=8)
    options = KunserveOptions(
        kunserve_control="ipc" if coordinator.curve is None else "tcp",
        kunserve_directory=str(directory),
        kunserve_frame_bytes=4096,
        kunserve_order_timeout=5.0,
        kunserve_remote_attention=by,
        **more,
    )
    publish_coordinator(options, coordinator.address)
    place = Place(replica=replica, rank=0, replicas=2, ranks=1, device=torch.device("cpu"))
    made = RankRuntime(place, options, rank.engine, rank.capacity, rank.memory, attention=SmallAttention())
    coordinator.outbox.connect(made.link.address)
    yield made
    made.close()
    if (curve := made.link._curve) is not None:
        curve.close()
    activations = made._activation_vmm
    vars(made).clear()
    close_backends([*rank.close(), activations])


def test_an_order_hangs_that_takes_longer_than_a_batch_may(runtime: RankRuntime) -> None:
    """However long a phase may take that waits for it."""
    now_s = 0.0
    runtime._loans.ending._clock = lambda: now_s
    loan = runtime._loans._lend_parameters("replica 0", 0, 0)
    with runtime._loans.lent.held_bytes(0, loan.loan_id):
        runtime._loans.ending.end(loan)
        now_s = runtime._options.kunserve_order_timeout - 1
        runtime.lend_on(is_serving=False)
        assert runtime.is_lending
        now_s += 1
        with pytest.raises(InvariantError, match="was to end 5 s ago, and an order of a peer is still served under it"):
            runtime.lend_on(is_serving=False)
    runtime.lend_on(is_serving=False)
    assert not runtime.is_lending


def act(runtime: RankRuntime, message: FromCoordinator) -> None:
    """What the scheduler does with a message that rank 0 has taken."""
    runtime.on_payload(msgspec.msgpack.encode(message))


def taken_by(runtime: RankRuntime, done: Callable[[list[FromCoordinator]], bool]) -> list[FromCoordinator]:
    """What it has taken until then; and it acts on that, as the scheduler makes it do."""
    taken: list[FromCoordinator] = []
    deadline_s = time.monotonic() + ARRIVAL_S
    while not done(taken):
        assert time.monotonic() < deadline_s
        runtime.link.poll(50)
        new = runtime.take_orders()
        for payload in new:
            runtime.on_payload(payload)
        taken += [msgspec.msgpack.decode(payload, type=FromCoordinator) for payload in new]
    return taken


def welcome_for(hello: Hello) -> Welcome:
    other = hello.address.replace("inbox-1-0", "inbox-0-0") if hello.address[0] == "i" else "tcp://127.0.0.1:9"
    other_frames = hello.frame_address.replace("frames-1-0", "frames-0-0")
    addresses = ((other,), (hello.address,)), ((other_frames,), (hello.frame_address,))
    return Welcome(*addresses, (0, 0), plan_of(hello.facts, epoch=1))


def plan_of(facts: ReplicaFacts, epoch: int) -> Plan:
    """That of two replicas alike."""
    return normal_plan([replace(facts, replica=0), facts], epoch)


def test_a_rank_says_who_it_is_and_what_it_has(runtime: RankRuntime, coordinator: Coordinator) -> None:
    runtime.report()
    hello = coordinator.take()
    assert isinstance(hello, Hello)
    assert (hello.replica, hello.rank, hello.address) == (1, 0, runtime.link.address)
    assert Path(hello.frame_address).is_socket()
    assert hello.facts.layer_count == len(hello.checksums) == LAYERS
    assert len(set(hello.checksums)) == LAYERS
    assert hello.facts.free_frames == runtime._memory.frames.free_frames > 0
    assert (hello.most_requests, hello.most_tokens) == (4, 68)
    assert hello.device == Device()
    assert 0 < runtime.link.inbox.getsockopt(zmq.MAXMSGSIZE) < 1 << 30
    assert [source.getsockopt(zmq.TYPE) for source in runtime.wake_up_sources()] == [zmq.PULL]


def test_it_matters_on_which_gpu_memory_is_only_where_it_is_mapped(monkeypatch: pytest.MonkeyPatch) -> None:
    """By messages those merge, too, that have no access to each other, and one may come back on another GPU."""
    driver = SimpleNamespace(identity=lambda index: (f"gpu {index}", ("another",)))
    monkeypatch.setattr(place_module, "CudaDriver", lambda: driver)
    ways = [KunserveOptions(kunserve_remote_attention=by) for by in ("map", "message")]
    found = {way.kunserve_remote_attention: device_of(torch.device("cuda", 3), way) for way in ways}
    assert found == {"map": Device("gpu 3", ("another",)), "message": Device()}


def test_the_machine_is_named_by_the_directory_as_it_is_found(tmp_path: Path) -> None:
    one, other, link = tmp_path / "one", tmp_path / "other", tmp_path / "link"
    one.mkdir()
    other.mkdir()
    link.symlink_to(one)
    options = [KunserveOptions(kunserve_lacks_access=True, kunserve_directory=str(each)) for each in (one, other, link)]
    first, second, third = (device_of(torch.device("cpu"), each) for each in options)
    assert first.maps(third)
    assert not first.maps(second)
    one.rmdir()
    with pytest.raises(FileNotFoundError):
        device_of(torch.device("cpu"), options[0])


@pytest.mark.parametrize("coordinator", ["ipc"], indirect=True)
@pytest.mark.parametrize("maps", [True, False])
def test_offers_go_to_a_peer_in_the_way_that_the_coordinator_says(
    tmp_path: Path, coordinator: Coordinator, maps: bool
) -> None:
    """Of each incarnation by itself: one that starts is lent to before everybody is told of it."""
    with running(tmp_path, coordinator, replica=1, by="auto", kunserve_lacks_access=True) as made:
        frames, memory = f"{tmp_path}/frames-0-0-", f"ipc://{tmp_path}/memory-0-0-"
        assert made.access.offers_at(0, 0) == (f"{memory}0", False)
        made.report()
        hello = coordinator.take()
        assert isinstance(hello, Hello)
        assert Path(hello.frame_address).is_socket()
        welcome = msgspec.structs.replace(welcome_for(hello), activations=Activations.COLLECTIVE, maps=(maps, True))
        made.access.meet(welcome, [])
        made.access.learn_of_borrowers(Lend(1, (LayerLoan(0, 1, (0,), maps=not maps),)))
        made.access.meet(welcome, [])
        assert made.access.offers_at(0, 0) == ((f"{frames}0", True) if maps else (f"{memory}0", False))
        assert made.access.offers_at(0, 1) == ((f"{memory}1", False) if maps else (f"{frames}1", True))
        report = made.access.report((0, 0))
        assert (report["by"], report["peers"]) == ("auto", {"0": "map" if maps else "message"})


@pytest.fixture
def hello(runtime: RankRuntime, coordinator: Coordinator) -> Hello:
    """What the rank has reported."""
    runtime.report()
    said = coordinator.take()
    assert isinstance(said, Hello)
    return said


@pytest.mark.parametrize("coordinator", ["ipc"], indirect=True)
def test_nothing_that_a_rank_has_started_outlives_it(tmp_path: Path, coordinator: Coordinator) -> None:
    """Neither what serves its memory, nor a link that is being measured."""
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context.instance()
    silent = context.socket(zmq.ROUTER)
    silent.bind(f"ipc://{tmp_path}/silent")
    before = set(threading.enumerate())
    with running(tmp_path, coordinator, replica=0, by="message") as made:
        made.access._links.meet([Peer(1, 0, f"ipc://{tmp_path}/silent")])
        assert silent.poll(int(1000 * ARRIVAL_S)), "it has not asked"
        started = {thread.name for thread in set(threading.enumerate()) - before}
        assert started >= {"kunserve-memory", "kunserve-links"}
    silent.close(0)
    assert not [thread for thread in set(threading.enumerate()) - before if thread.is_alive()]


def test_welcome_then_orders_and_rubbish_between(runtime: RankRuntime, coordinator: Coordinator, hello: Hello) -> None:
    welcome = welcome_for(hello)
    order = Order(5, Phase.PREPARE, 9, plan_of(hello.facts, epoch=10), 10.0)
    for message in (welcome, b"\xc1", b"", msgspec.msgpack.encode({"type": "order"}), order):
        coordinator.send(message)
    assert taken_by(runtime, lambda taken: len(taken) == 2) == [welcome, order]
    assert runtime.rejections.counts == {UNREADABLE: 3}
    assert not runtime.is_merged
    reply = coordinator.take()
    assert isinstance(reply, OrderReply)
    assert (reply.replica, reply.rank, reply.result) == (1, 0, Result.REFUSED)
    assert reply.reason == "the plan here has epoch 1, not 9"
    assert not runtime.is_in_transition
    assert runtime.longest_sleep_ms is None


def test_a_later_welcome_brings_a_later_plan(runtime: RankRuntime, coordinator: Coordinator, hello: Hello) -> None:
    welcome = welcome_for(hello)
    later = msgspec.structs.replace(welcome, plan=plan_of(hello.facts, epoch=4))
    for message in (welcome, later, Order(5, Phase.PREPARE, 4, plan_of(hello.facts, epoch=5), 10.0)):
        coordinator.send(message)
    taken_by(runtime, lambda taken: len(taken) == 3)
    assert runtime.is_in_transition
    assert runtime.is_merged
    assert runtime.longest_sleep_ms == 1
    runtime.at_boundary(is_serving=False)
    reply = coordinator.take()
    assert isinstance(reply, OrderReply)
    assert (reply.phase, reply.result) == (Phase.PREPARE, Result.APPLIED)


def test_an_order_before_any_welcome_is_refused_at_once(
    runtime: RankRuntime, coordinator: Coordinator, hello: Hello
) -> None:
    coordinator.send(Order(1, Phase.PREPARE, 10**9, plan_of(hello.facts, epoch=10**9 + 1), 10.0))
    taken_by(runtime, bool)
    reply = coordinator.take()
    assert isinstance(reply, OrderReply)
    assert (reply.result, reply.reason) == (Result.REFUSED, "there is no plan here yet")


def test_what_is_not_believed(runtime: RankRuntime, coordinator: Coordinator, hello: Hello) -> None:
    welcome = welcome_for(hello)
    act(runtime, welcome)
    order = Order(5, Phase.PREPARE, 1, plan_of(hello.facts, epoch=2), 10.0)
    replaced = msgspec.structs.replace
    two = replace(order.plan, hosts=((1,) * LAYERS,) * 2)
    bad = (
        replaced(order, plan=plan_of(hello.facts, epoch=500)),
        replaced(order, transition=-1),
        replaced(order, timeout_s=float("nan")),
        replaced(order, timeout_s=1e300),
        replaced(order, plan=replace(two, resident=(tuple(range(LAYERS)), ()))),
        replaced(order, plan=replace(order.plan, extents=order.plan.extents[:1])),
        replaced(order, plan=replace(order.plan, extents=tuple(replace(e, granules=1) for e in order.plan.extents))),
        replaced(welcome, plan=replace(welcome.plan, epoch=-1)),
        replaced(welcome, plan=replace(welcome.plan, hosts=welcome.plan.hosts * 2)),
        replaced(welcome, activations=Activations.AUTO),
        replaced(welcome, inboxes=welcome.inboxes[:1]),
        replaced(welcome, incarnations=(0,)),
        replaced(welcome, incarnations=(3, 0)),  # its frame socket is another one's
        replaced(welcome, inboxes=(welcome.inboxes[0], ("tcp://10.0.0.1:80",))),
        replaced(welcome, frame_addresses=(("/elsewhere",), welcome.frame_addresses[1])),
    )
    for message in bad:
        assert not runtime._orders.believed(msgspec.msgpack.encode(message), None), message
    for sender in ((0, 0), (1, 0)):  # it is not from the coordinator
        assert not runtime._orders.believed(msgspec.msgpack.encode(order), sender)
    assert runtime.rejections.counts == {"Order": 9, "Welcome": 8}
    assert runtime._orders.believed(msgspec.msgpack.encode(order), COORDINATOR)
    assert runtime._orders.believed(msgspec.msgpack.encode(welcome), None)


def restarted(welcome: Welcome, incarnation: int) -> Welcome:
    """What is said when replica 0 has been started again."""
    inbox = welcome.inboxes[0][0]
    inbox = inbox.replace("inbox-0-0-0", f"inbox-0-0-{incarnation}") if inbox[0] == "i" else "tcp://127.0.0.1:10"
    frames = welcome.frame_addresses[0][0].replace("frames-0-0-0", f"frames-0-0-{incarnation}")
    return msgspec.structs.replace(
        welcome,
        inboxes=((inbox,), welcome.inboxes[1]),
        frame_addresses=((frames,), welcome.frame_addresses[1]),
        incarnations=(incarnation, 0),
        plan=replace(welcome.plan, epoch=welcome.plan.epoch + 1),
    )


def test_what_belongs_to_a_peers_processes_is_forgotten_with_them(runtime: RankRuntime, hello: Hello) -> None:
    """A buffer that it shared is unmapped, and the next incarnation is offered the own one; other peers stay known."""
    welcome = welcome_for(hello)
    act(runtime, welcome)
    vmm = make_vmm(runtime._options.kunserve_frame_bytes, "cpu", 0)
    theirs = SharedBuffer.create(vmm, runtime._activation_bytes)
    maps = Path("/proc/self/maps")
    before = len(maps.read_text().splitlines())
    with theirs.export() as export:
        shared = ActivationBuffer(SharedBuffer.open(runtime._activation_vmm, export))
    runtime._handover.share(0, shared)
    runtime._loans._known_peers.add(0)
    runtime._loans._told_peers.add(0)
    outbox = runtime.link._outboxes[0, 0]
    act(runtime, msgspec.structs.replace(welcome, plan=replace(welcome.plan, epoch=2)))
    assert runtime.link._outboxes[0, 0] is outbox, "it is the same one"
    said = restarted(welcome, 1)
    assert runtime._orders.believed(msgspec.msgpack.encode(said), None)
    act(runtime, said)
    assert outbox.closed
    assert not runtime.link._outboxes[0, 0].closed
    assert not runtime._loans._known_peers | runtime._loans._told_peers
    assert runtime._handover._agreed._buffers.keys() == {1}  # type: ignore[union-attr]
    theirs.close()
    assert len(maps.read_text().splitlines()) <= before
    act(runtime, said)  # again
    assert runtime.plan.epoch == 2


@pytest.mark.parametrize("chosen", [Activations.MAPPED, Activations.COLLECTIVE])
def test_activations_are_handed_over_as_the_coordinator_says_and_no_other_way_later(
    runtime: RankRuntime, hello: Hello, chosen: Activations
) -> None:
    assert runtime._activation_vmm.own_frame_count == 0, "nothing is made before it is known what for"
    said = msgspec.structs.replace(welcome_for(hello), activations=chosen)
    other = Activations.MAPPED if chosen is Activations.COLLECTIVE else Activations.COLLECTIVE
    assert runtime._orders.believed(msgspec.msgpack.encode(said), None)
    act(runtime, said)
    buffer = runtime._loans._activations
    assert (buffer is not None) == (chosen is Activations.MAPPED)
    assert (runtime._activation_vmm.own_frame_count > 0) == (chosen is Activations.MAPPED)
    assert buffer is None or buffer.size_bytes >= runtime._activation_bytes
    way = CollectiveHandover if chosen is Activations.COLLECTIVE else MappedHandover
    assert isinstance(runtime._handover._agreed, way)
    assert not runtime._orders.believed(msgspec.msgpack.encode(msgspec.structs.replace(said, activations=other)), None)
    act(runtime, said)  # again, with a later plan
    assert runtime._loans._activations is buffer


def test_the_inbox_is_looked_into_before_a_step_and_what_is_found_keeps_the_rank_awake(
    runtime: RankRuntime, coordinator: Coordinator, hello: Hello, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A step may wait for the device, which a peer's send of activations keeps busy until it is received."""
    act(runtime, welcome_for(hello))
    act(runtime, Order(5, Phase.PREPARE, 1, plan_of(hello.facts, epoch=2), 10.0))
    looked: list[str] = []

    def noting(name: str, do: Callable[..., None]) -> Callable[..., None]:
        def noted(*args: Any) -> None:
            looked.append(name)
            do(*args)

        return noted

    monkeypatch.setattr(runtime.link, "poll", noting("look", runtime.link.poll))
    monkeypatch.setattr(runtime._agent, "advance", noting("step", runtime._agent.advance))
    assert not runtime.has_taken_in
    coordinator.send(welcome_for(hello))
    assert runtime.link.inbox.poll(int(1000 * ARRIVAL_S))
    runtime.at_boundary(is_serving=False)
    assert looked == ["look", "step"]
    assert runtime.has_taken_in
    assert len(runtime.take_orders()) == 1
    assert not runtime.has_taken_in


def test_phases_come_in_order_and_to_one_plan(runtime: RankRuntime, coordinator: Coordinator, hello: Hello) -> None:
    act(runtime, welcome_for(hello))
    order = Order(5, Phase.PREPARE, 1, plan_of(hello.facts, epoch=2), 10.0)
    act(runtime, order)
    other = msgspec.structs.replace(order, phase=Phase.SWITCH, plan=replace(order.plan, epoch=3))
    for message in (other, *(msgspec.structs.replace(order, phase=p) for p in (Phase.RELEASE, Phase.UNDO))):
        act(runtime, message)
    assert runtime.rejections.counts == {"Order": 3}
    runtime.at_boundary(is_serving=False)
    for phase in (Phase.SWITCH, Phase.RELEASE):
        act(runtime, msgspec.structs.replace(order, phase=phase))
        runtime.at_boundary(is_serving=False)
    assert not runtime.is_in_transition
    replies = [coordinator.take() for _ in range(3)]
    assert [getattr(reply, "result", None) for reply in replies] == [Result.APPLIED] * 3


def test_who_has_recovered_takes_in_nothing_of_before(runtime: RankRuntime, hello: Hello) -> None:
    """Also when it is merged again: what a replica has sent that nobody could reach comes when it can be reached."""
    act(runtime, welcome_for(hello))
    alone = plan_of(hello.facts, epoch=3)
    order = Order(5, Phase.ABANDON, 2, alone, 10.0, members=(1,))
    for phase in (Phase.ABANDON, Phase.RELOAD, Phase.REVIVE):
        act(runtime, msgspec.structs.replace(order, phase=phase))
        runtime.at_boundary(is_serving=False)
    assert not runtime.is_in_transition
    runtime.plan.enter(replace(alone, epoch=4, hosts=((1,) * LAYERS,) * 2))
    slots = runtime._memory.kv.space.slots_of(0, 0, 1)
    ids = np.arange(slots.first, slots.stop, dtype=np.int64).tobytes()
    for epoch in range(2, 5):
        runtime.link._take_in(memoryview(msgspec.msgpack.encode(CopySlots(0, epoch, epoch, ids, ids))), (0, 0))
    assert runtime.rejections.counts == {"CopySlots": 1}
    assert runtime.link.order_count == 2


def test_orders_that_come_in_the_middle_of_a_batch(
    runtime: RankRuntime, coordinator: Coordinator, hello: Hello
) -> None:
    """PREPARE goes on at once; SWITCH waits for the batch boundary, and so does what comes behind it."""
    act(runtime, welcome_for(hello))
    order = Order(5, Phase.PREPARE, 1, plan_of(hello.facts, epoch=2), 10.0)
    switch = msgspec.structs.replace(order, phase=Phase.SWITCH)
    for message in (order, switch, msgspec.structs.replace(order, phase=Phase.RELEASE)):
        coordinator.send(message)
    deadline_s = time.monotonic() + ARRIVAL_S
    while not runtime.is_in_transition:
        assert time.monotonic() < deadline_s
        runtime.link.poll(50)
        runtime.hosting.own_batches.between_layers()
    reply = coordinator.take()
    assert isinstance(reply, OrderReply)
    assert (reply.phase, reply.result) == (Phase.PREPARE, Result.APPLIED)
    taken = taken_by(runtime, lambda taken: len(taken) == 2)
    assert [getattr(message, "phase", None) for message in taken] == [Phase.SWITCH, Phase.RELEASE]


def test_a_welcome_waits_for_the_batch_boundary(runtime: RankRuntime, coordinator: Coordinator, hello: Hello) -> None:
    act(runtime, welcome_for(hello))
    later = replace(plan_of(hello.facts, epoch=7))
    coordinator.send(msgspec.structs.replace(welcome_for(hello), plan=later))
    runtime.link.poll(int(1000 * ARRIVAL_S))
    runtime.hosting.own_batches.between_layers()
    assert runtime.plan.epoch == 1
    taken_by(runtime, lambda taken: len(taken) == 1)
    assert runtime.plan.epoch == 7


def test_a_report_says_what_merged_batches_have_taken(
    runtime: RankRuntime, coordinator: Coordinator, hello: Hello
) -> None:
    runtime.hosting.own_batches.merged_s, runtime.hosting.own_batches.home_s = 1.5, 1.25
    assert runtime.reports.send_load(ReplicaLoad(64, used_tokens=3))
    report = coordinator.take()
    assert isinstance(report, LoadReport)
    assert report.load == ReplicaLoad(64, used_tokens=3, merged_ms=1500, home_ms=1250)


def test_slots_become_free_frames_and_come_back_as_ordered(runtime: RankRuntime, coordinator: Coordinator) -> None:
    runtime.report()
    hello = coordinator.take()
    assert isinstance(hello, Hello)
    act(runtime, welcome_for(hello))
    before, per_granule = hello.facts, sum(hello.facts.granule_frames)
    for number, frames in ((1, -per_granule), (2, per_granule)):
        act(runtime, Resize(number, frames))
        report = coordinator.take()
        assert isinstance(report, Hello)
        shrunk = number == 1
        assert report.facts.base_granules == before.base_granules - shrunk
        assert report.facts.free_frames == before.free_frames + shrunk * per_granule
    for number, frames, why in ((3, 1000 * per_granule, "are not free"), (4, 1, "accepted: multiples of")):
        act(runtime, Resize(number, frames))
        refused = coordinator.take()
        assert isinstance(refused, ResizeRefused)
        assert (refused.replica, refused.number) == (1, number)
        assert why in refused.reason
    assert runtime._orders.believed(msgspec.msgpack.encode(Resize(5, -per_granule)), COORDINATOR)
    for message in (Resize(0, per_granule), Resize(5, 0)):
        assert not runtime._orders.believed(msgspec.msgpack.encode(message), COORDINATOR)


def test_fuzzed_messages(runtime: RankRuntime, hello: Hello) -> None:
    """10,000 of them, from whoever it is: none ends the rank or makes it wait, and the coordinator gets what it wants
    after."""
    runtime._agent._reply = lambda message: None
    random = Random(5)
    welcome = welcome_for(hello)
    act(runtime, welcome)
    plan = plan_of(hello.facts, epoch=2)
    loans = (ParameterLoan(0, 1, (0,)), ParameterLoan(1, 0, (1,)))
    reload = Order(5, Phase.RELOAD, 1, plan, 10.0, loans, 0.01)
    lend = Lend(3, (LayerLoan(1, 0, (0, 1)),))
    valid = [Order(5, phase, 1, plan, 10.0) for phase in Phase] + [welcome, reload, lend]
    for number in range(10_000):
        sender = random.choice([None, COORDINATOR, (0, 0), (1, 0)])
        payload = fuzzed(random, valid)
        if runtime._orders.believed(payload, sender):
            assert sender in (None, COORDINATOR)
            runtime.on_payload(payload)
        runtime.at_boundary(is_serving=bool(number % 2))
        runtime.lend_on(is_serving=bool(number % 2))
    assert runtime.rejections.counts.total() > 5000
    if (active := runtime._agent._active) is not None:  # the way back or, after RELEASE, the end; or a recovery
        for phase in (Phase.REVERT, Phase.UNDO, Phase.REOPEN, Phase.RESUME, Phase.RELOAD, Phase.REVIVE):
            act(runtime, msgspec.structs.replace(active.order, phase=phase))
            runtime.at_boundary(is_serving=False)
    assert not runtime.is_in_transition
    latest = 100
    act(runtime, msgspec.structs.replace(welcome, plan=plan_of(hello.facts, epoch=latest)))
    order = Order(1000, Phase.PREPARE, latest, plan_of(hello.facts, epoch=latest + 1), 10.0)
    assert runtime._orders.believed(msgspec.msgpack.encode(order), COORDINATOR)
    act(runtime, order)
    assert runtime.is_in_transition


def test_fuzz_of_others_than_the_coordinator_leaves_the_plan(runtime: RankRuntime, hello: Hello) -> None:
    random = Random(6)
    act(runtime, welcome_for(hello))
    plan = runtime.plan.agreed
    valid = [Order(5, Phase.PREPARE, 1, plan_of(hello.facts, epoch=2), 10.0), welcome_for(hello)]
    for _ in range(2000):
        assert not runtime._orders.believed(fuzzed(random, valid), random.choice([(0, 0), (1, 0)]))
    assert runtime.plan.agreed == plan
