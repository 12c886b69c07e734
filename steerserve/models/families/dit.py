"""The diffusion transformer (DiT) of MDLM and SEDD: rotary attention, and norms modulated by the noise level.

Architecture: SEDD (arXiv 2310.16834) and MDLM (arXiv 2406.07524), which follow DiT's adaptive layer norms (arXiv
2212.09748). Below `backbone`, module names are the checkpoints' tensor names.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from steerserve.errors import ArtifactError
from steerserve.models.attention import attend, padding_mask, taken, turned_to
from steerserve.models.base import DiffusionLM, ModelFacts, Sites
from steerserve.models.layers import run_layers
from steerserve.models.llama import rotate, rotation

_NOISE_FEATURES = 256
_PERIOD = 10000.0
ROTARY_BASE = 10000.0
_TILE = 16
"""Matrix products of fewer rows take other kernels on CPUs: so many noise levels at least, and rows never differ."""


@dataclass(frozen=True)
class DitConfig:
    """Sizes of a DiT."""

    vocab_size: int
    hidden_size: int
    cond_dim: int
    num_layers: int
    num_heads: int
    conditional: bool
    """True if the modulations follow the noise level; otherwise they are constants of the checkpoint."""


def check_heads(**sizes: int) -> None:
    """Raise ArtifactError where the first size, the width, is not the second, the heads, times an even number."""
    (width_name, width), (heads_name, heads) = sizes.items()
    if width % (2 * heads):
        raise ArtifactError(f"config.json: {width_name} {width} must be {heads_name} {heads} times an even number")


class Embedding(nn.Module):
    """Token embedding, a bare parameter [vocab_size, hidden_size]."""

    def __init__(self, vocab_size: int, width: int) -> None:
        super().__init__()
        self.embedding = nn.Parameter(torch.randn(vocab_size, width))

    def forward(self, tokens: Tensor) -> Tensor:
        return F.embedding(tokens, self.embedding)


class SigmaMap(nn.Module):
    """Condition vector silu(mlp(features)) of a noise level, in float32 whatever the weights are.

    The features are the cosines, then the sines, of sigma * exp(-log(10000) i / 128), i from 0 to 127.
    """

    def __init__(self, cond_dim: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(_NOISE_FEATURES, cond_dim), nn.SiLU(), nn.Linear(cond_dim, cond_dim))

    def forward(self, sigma: Tensor) -> Tensor:
        """sigma [rows] -> [rows, cond_dim] float32."""
        half = _NOISE_FEATURES // 2
        steps = torch.arange(half, device=sigma.device, dtype=torch.float32)
        angles = sigma.float()[:, None] * torch.exp(-math.log(_PERIOD) * steps / half)
        x = torch.cat([angles.cos(), angles.sin()], dim=-1)
        layers: Any = self.mlp
        for layer in (layers[0], layers[2]):
            x = F.silu(F.linear(x, layer.weight.float(), layer.bias.float()))
        return x


class Constant(nn.Module):
    """The modulation of a model whose noise level never changes, computed once when its checkpoint is read."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.constant = nn.Parameter(torch.zeros(width))

    def forward(self, condition: Tensor | None) -> Tensor:  # noqa: ARG002 (stands in for a linear layer)
        return self.constant


def modulation(config: DitConfig, parts: int) -> nn.Module:
    """What gives the `parts` * hidden_size shifts, scales and gates of a layer."""
    width = parts * config.hidden_size
    return nn.Linear(config.cond_dim, width) if config.conditional else Constant(width)


def modulated(layer: nn.Module, condition: Tensor | None, rows: int, parts: int) -> tuple[Tensor, ...]:
    """The shifts, scales and gates of `rows` rows, of a condition that is padded with more."""
    out: Tensor = layer(condition)
    return (out if condition is None else out[:rows]).chunk(parts, dim=-1)


