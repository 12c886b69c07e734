"""The parts that Llama-shaped families share: RMS norms, rotate-half rotary positions.

Sources: RMSNorm (arXiv 1910.07467), RoPE (arXiv 2104.09864).
"""

import torch
from torch import Tensor, nn

from steerserve.models.attention import places


class RmsNorm(nn.Module):
    """x / rms(x) in float32, then the weight."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)
        return self.weight * wide.to(x.dtype)


def rotary_frequencies(size: int, theta: float, device: torch.device) -> Tensor:
    """Angles a position [size / 2] of the planes of a head of the given size, float32: 1 / theta^(2i / size).

    Written as every author writes it: `theta^(-2i / size)` is the same number, but rounds to another float32 for about
    every third plane.
    """
    return 1.0 / (theta ** (torch.arange(0, size, 2, device=device, dtype=torch.float32) / size))


def rotation(length: int, size: int, theta: float, device: torch.device) -> tuple[Tensor, Tensor]:
    """Cosines and sines [length, size] of the positions 0 to length - 1, float32; size is that of a head."""
    angles = places(length, device)[:, None] * rotary_frequencies(size, theta, device)
    angles = torch.cat([angles, angles], dim=-1)
    return angles.cos()[:length], angles.sin()[:length]


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate-half rotary embedding of x [rows, heads, length, size], in the dtype of cos and sin [length, size]."""
    wide = x.to(cos.dtype)
    first, second = wide.chunk(2, dim=-1)
    return (wide * cos + torch.cat([-second, first], dim=-1) * sin).to(x.dtype)
