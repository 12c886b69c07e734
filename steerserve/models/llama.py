"""The parts that Llama-shaped families share: RMS norms, rotate-half rotary positions.

Sources: RMSNorm (arXiv 1910.07467), RoPE (arXiv 2104.09864).
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from steerserve.errors import ArtifactError
from steerserve.models.attention import places

_PLAIN_ROTARY: Mapping[str, tuple[Any, ...]] = {
    "rope_type": ("default", None),
    "type": ("default", None),
    "factor": (1, None),
    "partial_rotary_factor": (1, None),
}
"""What `rope_parameters` and `rope_scaling` may say beside `rope_theta`: positions as they are, unscaled."""


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


def rotary_base(raw: Mapping[str, Any], default: float | None = None) -> float | None:
    """The rotary base of a parsed `config.json`, wherever it stands; None where it is not there and has no default.

    transformers 4 writes `rope_theta`, transformers 5 `rope_parameters: {"rope_type": "default", "rope_theta": ...}`,
    and either may be in a file, or both. Raises ArtifactError where positions are scaled, which is not implemented, and
    where two places name different bases.
    """
    found = {} if raw.get("rope_theta") is None else {"rope_theta": raw["rope_theta"]}
    for section in ("rope_parameters", "rope_scaling"):
        given = raw.get(section)
        if given is None:
            continue
        plain = isinstance(given, Mapping) and all(
            key == "rope_theta" or value in _PLAIN_ROTARY.get(key, ()) for key, value in given.items()
        )
        if not plain:
            raise ArtifactError(f"config.json: {section} is {given!r}; only unscaled rotary positions are implemented")
        if given.get("rope_theta") is not None:
            found[f"{section}.rope_theta"] = given["rope_theta"]
    if len(set(found.values())) > 1:
        raise ArtifactError(f"config.json: two rotary bases, {found}")
    return next(iter(found.values()), default)


def leave_out_frequencies(tensors: Mapping[str, Tensor], size: int, theta: float) -> dict[str, Tensor]:
    """The tensors without rotary frequencies, which older files hold beside the weights and every model computes.

    Frequencies of another base or head size than the config's are an ArtifactError.
    """
    left = dict(tensors)
    expected = rotary_frequencies(size, theta, torch.device("cpu"))
    for name in [name for name in left if name.endswith("rotary_emb.inv_freq")]:
        got = left.pop(name)
        # A file in half precision rounds the frequencies; another base is further off than that.
        rtol = 1e-2 if got.element_size() < 4 else 1e-4
        if got.shape != expected.shape or not torch.allclose(got.float(), expected, rtol=rtol, atol=0):
            raise ArtifactError(f"{name} holds other rotary frequencies than those of base {theta:g} in config.json")
    return left
