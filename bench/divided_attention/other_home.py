"""The process of the other home, which attends to its part of a step and lets it be read as a server does."""

from __future__ import annotations

import multiprocessing
import socket
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from multiprocessing.synchronize import Event

import torch

from divided_attention.step import HOST, OTHER, Step
from kunserve_sgl.control.messages import ReadSpeeds
from kunserve_sgl.cpu_attention.paged_attention import plan_part
from kunserve_sgl.exchange.attention_parts import PartSlots
from kunserve_sgl.exchange.attention_service import AttentionService, BatchPart, PartAttention
from kunserve_sgl.exchange.attention_work import LSE, OUTPUT, QUERY, AttentionShape
from kunserve_sgl.exchange.kv_homes import KvHomes
from kunserve_sgl.exchange.memory_reads import LoanReader, LoanSpan, ReadService, Silences
from kunserve_sgl.exchange.memory_service import MemoryService
from kunserve_sgl.exchange.peer_link import PeerLink
from kunserve_sgl.exchange.remote_attention import RemoteAttention
from kunserve_sgl.exchange.tensor_layout import Activations
from kunserve_sgl.memory.frame_export import FrameExport, receive_export, send_export
from kunserve_sgl.memory.slot_space import SlotRange
from kunserve_sgl.replica.read_probe import measure, probe_bytes

LONGEST_WAIT_S = 60.0


class OtherHome(PartAttention):
    """Attends in the process of the other home, to the same KV, all of which is lent."""

    def __init__(self, step: Step) -> None:
        self.step = step

    def shape(self, layer: int) -> AttentionShape:
        return self.step.shape

    def part(self, slots: PartSlots) -> BatchPart:
        return OtherPart(self.step, slots)

    @contextmanager
    def held(self, borrower: int, layer: int, loans: Sequence[int]) -> Iterator[list[SlotRange]]:
        yield [SlotRange(0, self.step.slots)]

    @contextmanager
    def held_bytes(self, borrower: int, loan: int) -> Iterator[Sequence[torch.Tensor]]:
        yield [self.step.keys[0].view(torch.uint8).view(-1)]


class OtherPart(BatchPart):
    def __init__(self, step: Step, slots: PartSlots) -> None:
        self.step = step
        self.plan = plan_part(*slots.arrays)

    def attend(self, layer: int, tensors: Activations) -> Activations:
        query = tensors[QUERY]
        assert query is not None
        output, lse = self.step.attend(self.plan, layer, query, torch.float32)
        return {OUTPUT: output, LSE: lse}


def serve(directory: str, started: Event, ended: Event, shape: AttentionShape, layers: int, *step: float) -> None:
    """The process of the other home."""
    batch, context, share = step
    home = OtherHome(Step(shape, layers, int(batch), int(context), share))
    attention = AttentionService(OTHER, 2, layers, home, home)
    service = MemoryService(f"ipc://{directory}/home", 0, attention, ReadService(OTHER, 2, home), lambda offer: None)
    service.start()
    with socket.create_server(f"{directory}/frames", family=socket.AF_UNIX) as listener:
        listener.settimeout(LONGEST_WAIT_S)
        started.set()
        with listener.accept()[0] as sock:
            for export in home.step.kv.exports(home.step.own_slots, home.step.slots):
                with export:
                    send_export(sock, export, LONGEST_WAIT_S)
    ended.wait()
    service.close()


@dataclass(frozen=True)
class Asked:
    """The ways to the process of the other home: to have it attend, to read the first layer's keys, and what maps its
    slots of each buffer, in its order."""

    remote: RemoteAttention
    reader: LoanReader
    exports: Sequence[FrameExport]

    def speeds(self, step: Step) -> ReadSpeeds:
        """How fast they are read, as a server measures it."""
        own = step.keys[0].view(torch.uint8).view(-1)
        own = own[: probe_bytes(own.device)]

        def read(into: torch.Tensor) -> None:
            for _ in self.reader.transfer([LoanSpan(0, 0, into)], into.numel()):
                pass

        return measure(OTHER, own, read, lambda: None)


@contextmanager
def other_home(shape: AttentionShape, layers: int, *step: float) -> Iterator[Asked]:
    """The way to another process that has the KV of a step, which the arguments of `Step` say."""
    context = multiprocessing.get_context("spawn")
    started, ended = context.Event(), context.Event()
    with tempfile.TemporaryDirectory() as directory:
        address = f"ipc://{directory}/home"
        process = context.Process(target=serve, args=(directory, started, ended, shape, layers, *step), daemon=True)
        process.start()
        link = PeerLink(HOST, 0, f"ipc://{directory}/inbox")
        remote = RemoteAttention(link, lambda: KvHomes(HOST, []), lambda home: address, 1, bool, LONGEST_WAIT_S)
        try:
            assert started.wait(LONGEST_WAIT_S), "the other home has not started"
            with ExitStack() as stack:
                reader = LoanReader(address, (OTHER, 0), HOST, 0, Silences(LONGEST_WAIT_S))
                stack.callback(reader.close)
                sock = stack.enter_context(socket.socket(socket.AF_UNIX))
                sock.connect(f"{directory}/frames")
                exports = [stack.enter_context(receive_export(sock, LONGEST_WAIT_S)) for _ in range(2 * layers)]
                yield Asked(remote, reader, exports)
        finally:
            ended.set()
            process.join(LONGEST_WAIT_S)
            remote.close()
            link.close()
