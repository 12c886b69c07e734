"""Counter-based randomness: every draw is a pure function of (seed, row, step, position, stream), and of the token.

No generator objects: a request draws the same numbers alone or in any batch, and a steered run shares its noise with
its unsteered baseline. The mixers are the published finalisers of SplitMix64 (Steele, Lea & Flood 2014) and of the
32-bit "lowbias32" hash (Wellons, hash-prospector).
"""

import torch
from torch import Tensor

TOKEN, ORDER, REMASK, CONTROL, STRETCH = 1, 2, 3, 4, 5
"""Streams: what a draw is used for."""

_GOLDEN = -7046029254386353131  # 0x9E3779B97F4A7C15 as int64
_MIX_1 = -4658895280553007687  # 0xBF58476D1CE4E5B9
_MIX_2 = -7723592293110705685  # 0x94D049BB133111EB


def _shift(x: Tensor, bits: int) -> Tensor:
    """Logical right shift of int64."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _mix(x: Tensor) -> Tensor:
    x = (x ^ _shift(x, 30)) * _MIX_1
    x = (x ^ _shift(x, 27)) * _MIX_2
    return x ^ _shift(x, 31)


def keys(seed: Tensor, row: Tensor, step: Tensor, position: Tensor, stream: int) -> Tensor:
    """A well-mixed int64 key [N] for each draw, from int64 counters [N]."""
    x = torch.full_like(seed, stream)
    for counter in (seed, row, step, position):
        x = _mix(x * _GOLDEN + counter)
    return _mix(x + _GOLDEN)


def uniform(key: Tensor) -> Tensor:
    """One draw in [0, 1) with 53 bits per key: [N] float64."""
    return _shift(key, 11).double() * 2.0**-53


def exponential(key: Tensor, size: int) -> Tensor:
    """Standard exponential draws [N, size] float32, one per key and token id.

    `argmax(logits / T - log(exponential))` samples softmax(logits / T) exactly (the Gumbel-max trick). The published
    loops need float64 there because -log(-log(u)) of a float32 u cannot exceed about 17, which makes rare tokens too
    rare (arXiv 2409.02908). Small exponentials are what makes large Gumbels, and -log1p(-w) of a 32-bit w keeps
    their relative precision in float32 down to 2^-33, a Gumbel of 23.
    """
    low, high = key.to(torch.int32)[:, None], (key >> 32).to(torch.int32)[:, None]
    x = torch.arange(size, dtype=torch.int32, device=key.device) * -1640531527  # 0x9E3779B1: spreads the ids
    x = x[None, :] ^ low
    x ^= (x >> 16).bitwise_and_(0xFFFF)
    x *= 0x7FEB352D
    x ^= (x >> 15).bitwise_and_(0x1FFFF)
    x ^= high
    x *= -2073254261  # 0x846CA68B
    x ^= (x >> 16).bitwise_and_(0xFFFF)
    # Two halves: a float32 made of all 32 bits at once would round small values to multiples of 2^-24.
    w = (x >> 16).bitwise_and_(0xFFFF).float().mul_(2.0**-16)
    w += x.bitwise_and_(0xFFFF).float().add_(0.5).mul_(2.0**-32)
    return w.clamp_(max=1 - 2.0**-24).neg_().log1p_().neg_()
