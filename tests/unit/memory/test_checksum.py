"""Both checksums: against a plain reference, and that they notice what goes wrong with memory."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kunserve_sgl.memory import checksum as module
from kunserve_sgl.memory.checksum import (
    Checksum,
    ChecksumAlgorithm,
    RunningChecksum,
    _MixedSums,
    checksum,
    mixed_sums,
    running_checksum,
)

WRAP = 1 << 64
ALGORITHMS = [checksum, mixed_sums]


def reference(data: bytes) -> int:
    """Mixed sums in plain integers."""

    def fold(word: int, shift: int) -> int:
        return word ^ (word >> shift)

    first = second = 0
    for number in range(len(data) // 8):
        word = int.from_bytes(data[8 * number : 8 * number + 8], "little")
        word ^= (number + 1) * 0x9E3779B97F4A7C15 % WRAP
        word = fold(word, 30) * 0xBF58476D1CE4E5B9 % WRAP
        word = fold(word, 27) * 0x94D049BB133111EB % WRAP
        word = fold(word, 31)
        first += word
        word = fold(word * 0xD6E8FEB86659FD93 % WRAP, 32) * 0xD6E8FEB86659FD93 % WRAP
        second += fold(word, 32)
    return ((first % WRAP) ^ (len(data) * 0x9E3779B97F4A7C15 % WRAP)) << 64 | second % WRAP


@given(st.binary(max_size=400))
def test_mixed_sums_follow_their_definition(data: bytes) -> None:
    data = data[: len(data) // 8 * 8]
    tensor = torch.tensor(list(data), dtype=torch.uint8)
    assert mixed_sums(tensor) == Checksum(ChecksumAlgorithm.MIXED_SUMS, reference(data))


def test_chunks_make_no_difference(monkeypatch: pytest.MonkeyPatch) -> None:
    data = torch.randint(0, 256, (8 * 1000,), dtype=torch.uint8)
    whole = mixed_sums(data)
    for words in (1, 7, 999, 1000):
        monkeypatch.setattr(module, "_CHUNK_WORDS", words)
        assert mixed_sums(data) == whole


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_every_single_bit_counts(algorithm: object) -> None:
    data = torch.randint(0, 256, (512,), dtype=torch.uint8)
    seen = {algorithm(data)}  # type: ignore[operator]
    for byte in range(512):
        for bit in range(8):
            data[byte] ^= 1 << bit
            seen.add(algorithm(data))  # type: ignore[operator]
            data[byte] ^= 1 << bit
    assert len(seen) == 1 + 512 * 8


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_two_flipped_sign_bits_do_not_cancel(algorithm: object) -> None:
    """Sums of products with odd keys lose exactly this."""
    data = torch.zeros(512, dtype=torch.uint8)
    before = algorithm(data)  # type: ignore[operator]
    for other in range(15, 512, 8):
        data[7] ^= 0x80
        data[other] ^= 0x80
        assert algorithm(data) != before  # type: ignore[operator]
        data[7] ^= 0x80
        data[other] ^= 0x80


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_place_and_length_count(algorithm: object) -> None:
    data = torch.randint(0, 256, (4096,), dtype=torch.uint8)
    swapped = data.clone()
    swapped[:1024], swapped[1024:2048] = data[1024:2048].clone(), data[:1024].clone()
    rolled = data.roll(8)
    zeros = [torch.zeros(size, dtype=torch.uint8) for size in (0, 8, 256, 4096)]
    sums = [algorithm(each) for each in (data, swapped, rolled, *zeros)]  # type: ignore[operator]
    assert len(set(sums)) == len(sums)


def test_algorithms_never_compare_equal() -> None:
    data = torch.zeros(64, dtype=torch.uint8)
    assert checksum(data) == checksum(data.clone())
    assert checksum(data).algorithm is ChecksumAlgorithm.XXH3_128
    assert checksum(data) != mixed_sums(data)
    assert Checksum(ChecksumAlgorithm.XXH3_128, 5) != Checksum(ChecksumAlgorithm.MIXED_SUMS, 5)
    assert str(Checksum(ChecksumAlgorithm.XXH3_128, 255)) == "xxh3-128:" + "0" * 30 + "ff"


def test_xxh3_is_the_published_one() -> None:
    """XXH3-128 of no bytes, from the reference implementation."""
    assert checksum(torch.empty(0, dtype=torch.uint8)).value == 0x99AA06D3014798D86001C324468D497F


def test_words_must_be_whole() -> None:
    with pytest.raises(ValueError, match="12 bytes are not a multiple of 8"):
        mixed_sums(torch.zeros(12, dtype=torch.uint8))


@pytest.mark.parametrize(
    "running", [lambda: running_checksum(torch.device("cpu")), lambda: _MixedSums(torch.device("cpu"))]
)
def test_parts_make_no_difference(running: Callable[[], RunningChecksum]) -> None:
    data = torch.randint(0, 256, (8 * 1000,), dtype=torch.uint8)
    found = set()
    for words in (1, 7, 999, 1000):
        parts = running()
        for part in torch.split(data, 8 * words):
            parts.update(part)
        found.add(parts.result())
    assert len(found) == 1
    assert found <= {checksum(data), mixed_sums(data)}
