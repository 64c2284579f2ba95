"""Where the memory of other replicas is used by messages: by name in one directory, else as it was told."""

from __future__ import annotations

from pathlib import Path

import pytest

from kunserve_sgl.args import KunserveOptions
from kunserve_sgl.errors import TransientError
from kunserve_sgl.memory.errors import TransferError
from kunserve_sgl.replica.memory_book import MemoryBook


def book(directory: Path, control: str) -> MemoryBook:
    options = KunserveOptions(
        kunserve_control=control, kunserve_directory=str(directory), kunserve_remote_attention="message"
    )
    return MemoryBook(options, 1)


def test_in_one_directory_addresses_are_known_by_name(tmp_path: Path) -> None:
    mine = book(tmp_path, "ipc")
    mine.learn(2, 3, "")
    assert mine.address_of(2, 3) == f"ipc://{tmp_path}/memory-2-1-3"


@pytest.mark.parametrize("control", ["tcp", "network"])
def test_over_tcp_they_are_those_of_the_incarnation_that_was_told_of(tmp_path: Path, control: str) -> None:
    mine = book(tmp_path, control)
    with pytest.raises(TransientError, match="replica 2 is, incarnation 0"):
        mine.address_of(2, 0)
    mine.learn(2, 0, "tcp://127.0.0.1:4000")
    assert mine.address_of(2, 0) == "tcp://127.0.0.1:4000"
    with pytest.raises(TransientError, match="incarnation 1"):
        mine.address_of(2, 1)
    mine.learn(2, 1, "tcp://127.0.0.1:4001")
    assert mine.address_of(2, 1) == "tcp://127.0.0.1:4001"
    with pytest.raises(TransientError, match="incarnation 0"):
        mine.address_of(2, 0)


@pytest.mark.parametrize("address", ["", "ipc://somewhere", "tcp://127.0.0.1:0", "tcp://host:4000"])
def test_addresses_that_no_rank_can_have_are_refused(tmp_path: Path, address: str) -> None:
    with pytest.raises(TransferError, match="replica 2 says"):
        book(tmp_path, "tcp").learn(2, 0, address)


def test_a_machine_that_is_no_other_process_of_this_one_is_refused_without_a_network(tmp_path: Path) -> None:
    with pytest.raises(TransferError, match="replica 2 says"):
        book(tmp_path, "tcp").learn(2, 0, "tcp://10.0.0.1:4000")
    book(tmp_path, "network").learn(2, 0, "tcp://10.0.0.1:4000")
