"""Activations by NCCL between two processes, each with a GPU of its own."""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._C._distributed_c10d import FileStore

from kunserve_sgl.errors import ConfigurationError, TransientError
from kunserve_sgl.exchange.collective_transport import CollectiveTransport

TIMEOUT_S = 60.0
SHORT_S = 5.0
ANSWER_S = 300.0
ROWS, COLUMNS = 8192, 4096  # 64 MiB in bfloat16: more than NCCL holds without a receiver
ROUNDS = 20

pytestmark = pytest.mark.gpu
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU with its driver")
needs_two = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="NCCL sends between two GPUs; there are fewer")


def transport_of(path: str, replica: int, gpu: int, timeout_s: float = TIMEOUT_S) -> CollectiveTransport:
    device = torch.device("cuda", gpu)
    torch.cuda.set_device(device)
    return CollectiveTransport(FileStore(path), replica, 0, backend="nccl", device=device, timeout_s=timeout_s)


def activations(seed: int, gpu: int, rows: int = ROWS) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(rows, COLUMNS, generator=generator, dtype=torch.float32)
    return values.to(torch.bfloat16).to(torch.device("cuda", gpu))


def both_send_then_receive(me: int, path: str, link: Connection) -> None:
    """Many rounds without waiting for the GPU in between; what is sent is computed just before and written over just
    after, in the same stream."""
    transport = transport_of(path, me, me)
    transport.connect([1 - me])
    mine, theirs = activations(me, me), activations(1 - me, me)
    keep = torch.tensor([5, 0, 3], device=mine.device)
    wrong = torch.zeros((), dtype=torch.int64, device=mine.device)
    for turn in range(ROUNDS):
        tensor = mine * (turn + 1)
        link.send(transport.send(1 - me, {"x": tensor, "none": None}))
        link.send(transport.send(1 - me, {"rows": tensor}, keep))
        tensor.zero_()
        got = transport.expect(1 - me, link.recv()).take()
        rows = transport.expect(1 - me, link.recv()).take()
        assert got["none"] is None
        wrong += (got["x"] != theirs * (turn + 1)).sum()
        wrong += (rows["rows"] != (theirs * (turn + 1))[keep]).sum()
        del got, rows
    assert wrong.item() == 0
    link.send("done")  # closing aborts what the peer has not got yet
    assert link.recv() == "done"
    transport.close()


def both_wait_for_their_devices(me: int, path: str, link: Connection) -> None:
    """With sends under way in both directions. Each receive is posted when its message is there, so both sends end; if
    it were posted when it is needed, both would wait until torch ends them."""
    transport = transport_of(path, me, me)
    transport.connect([1 - me])
    mine, theirs = activations(me, me), activations(1 - me, me)
    for _ in range(ROUNDS):
        link.send(transport.send(1 - me, {"x": mine}))
        expected = transport.expect(1 - me, link.recv())
        torch.cuda.synchronize()
        assert torch.equal(expected.take()["x"], theirs)  # type: ignore[arg-type]
    link.send("done")
    assert link.recv() == "done"
    transport.close()


def only_one_connects(me: int, path: str, link: Connection) -> None:
    if me == 0:
        begin_s = time.monotonic()
        with pytest.raises(TransientError):
            transport_of(path, 0, 0, SHORT_S).connect([1])
        assert time.monotonic() - begin_s < 2 * SHORT_S


def overdue_receive(me: int, path: str, link: Connection) -> None:
    """The stream waits for what nobody sent; the next call says so, and closing frees the stream."""
    transport = transport_of(path, me, me, SHORT_S)
    transport.connect([1 - me])
    if me == 0:
        notes = transport.send(1, {"x": activations(0, 0, 4)})
        link.send(notes)
        assert link.recv() == "seen"
    else:
        notes = link.recv()
        transport.expect(0, notes).take()
        transport.expect(0, notes).take()
        deadline_s = time.monotonic() + SHORT_S
        while time.monotonic() <= deadline_s:
            time.sleep(0.1)  # the time is what is tested
        with pytest.raises(TransientError, match="not done"):
            transport.expect(0, notes).take()
        link.send("seen")
    begin_s = time.monotonic()
    transport.close()
    torch.cuda.synchronize()
    assert time.monotonic() - begin_s < TIMEOUT_S


def same_gpu(me: int, path: str, link: Connection) -> None:
    with pytest.raises(ConfigurationError, match="same GPU"):
        transport_of(path, me, 0).connect([1 - me])


def run_both(program: Callable[[int, str, Connection], None], tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    ends = context.Pipe()
    processes: list[Any] = [
        context.Process(target=program, args=(me, str(tmp_path / "store"), ends[me])) for me in (0, 1)
    ]
    for process in processes:
        process.start()
    for end in ends:
        end.close()
    try:
        for process in processes:
            process.join(ANSWER_S)
            assert process.exitcode == 0
    finally:
        for process in processes:
            process.kill()
            process.join()


@needs_two
@pytest.mark.parametrize(
    "program", [both_send_then_receive, both_wait_for_their_devices, only_one_connects, overdue_receive]
)
def test_two_gpus(program: Callable[[int, str, Connection], None], tmp_path: Path) -> None:
    run_both(program, tmp_path)


@needs_gpu
def test_nccl_on_one_gpu_is_refused(tmp_path: Path) -> None:
    run_both(same_gpu, tmp_path)
