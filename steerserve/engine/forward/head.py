"""Rows for the head of a model: in blocks of bounded memory, padded so that their bits do not depend on the count."""

from collections.abc import Sequence
from typing import Final

import torch
from torch import Tensor

BLOCK_BYTES: Final = 64 << 20
"""Bound on one block of float32 logits; a few copies of it live at once."""


LEAST: Final = 16
"""Matrix products of fewer rows take other kernels on CPUs, whose last bits differ; shorter blocks are padded."""


def blocks(count: int, vocab_size: int) -> Sequence[slice]:
    """Where each block of `count` positions lies, in order: whole multiples of LEAST but for the last, whose borders
    change no result; one empty block where there is no position."""
    size = max(LEAST, BLOCK_BYTES // (4 * vocab_size) // LEAST * LEAST)
    return [slice(first, min(first + size, count)) for first in range(0, max(1, count), size)]


def pad_rows(hidden: Tensor) -> Tensor:
    """hidden [N, hidden_size] with rows of zeros added up to the height from which matrix products round rows alike."""
    missing = LEAST - len(hidden)
    return torch.cat([hidden, hidden.new_zeros(missing, hidden.shape[1])]) if missing > 0 else hidden
