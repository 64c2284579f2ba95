"""Sending frames over a socket: many descriptors, broken peers, deadlines; no descriptor may leak."""

from __future__ import annotations

import json
import os
import socket
import struct
import threading
import time
from collections.abc import Iterator

import pytest

from kunserve_sgl.memory import frame_export
from kunserve_sgl.memory.errors import TransferError
from kunserve_sgl.memory.frame_export import FrameExport, FrameRun, receive_export, send_export
from open_files import open_files


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    left, right = socket.socketpair()
    with left, right:
        yield left, right


def make_export(fd_count: int) -> FrameExport:
    fds = tuple(os.memfd_create(f"part {number}") for number in range(fd_count))
    return FrameExport("host", 4096, tuple(FrameRun(slot, slot, 2) for slot in range(fd_count)), fds)


def header(**changes: object) -> bytes:
    fields = {"version": 1, "backend": "host", "frame_bytes": 4096, "runs": [[0, 0, 1]], "fds": 1}
    body = json.dumps(fields | changes).encode()
    return struct.pack("<I", len(body)) + body


@pytest.mark.parametrize("fd_count", [1, 127, 128, 129, 400])
def test_every_descriptor_arrives_in_order(pair: tuple[socket.socket, socket.socket], fd_count: int) -> None:
    before = open_files()
    with make_export(fd_count) as sent:
        thread = threading.Thread(target=send_export, args=(pair[0], sent, 10.0))
        thread.start()
        received = receive_export(pair[1], 10.0)
        thread.join(10.0)
        with received:
            assert (received.backend, received.frame_bytes, received.runs) == ("host", 4096, sent.runs)
            assert received.frame_count == 2 * fd_count
            assert [os.fstat(fd).st_ino for fd in received.fds] == [os.fstat(fd).st_ino for fd in sent.fds]
            assert not any(os.get_inheritable(fd) for fd in received.fds)
    assert open_files() <= before


def test_several_exports_and_other_messages_share_a_socket(pair: tuple[socket.socket, socket.socket]) -> None:
    with make_export(3) as first, make_export(2) as second:
        send_export(pair[0], first, 5.0)
        pair[0].sendall(b"between")
        send_export(pair[0], second, 5.0)
        with receive_export(pair[1], 5.0) as received:
            assert len(received.fds) == 3
        assert pair[1].recv(7) == b"between"
        with receive_export(pair[1], 5.0) as received:
            assert received.runs == second.runs


@pytest.mark.parametrize(
    ("data", "complaint"),
    [
        (b"", "closed the connection"),
        (b"\x08\0\0\0half", "closed the connection"),
        (struct.pack("<I", 1 << 30), "header claims"),
        (struct.pack("<I", 3) + b"???", "cannot be read"),
        (struct.pack("<I", 4) + b"null", "cannot be read"),
        (header(version=2), "version 2"),
        (header(runs=[[1, 0, 1]]), "cannot be among 1"),
        (header(runs=[[0, -1, 1]]), "cannot be among 1"),
        (header(runs=[[0, 0, 0]]), "cannot be among 1"),
        (header(runs=[[0, 0]]), "cannot be read"),
        (header(fds="many"), "cannot be read"),
        (header(fds=-1, runs=[]), "0 file descriptors, not -1"),
        (header() + b"f", "sent 0 of 1"),
        (header(), "sent 0 of 1"),
    ],
)
def test_what_cannot_be_understood_is_refused(
    pair: tuple[socket.socket, socket.socket], data: bytes, complaint: str
) -> None:
    pair[0].sendall(data)
    pair[0].shutdown(socket.SHUT_WR)
    before = open_files()
    with pytest.raises(TransferError, match=complaint):
        receive_export(pair[1], 5.0)
    assert open_files() <= before


def test_a_peer_that_dies_halfway_leaves_no_descriptor(pair: tuple[socket.socket, socket.socket]) -> None:
    with make_export(2) as export:
        pair[0].sendall(header(fds=3))
        socket.send_fds(pair[0], [b"f"], list(export.fds))
        pair[0].shutdown(socket.SHUT_WR)
        before = open_files()
        with pytest.raises(TransferError, match="sent 2 of 3"):
            receive_export(pair[1], 5.0)
        assert open_files() <= before


def test_more_descriptors_than_announced_are_refused(pair: tuple[socket.socket, socket.socket]) -> None:
    with make_export(2) as export:
        pair[0].sendall(header())
        socket.send_fds(pair[0], [b"f"], list(export.fds))
        before = open_files()
        with pytest.raises(TransferError, match="sent 2 file descriptors, not 1"):
            receive_export(pair[1], 5.0)
        assert open_files() <= before


def test_receiving_ends_at_its_deadline(pair: tuple[socket.socket, socket.socket]) -> None:
    stop = threading.Event()
    sent: list[int] = []

    def trickle() -> None:
        for byte in header()[:-1]:
            pair[0].send(bytes([byte]))
            sent.append(byte)
            if stop.wait(0.2):
                return

    pair[1].settimeout(123.0)
    thread = threading.Thread(target=trickle)
    thread.start()
    started_s = time.monotonic()
    try:
        with pytest.raises(TransferError, match=r"in time|within"):
            receive_export(pair[1], 0.3)
    finally:
        stop.set()
        thread.join()
    assert time.monotonic() - started_s > 0.25
    assert len(sent) < len(header()) - 1, "each byte must not start the time anew"
    assert pair[1].gettimeout() == 123.0


def test_sending_ends_at_its_deadline_or_when_the_peer_is_gone(
    pair: tuple[socket.socket, socket.socket],
) -> None:
    runs = tuple(FrameRun(0, number, 1) for number in range(0, 400_000, 2))
    fd = os.memfd_create("part")
    with FrameExport("host", 4096, runs, (fd,)) as export:
        with pytest.raises(TransferError, match=r"in time|within"):
            send_export(pair[0], export, 0.2)
        pair[1].close()
        with pytest.raises(TransferError, match="connection to the peer failed"):
            send_export(pair[0], export, 0.2)


def test_too_many_frames_for_one_transfer_are_refused(
    pair: tuple[socket.socket, socket.socket], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(frame_export, "_MAX_HEADER_BYTES", 1000)
    runs = tuple(FrameRun(0, number, 1) for number in range(0, 400, 2))
    with pytest.raises(TransferError, match="200 frames are too many for one transfer"):
        send_export(pair[0], FrameExport("host", 4096, runs, ()), 5.0)
