"""The LLaDA family: a bidirectional Llama-shaped transformer, in the layout of `GSAI-ML/LLaDA-8B-*`.

Architecture: LLaDA (arXiv 2502.09992, section 2) over OLMo's module names: pre-norm RMS blocks, rotate-half rotary
positions in float32, SwiGLU, no biases, full attention, prediction at the same position.
Module names are the checkpoint's tensor names, so loading is a strict `load_state_dict`.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from steerserve.errors import ArtifactError
from steerserve.models.base import DiffusionLM, ModelFacts, Sites, check_fixed, check_sizes, padding_mask

# What the published checkpoints say, and all that this family implements; any other value is refused on load.
_FIXED: dict[str, Any] = {
    "block_type": "llama",
    "layer_norm_type": "rms",
    "activation_type": "silu",
    "rope": True,
    "rope_full_precision": True,
    "alibi": False,
    "attention_layer_norm": False,
    "include_bias": False,
    "include_qkv_bias": False,
    "bias_for_layer_norm": False,
    "input_emb_norm": False,
    "layer_norm_with_affine": True,
    "multi_query_attention": None,
    "block_group_size": 1,
}


@dataclass(frozen=True)
class LladaConfig:
    """Keys of `config.json` under their published names."""

    d_model: int
    n_layers: int
    n_heads: int
    vocab_size: int
    max_sequence_length: int
    mask_token_id: int
    eos_token_id: int
    n_kv_heads: int | None = None
    mlp_hidden_size: int | None = None
    mlp_ratio: int = 4
    embedding_size: int | None = None
    rope_theta: float = 10000.0
    rms_norm_eps: float = 1e-5
    weight_tying: bool = False
    scale_logits: bool = False

    @property
    def kv_heads(self) -> int:
        return self.n_kv_heads or self.n_heads

    @property
    def inner(self) -> int:
        return self.mlp_hidden_size or self.mlp_ratio * self.d_model

    @property
    def rows(self) -> int:
        """Rows of the embedding and the head, which may be padded past the vocabulary."""
        return self.embedding_size or self.vocab_size


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


class Block(nn.Module):
    def __init__(self, config: LladaConfig) -> None:
        super().__init__()
        width, head = config.d_model, config.d_model // config.n_heads
        self.heads, self.kv_heads = config.n_heads, config.kv_heads
        self.attn_norm = RmsNorm(width, config.rms_norm_eps)
        self.ff_norm = RmsNorm(width, config.rms_norm_eps)
        self.q_proj = nn.Linear(width, width, bias=False)
        self.k_proj = nn.Linear(width, head * config.kv_heads, bias=False)
        self.v_proj = nn.Linear(width, head * config.kv_heads, bias=False)
        self.attn_out = nn.Linear(width, width, bias=False)
        self.ff_proj = nn.Linear(width, config.inner, bias=False)
        self.up_proj = nn.Linear(width, config.inner, bias=False)
        self.ff_out = nn.Linear(config.inner, width, bias=False)

    def forward(self, hidden: Tensor, rotation: tuple[Tensor, Tensor], mask: Tensor | None) -> Tensor:
        normed = self.attn_norm(hidden)
        query = rotate(self.q_proj(normed).unflatten(-1, (self.heads, -1)).transpose(1, 2), *rotation)
        key = rotate(self.k_proj(normed).unflatten(-1, (self.kv_heads, -1)).transpose(1, 2), *rotation)
        value = self.v_proj(normed).unflatten(-1, (self.kv_heads, -1)).transpose(1, 2)
        mixed = F.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, enable_gqa=self.kv_heads != self.heads
        )
        hidden = hidden + self.attn_out(mixed.transpose(1, 2).flatten(2))
        normed = self.ff_norm(hidden)
        out: Tensor = hidden + self.ff_out(F.silu(self.ff_proj(normed)) * self.up_proj(normed))
        return out


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate-half rotary embedding of x [rows, heads, length, head size] in float32."""
    first, second = x.float().chunk(2, dim=-1)
    return (x.float() * cos + torch.cat([-second, first], dim=-1) * sin).to(x.dtype)