class AdaptiveNorm(nn.Module):
    """norm(x) * weight * (1 + scale) + shift in float32, without a bias of its own."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
        # In this order: the published layers round after the weight, after the scale and after the shift.
        normed = F.layer_norm(x.float(), self.weight.shape) * self.weight.float()
        return (normed * (1 + scale.float()) + shift.float()).to(x.dtype)


class Block(nn.Module):
    def __init__(self, config: DitConfig) -> None:
        super().__init__()
        width = config.hidden_size
        self.heads = config.num_heads
        self.norm1 = AdaptiveNorm(width)
        self.attn_qkv = nn.Linear(width, 3 * width, bias=False)
        self.attn_out = nn.Linear(width, width, bias=False)
        self.norm2 = AdaptiveNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(approximate="tanh"), nn.Linear(4 * width, width))
        self.adaLN_modulation = modulation(config, 6)

    def forward(
        self,
        hidden: Tensor,
        condition: Tensor | None,
        turns: tuple[Tensor, Tensor],
        mask: Tensor | None,
        at: Tensor | None,
    ) -> Tensor:
        """Next states; at: the positions asked for, which only the last block is given."""
        shift, scale, gate, mlp_shift, mlp_scale, mlp_gate = modulated(self.adaLN_modulation, condition, len(hidden), 6)
        normed = self.norm1(hidden, shift, scale)
        if at is None:
            query, key, value = self.attn_qkv(normed).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        else:
            weight, width = self.attn_qkv.weight, hidden.shape[2]
            own: Tensor = F.linear(taken(normed, at), weight[:width])
            others: Tensor = F.linear(normed, weight[width:])
            query = own.view(*own.shape[:2], self.heads, -1).transpose(1, 2)
            key, value = others.view(*others.shape[:2], 2, self.heads, -1).permute(2, 0, 3, 1, 4)
        mixed = attend(rotate(query, *turned_to(turns, at)), rotate(key, *turns), value, mask)
        hidden = taken(hidden, at) + gate * self.attn_out(mixed)
        out: Tensor = hidden + mlp_gate * self.mlp(self.norm2(hidden, mlp_shift, mlp_scale))
        return out


class OutputLayer(nn.Module):
    """The last modulated norm; `linear` gives the logits."""

    def __init__(self, config: DitConfig) -> None:
        super().__init__()
        self.norm_final = AdaptiveNorm(config.hidden_size)
        self.linear = nn.Linear(config.hidden_size, config.vocab_size)
        self.adaLN_modulation = modulation(config, 2)

    def forward(self, hidden: Tensor, condition: Tensor | None) -> Tensor:
        shift, scale = modulated(self.adaLN_modulation, condition, len(hidden), 2)
        out: Tensor = self.norm_final(hidden, shift, scale)
        return out


class Dit(nn.Module):
    """The transformer of a checkpoint; `sigma_map` is there where the modulations follow the noise level."""

    def __init__(self, config: DitConfig) -> None:
        super().__init__()
        self.head_size = config.hidden_size // config.num_heads
        self.vocab_embed = Embedding(config.vocab_size, config.hidden_size)
        self.sigma_map = SigmaMap(config.cond_dim) if config.conditional else None
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        self.output_layer = OutputLayer(config)

    def forward(
        self,
        tokens: Tensor,
        lengths: Tensor | None,
        sites: Sites | None,
        sigma: Tensor | None,
        at: Tensor | None,
    ) -> Tensor:
        """Final hidden states; the arguments are those of `DiffusionLM.forward`."""
        hidden: Tensor = self.vocab_embed(tokens)
        condition = None
        if self.sigma_map is not None:
            if sigma is None or sigma.shape != tokens.shape[:1]:
                got = None if sigma is None else list(sigma.shape)
                raise ValueError(f"sigma must be [{len(tokens)}], one noise level a row, got {got}")
            levels = F.pad(sigma, (0, max(0, _TILE - len(sigma))))
            condition = self.sigma_map(levels)[:, None].to(hidden.dtype)
        length = tokens.shape[1]
        turns = rotation(length, self.head_size, ROTARY_BASE, tokens.device)
        mask = padding_mask(lengths, length, tokens.device)
        hidden = run_layers(self.blocks, hidden, condition, turns, mask, sites=sites, at=at)
        out: Tensor = self.output_layer(hidden, condition)
        return out


class DitDiffusionLM(DiffusionLM):
    """A diffusion language model over a DiT; sites are the outputs of its blocks."""

    def __init__(self, config: DitConfig, facts: ModelFacts) -> None:
        super().__init__()
        self.config = config
        self.facts = facts
        self.backbone = Dit(config)

    def forward(
        self,
        tokens: Tensor,
        lengths: Tensor | None = None,
        sites: Sites | None = None,
        sigma: Tensor | None = None,
        at: Tensor | None = None,
    ) -> Tensor:
        """Final hidden states; raises ValueError where the model follows the noise level and sigma is not [rows]."""
        out: Tensor = self.backbone(tokens, lengths, sites, sigma, at)
        return out

    def head(self, hidden: Tensor) -> Tensor:
        """Output [..., vocab_size] of the last linear layer, as it is."""
        out: Tensor = self.backbone.output_layer.linear(hidden)
        return out
