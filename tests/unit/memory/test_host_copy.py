"""The copy of the layers in host memory: written once, whoever comes first, and never taken for what it is not."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from layer_setup import LAYERS, AdoptedModel

from kunserve_sgl.errors import ConfigurationError
from kunserve_sgl.memory.errors import ChecksumMismatchError, OutOfMemoryError, RestoreSourceError
from kunserve_sgl.memory.host_copy import HostCopy

# Takes the lock of a layer, says so, and keeps it for as long as it lives.
_LOCKING = """
import fcntl, os, sys
fd = os.open(sys.argv[1], os.O_RDWR)
fcntl.lockf(fd, fcntl.LOCK_EX, 64, 64 * int(sys.argv[2]))
print("locked", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def path() -> Iterator[str]:
    """What leads any process to a file that only this one keeps open."""
    fd = os.memfd_create("test", os.MFD_CLOEXEC)
    yield f"/proc/{os.getpid()}/fd/{fd}"
    os.close(fd)


def opened(path: str, adopted: AdoptedModel) -> HostCopy:
    return HostCopy(path, {layer: copy.numel() for layer, copy in adopted.copies.items()})


def keep_all(copy: HostCopy, adopted: AdoptedModel) -> list[bool]:
    parameters = adopted.parameters
    return [copy.keep(i, parameters.region(i), parameters.report(i).checksum) for i in range(LAYERS)]


def test_the_first_writes_and_all_restore(adopted: AdoptedModel, path: str) -> None:
    first, second = opened(path, adopted), opened(path, adopted)
    assert second.missing_bytes == sum(copy.numel() for copy in adopted.copies.values())
    assert keep_all(first, adopted) == [True] * LAYERS
    assert keep_all(second, adopted) == [False] * LAYERS
    assert second.missing_bytes == 0
    first.close()  # its replica has ended
    for layer in range(LAYERS):
        adopted.parameters.drop(layer)
    adopted.scribble()
    for layer in reversed(range(LAYERS)):
        adopted.parameters.restore(layer, second)
    adopted.assert_same_answers()
    assert os.stat(path).st_size == second.size_bytes
    assert "/memfd:test" not in Path("/proc/self/maps").read_text()  # nothing stays mapped
    second.close()


def test_who_comes_second_does_not_wait_and_a_dead_writer_holds_nothing(adopted: AdoptedModel, path: str) -> None:
    copy = opened(path, adopted)
    with subprocess.Popen(
        [sys.executable, "-c", _LOCKING, path, "1"], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as other:
        try:
            assert other.stdout is not None
            assert other.stdout.readline() == b"locked\n"
            assert keep_all(copy, adopted) == [True, False, True]
            adopted.parameters.drop(1)
            with pytest.raises(RestoreSourceError, match="has no layer 1: whoever began to write it has not ended"):
                adopted.parameters.restore(1, copy)
            adopted.parameters.restore(1, adopted.source)
        finally:
            other.kill()
    assert keep_all(copy, adopted) == [False, True, False]
    adopted.parameters.drop(1)
    adopted.parameters.restore(1, copy)
    adopted.assert_same_answers()
    copy.close()


def test_a_copy_of_other_weights_is_refused_and_renewed(adopted: AdoptedModel, path: str) -> None:
    copy = opened(path, adopted)
    keep_all(copy, adopted)
    with torch.no_grad():
        next(adopted.layers[1].parameters()).add_(1)
    adopted.parameters.renew_checksum(1)
    renewed = adopted.parameters.region(1).clone()
    adopted.parameters.drop(1)
    with pytest.raises(ChecksumMismatchError):
        adopted.parameters.restore(1, copy)
    assert not copy.has(1, adopted.parameters.report(1).checksum)
    assert copy.keep(1, renewed, adopted.parameters.report(1).checksum)
    adopted.parameters.restore(1, copy)
    copy.close()


def test_a_layer_of_another_size_is_not_there(adopted: AdoptedModel, path: str) -> None:
    copy = opened(path, adopted)
    keep_all(copy, adopted)
    other = HostCopy(path, {0: 4096, 1: 4096})
    assert other.missing_bytes == 8192
    other.close()
    copy.close()


def test_a_record_that_is_half_written_says_nothing(adopted: AdoptedModel, path: str) -> None:
    copy = opened(path, adopted)
    keep_all(copy, adopted)
    with open(path, "r+b") as file:
        file.seek(64 + 36)  # in the middle of the name of the algorithm
        file.write(bytes(12))
    assert copy.missing_bytes == adopted.copies[1].numel()
    copy.close()


def test_without_memory_the_layer_is_not_there(
    adopted: AdoptedModel, path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = opened(path, adopted)
    keep_all(copy, adopted)

    def refuse(fd: int, offset: int, size_bytes: int) -> None:
        raise OSError(errno.ENOSPC, "no space left")

    with monkeypatch.context() as patched:
        patched.setattr(os, "posix_fallocate", refuse)
        with torch.no_grad():
            next(adopted.layers[1].parameters()).add_(1)
        checksum = adopted.parameters.renew_checksum(1)
        with pytest.raises(OutOfMemoryError, match=r"for the copy of layer 1: .*no space left"):
            copy.keep(1, adopted.parameters.region(1), checksum)
    assert copy.missing_bytes == adopted.copies[1].numel()
    assert copy.keep(1, adopted.parameters.region(1), checksum)
    copy.close()


def test_a_file_that_is_not_there_names_the_flag(adopted: AdoptedModel, tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"--kunserve-host-copy: .*none cannot be used"):
        opened(str(tmp_path / "none"), adopted)
