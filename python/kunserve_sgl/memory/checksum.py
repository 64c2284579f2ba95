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

import torch

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


def checksum(data: torch.Tensor) -> Checksum:
    """Computes the checksum of a contiguous uint8 tensor (size,); on a GPU the size is a multiple of 8. Work on other
    streams that writes the bytes must be finished."""
    if data.device.type != "cpu":
        return mixed_sums(data)
    # Here, so that a machine that only serves from GPUs does not need the package.
    import xxhash

    return Checksum(ChecksumAlgorithm.XXH3_128, xxhash.xxh3_128_intdigest(data.numpy().data))


def mixed_sums(data: torch.Tensor) -> Checksum:
    """Computes the GPU's checksum of a contiguous uint8 tensor (size,), to the same value on any device. Raises
    ValueError where the size is no multiple of 8."""
    if data.numel() % _WORD_BYTES:
        raise ValueError(f"{data.numel()} bytes are not a multiple of {_WORD_BYTES}")
    words = data.view(torch.int64)
    sums = torch.zeros(2, dtype=torch.int64, device=data.device)
    for start in range(0, words.numel(), _CHUNK_WORDS):
        chunk = words[start : start + _CHUNK_WORDS]
        mixed = torch.arange(start + 1, start + 1 + chunk.numel(), dtype=torch.int64, device=data.device)
        mixed.mul_(_signed(_POSITION_STEP)).bitwise_xor_(chunk)
        _fold(mixed, 30).mul_(_signed(_MIX_1))
        _fold(mixed, 27).mul_(_signed(_MIX_2))
        _fold(mixed, 31)
        sums[0] += mixed.sum()
        mixed.mul_(_signed(_SECOND_LANE))
        _fold(mixed, 32).mul_(_signed(_SECOND_LANE))
        sums[1] += _fold(mixed, 32).sum()
    first, second = (int(value) % _WRAP for value in sums.tolist())
    length = data.numel() * _POSITION_STEP % _WRAP
    return Checksum(ChecksumAlgorithm.MIXED_SUMS, (first ^ length) << 64 | second)


def _fold(words: torch.Tensor, shift: int) -> torch.Tensor:
    """words ^= words >>> shift, in place; torch shifts signed words arithmetically, so the sign is masked
    away."""
    folded = (words >> shift).bitwise_and_((1 << (64 - shift)) - 1)
    return words.bitwise_xor_(folded)


def _signed(constant: int) -> int:
    return constant - _WRAP if constant >= _WRAP // 2 else constant