class LladaDiffusionLM(DiffusionLM):
    """LLaDA; sites are the outputs of its blocks."""

    def __init__(self, config: LladaConfig) -> None:
        super().__init__()
        self.config = config
        parts: dict[str, nn.Module] = {
            "wte": nn.Embedding(config.rows, config.d_model),
            "blocks": nn.ModuleList(Block(config) for _ in range(config.n_layers)),
            "ln_f": RmsNorm(config.d_model, config.rms_norm_eps),
        }
        if not config.weight_tying:
            parts["ff_out"] = nn.Linear(config.d_model, config.rows, bias=False)
        self.model = nn.ModuleDict({"transformer": nn.ModuleDict(parts)})
        self.facts = ModelFacts(
            family="llada",
            vocab_size=config.vocab_size,
            hidden_size=config.d_model,
            num_layers=config.n_layers,
            max_length=config.max_sequence_length,
            mask_id=config.mask_token_id,
            eos_id=config.eos_token_id,
        )

    @classmethod
    def from_config(cls, raw: dict[str, Any]) -> "LladaDiffusionLM":
        """Build from a parsed `config.json`; a missing key is a TypeError, a variant of OLMo that LLaDA does not use
        an ArtifactError naming the key, its value and the one allowed."""
        check_fixed(raw, "llada", _FIXED)
        fields = LladaConfig.__dataclass_fields__
        config = LladaConfig(**{name: raw[name] for name in fields if name in raw})
        check_sizes(
            d_model=config.d_model,
            n_layers=config.n_layers,
            n_heads=config.n_heads,
            n_kv_heads=config.kv_heads,
            vocab_size=config.vocab_size,
            embedding_size=config.rows,
            max_sequence_length=config.max_sequence_length,
            mlp_hidden_size=config.inner,
        )
        if config.d_model % (2 * config.n_heads) or config.n_heads % config.kv_heads:
            raise ArtifactError(
                f"config.json: d_model {config.d_model} must be n_heads {config.n_heads} times an even number, "
                f"and n_heads a multiple of n_kv_heads {config.kv_heads}"
            )
        if config.rows < config.vocab_size:
            raise ArtifactError(
                f"config.json: embedding_size {config.rows} is less than vocab_size {config.vocab_size}"
            )
        return cls(config)

    def forward(
        self,
        tokens: Tensor,
        lengths: Tensor | None = None,
        sites: Sites | None = None,
        sigma: Tensor | None = None,  # noqa: ARG002 (the interface's; this family takes no noise level)
    ) -> Tensor:
        """See `DiffusionLM.forward`."""
        transformer: Any = self.model["transformer"]
        hidden = transformer["wte"](tokens)
        rotation = self.rotation(tokens.shape[1], tokens.device)
        mask = padding_mask(lengths, tokens.shape[1])
        for index, block in enumerate(transformer["blocks"]):
            hidden = block(hidden, rotation, mask)
            if sites is not None:
                hidden = sites(index, hidden)
        out: Tensor = transformer["ln_f"](hidden)
        return out

    def head(self, hidden: Tensor) -> Tensor:
        """See `DiffusionLM.head`; rows past the vocabulary are cut off."""
        transformer: Any = self.model["transformer"]
        weight = transformer["wte"].weight if self.config.weight_tying else transformer["ff_out"].weight
        logits = F.linear(hidden, weight[: self.config.vocab_size])
        return logits * self.config.d_model**-0.5 if self.config.scale_logits else logits

    def rotation(self, length: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """Cosines and sines [length, head size] of the positions 0 to length - 1, float32."""
        size = self.config.d_model // self.config.n_heads
        frequencies = self.config.rope_theta ** (-torch.arange(0, size, 2, device=device, dtype=torch.float32) / size)
        angles = torch.arange(length, device=device, dtype=torch.float32)[:, None] * frequencies
        angles = torch.cat([angles, angles], dim=-1)
        return angles.cos(), angles.sin()
