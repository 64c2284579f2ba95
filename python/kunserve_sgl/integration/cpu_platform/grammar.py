"""Constrained decoding on a CPU: SGLang's xgrammar backend knows accelerators only, the library itself does not."""

from __future__ import annotations

import torch
import xgrammar
from sglang.srt.constrained import xgrammar_backend


def install() -> None:
    """Replaces two functions of SGLang's xgrammar backend in this process. Idempotent."""
    xgrammar_backend._allocate_token_bitmask = _allocate_token_bitmask
    xgrammar_backend.XGrammarGrammar.apply_vocab_mask = _apply_vocab_mask


def _allocate_token_bitmask(vocab_size: int, batch_size: int) -> torch.Tensor:
    """Makes a mask (batch size, vocabulary size / 32) that allows everything. Upstream's is in pinned memory, for the
    copy to the device; without CUDA that raises and ends the scheduler."""
    return xgrammar.allocate_token_bitmask(batch_size, vocab_size)


def _apply_vocab_mask(_: object, logits: torch.Tensor, vocab_mask: torch.Tensor) -> None:
    """Sets the logits (batch size, vocabulary size) of what the mask does not allow to minus infinity, in place."""
    xgrammar.apply_token_bitmask_inplace(logits, vocab_mask)
