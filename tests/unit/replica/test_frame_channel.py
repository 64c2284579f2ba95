"""Offers of frames over a Unix socket: what arrives, and what is broken on the way."""

from __future__ import annotations

import os
import socket
import stat
import struct
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from kunserve_sgl.exchange.offers import ActivationOffer, KvOffer, Offer, ParameterOffer
from kunserve_sgl.memory.errors import TransferError
from kunserve_sgl.memory.shared_buffer import SharedBuffer
from kunserve_sgl.memory.vmm_memfd import MemfdVmm
from kunserve_sgl.replica.frame_channel import FrameChannel
from open_files import open_files

FRAME_BYTES = 4096
TIMEOUT_S = 120.0
OFFERS: list[Offer] = [
    KvOffer(1, 0, 7, 2, 4, 2, 3),
    ParameterOffer(1, 0, 8, 5),
    ActivationOffer(1, 0, 2 * FRAME_BYTES),
]


@pytest.fixture
def channels(tmp_path: Path) -> Iterator[tuple[FrameChannel, FrameChannel]]:
    pair = FrameChannel(str(tmp_path / "a"), TIMEOUT_S), FrameChannel(str(tmp_path / "b"), TIMEOUT_S)
    yield pair
    for channel in pair:
        channel.close()


def test_offers_wait_until_they_are_taken(channels: tuple[FrameChannel, FrameChannel]) -> None:
    ours, theirs = channels
    assert theirs.accept() is None
    buffers = [SharedBuffer.create(MemfdVmm(FRAME_BYTES), 2 * FRAME_BYTES) for _ in OFFERS]
    before = open_files()
    for number, (offer, buffer) in enumerate(zip(OFFERS, buffers, strict=True)):
        buffer.tensor(torch.uint8, (2 * FRAME_BYTES,)).fill_(number + 1)
        with buffer.export() as export:
            ours.offer(1, theirs.path, offer, export)
    for number, offer in enumerate(OFFERS):
        arrived = theirs.accept()
        assert arrived is not None
        assert arrived[0] == offer
        with arrived[1] as export:
            opened = SharedBuffer.open(MemfdVmm(FRAME_BYTES), export)
        assert (opened.tensor(torch.uint8, (2 * FRAME_BYTES,)) == number + 1).all()
        opened.close()
    assert theirs.accept() is None
    assert open_files() <= before


def test_only_this_user_may_offer(channels: tuple[FrameChannel, FrameChannel]) -> None:
    assert stat.S_IMODE(os.stat(channels[0].path).st_mode) == 0o600


@pytest.mark.parametrize("gone", ["closed", "never there"])
def test_nobody_listens(channels: tuple[FrameChannel, FrameChannel], gone: str) -> None:
    ours, theirs = channels
    theirs.close()
    path = theirs.path if gone == "closed" else theirs.path + " elsewhere"
    buffer = SharedBuffer.create(MemfdVmm(FRAME_BYTES), FRAME_BYTES)
    before = open_files()
    with buffer.export() as export, pytest.raises(TransferError, match="frames cannot be offered to replica 1 at"):
        ours.offer(1, path, OFFERS[0], export)
    assert open_files() <= before


@pytest.mark.parametrize(
    "sent",
    [b"", b"\x01", struct.pack("<I", 10) + b"abc", struct.pack("<I", 3) + b"abc", struct.pack("<I", 1) + b"\x90"],
    ids=["nothing", "part of a length", "part of an offer", "no offer", "an offer of nothing"],
)
def test_half_an_offer_is_an_error_and_the_next_one_arrives(
    channels: tuple[FrameChannel, FrameChannel], sent: bytes
) -> None:
    ours, theirs = channels
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        sock.connect(theirs.path)
        sock.sendall(sent)
    buffer = SharedBuffer.create(MemfdVmm(FRAME_BYTES), FRAME_BYTES)
    with buffer.export() as export:
        ours.offer(1, theirs.path, OFFERS[1], export)
    with pytest.raises(TransferError):
        theirs.accept()
    arrived = theirs.accept()
    assert arrived is not None
    assert arrived[0] == OFFERS[1]
    arrived[1].close()


def test_who_stops_in_the_middle_holds_nobody_up_for_long(tmp_path: Path) -> None:
    channel = FrameChannel(str(tmp_path / "c"), timeout_s=0.2)
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        sock.connect(channel.path)
        sock.sendall(struct.pack("<I", 10))
        started_s = time.monotonic()
        with pytest.raises(TransferError, match="cannot be read"):
            channel.accept()
        assert 0.2 <= time.monotonic() - started_s < TIMEOUT_S
    channel.close()
