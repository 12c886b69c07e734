"""Blocks of positions whose logits, [positions, vocabulary], stay within a bound of memory."""

from collections.abc import Sequence
from typing import Final

BLOCK_BYTES: Final = 64 << 20
"""Bound on one block of float32 logits; a few copies of it live at once."""
LEAST: Final = 16
"""Matrix products of fewer rows take other kernels on CPUs, whose last bits differ; shorter blocks are padded."""


def blocks(count: int, vocab_size: int) -> Sequence[slice]:
    """Where each block of `count` positions lies, in order: whole multiples of LEAST but for the last, whose borders
    change no result; one empty block where there is no position."""
    size = max(LEAST, BLOCK_BYTES // (4 * vocab_size) // LEAST * LEAST)
    return [slice(first, min(first + size, count)) for first in range(0, max(1, count), size)]
