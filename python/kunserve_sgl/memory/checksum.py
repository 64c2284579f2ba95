"""128-bit checksums of parameters, computed where the bytes are.

On a CPU XXH3-128. On a GPU, where copying every layer out to hash it would take longer than loading it,
two sums over mixed words: each 64-bit word is combined with its position and mixed by the finaliser of
SplitMix64 (Steele, Lea, Flood 2014, "Fast splittable pseudorandom number generators"), which is a bijection,
so one changed word always changes the first sum; the second sums a second mix of the same. Both guard against
mistakes and broken hardware, not against an attacker. Sums of different algorithms never compare equal.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import Protocol

import torch
from typing_extensions import override

_WORD_BYTES = 8
# Temporary memory is three times this; small enough for a GPU whose memory is given to frames.
_CHUNK_WORDS = (8 << 20) // _WORD_BYTES
_POSITION_STEP = 0x9E3779B97F4A7C15
_MIX_1 = 0xBF58476D1CE4E5B9
_MIX_2 = 0x94D049BB133111EB
_SECOND_LANE = 0xD6E8FEB86659FD93
_WRAP = 1 << 64


class ChecksumAlgorithm(enum.Enum):
    """Names the algorithm of a checksum: the CPU's or the GPU's."""

    XXH3_128 = "xxh3-128"
    MIXED_SUMS = "mixed-sums-128"


@dataclass(frozen=True, slots=True)
class Checksum:
    """Holds 128 bits and how they were computed. Two are equal only where both agree."""

    algorithm: ChecksumAlgorithm
    value: int

    def __str__(self) -> str:
        return f"{self.algorithm.value}:{self.value:032x}"

    @staticmethod
    def of_text(text: str) -> Checksum:
        """Returns what `str` has made `text` of. Raises ValueError for another one."""
        algorithm, _, value = text.partition(":")
        return Checksum(ChecksumAlgorithm(algorithm), int(value, 16))


class RunningChecksum(Protocol):
    """Takes in bytes part by part, in their order. `result` is as if they had come in one go."""

    def update(self, part: torch.Tensor) -> None:
        """Takes in a contiguous uint8 tensor (size,); on a GPU the size is a multiple of 8. Nothing of it is kept. Work
        on other streams that writes the bytes must be finished."""
        ...

    def result(self) -> Checksum:
        """Returns the checksum of what has come."""
        ...


def running_checksum(device: torch.device) -> RunningChecksum:
    """Begins a checksum of bytes on `device`."""
    return _Xxh3() if device.type == "cpu" else _MixedSums(device)


def checksum(data: torch.Tensor) -> Checksum:
    """Computes the checksum of a contiguous uint8 tensor (size,); see `RunningChecksum.update`."""
    running = running_checksum(data.device)
    running.update(data)
    return running.result()


def mixed_sums(data: torch.Tensor) -> Checksum:
    """Computes the GPU's checksum of a contiguous uint8 tensor (size,), to the same value on any device. Raises
    ValueError where the size is no multiple of 8."""
    running = _MixedSums(data.device)
    running.update(data)
    return running.result()


class _Xxh3(RunningChecksum):
    def __init__(self) -> None:
        # Here, so that a machine that only serves from GPUs does not need the package.
        import xxhash

        self._hash = xxhash.xxh3_128()

    @override
    def update(self, part: torch.Tensor) -> None:
        self._hash.update(part.numpy().data)

    @override
    def result(self) -> Checksum:
        return Checksum(ChecksumAlgorithm.XXH3_128, self._hash.intdigest())


class _MixedSums(RunningChecksum):
    def __init__(self, device: torch.device) -> None:
        self._sums = torch.zeros(2, dtype=torch.int64, device=device)
        self._words = 0

    @override
    def update(self, part: torch.Tensor) -> None:
        if part.numel() % _WORD_BYTES:
            raise ValueError(f"{part.numel()} bytes are not a multiple of {_WORD_BYTES}")
        words = part.view(torch.int64)
        for start in range(0, words.numel(), _CHUNK_WORDS):
            chunk = words[start : start + _CHUNK_WORDS]
            first = self._words + 1
            mixed = torch.arange(first, first + chunk.numel(), dtype=torch.int64, device=chunk.device)
            mixed.mul_(_signed(_POSITION_STEP)).bitwise_xor_(chunk)
            _fold(mixed, 30).mul_(_signed(_MIX_1))
            _fold(mixed, 27).mul_(_signed(_MIX_2))
            _fold(mixed, 31)
            self._sums[0] += mixed.sum()
            mixed.mul_(_signed(_SECOND_LANE))
            _fold(mixed, 32).mul_(_signed(_SECOND_LANE))
            self._sums[1] += _fold(mixed, 32).sum()
            self._words += chunk.numel()

    @override
    def result(self) -> Checksum:
        first, second = (int(value) % _WRAP for value in self._sums.tolist())
        length = self._words * _WORD_BYTES * _POSITION_STEP % _WRAP
        return Checksum(ChecksumAlgorithm.MIXED_SUMS, (first ^ length) << 64 | second)


def _fold(words: torch.Tensor, shift: int) -> torch.Tensor:
    """words ^= words >>> shift, in place; torch shifts signed words arithmetically, so the sign is masked
    away."""
    folded = (words >> shift).bitwise_and_((1 << (64 - shift)) - 1)
    return words.bitwise_xor_(folded)


def _signed(constant: int) -> int:
    return constant - _WRAP if constant >= _WRAP // 2 else constant
