"""The parts that Llama-shaped families share: RMS norms, rotate-half rotary positions and grouped attention.

Sources: RMSNorm (arXiv 1910.07467), RoPE (arXiv 2104.09864), grouped queries (arXiv 2305.13245).
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F


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


def rotation(length: int, size: int, theta: float, device: torch.device) -> tuple[Tensor, Tensor]:
    """Cosines and sines [length, size] of the positions 0 to length - 1, float32; size is that of a head."""
    frequencies = theta ** (-torch.arange(0, size, 2, device=device, dtype=torch.float32) / size)
    angles = torch.arange(length, device=device, dtype=torch.float32)[:, None] * frequencies
    angles = torch.cat([angles, angles], dim=-1)
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate-half rotary embedding of x [rows, heads, length, head size] in float32."""
    first, second = x.float().chunk(2, dim=-1)
    return (x.float() * cos + torch.cat([-second, first], dim=-1) * sin).to(x.dtype)


def attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
    """Full attention of query [rows, heads, length, head size] over key and value of as many heads or a divisor of it.

    mask [rows, 1, 1, length] is True where a key may be attended to. Returns [rows, length, heads * head size].
    """
    groups = query.shape[1] // key.shape[1]
    if groups > 1 and mask is not None:
        # On CUDA no fused kernel takes both a mask and grouped heads; the one left would hold every score.
        key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    grouped = query.shape[1] != key.shape[1]
    mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, enable_gqa=grouped)
    return mixed.transpose(1, 2).flatten(2)
