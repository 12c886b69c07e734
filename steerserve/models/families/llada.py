"""The LLaDA family: a bidirectional Llama-shaped transformer, in the layout of `GSAI-ML/LLaDA-8B-*`.

Architecture: LLaDA (arXiv 2502.09992, section 2) over OLMo's module names: pre-norm RMS blocks, rotate-half rotary
positions in float32, SwiGLU, no biases, full attention, prediction at the same position.
Module names are the checkpoint's tensor names, so loading is a strict `load_state_dict`.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from steerserve.errors import ArtifactError
from steerserve.models.attention import attend, taken, turned_to
from steerserve.models.base import (
    ModelFacts,
    SamplerDefaults,
    check_fixed,
    check_sizes,
    read_fields,
)
from steerserve.models.layers import TransformerLM
from steerserve.models.llama import RmsNorm, leave_out_frequencies, rotary_base, rotate, rotation
from steerserve.models.memory import Keep, Memory
from steerserve.models.state_dict import leave_out_copies

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
    "clip_qkv": None,
}

# <|endoftext|> and <|eot_id|> of the published vocabulary; a config names only the former.
_END_OF_TEXT, _TURN_END = 126081, 126348


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

    def forward(
        self,
        hidden: Tensor,
        turns: tuple[Tensor, Tensor],
        mask: Tensor | None,
        at: Tensor | None = None,
        keep: Keep | None = None,
    ) -> Tensor:
        """Next states; at: the positions asked for, which only the last block is given."""
        normed = self.attn_norm(hidden)
        query = self.q_proj(taken(normed, at)).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        query = rotate(query, *turned_to(turns, at))
        key = rotate(self.k_proj(normed).unflatten(-1, (self.kv_heads, -1)).transpose(1, 2), *turns)
        value = self.v_proj(normed).unflatten(-1, (self.kv_heads, -1)).transpose(1, 2)
        if keep is not None:
            key, value = keep(key, value)
        hidden = taken(hidden, at) + self.attn_out(attend(query, key, value, mask))
        normed = self.ff_norm(hidden)
        out: Tensor = hidden + self.ff_out(F.silu(self.ff_proj(normed)) * self.up_proj(normed))
        return out


class LladaDiffusionLM(TransformerLM):
    """LLaDA; sites are the outputs of its blocks."""

    # Those of the authors' `generate`: low-confidence remasking at temperature 0, as many tokens at every step.
    defaults = SamplerDefaults(temperature=0.0, order="confidence", transfer="linear")

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
            turn_end_id=_TURN_END if config.eos_token_id == _END_OF_TEXT and config.vocab_size > _TURN_END else None,
            keys=(config.kv_heads, config.d_model // config.n_heads),
        )

    @classmethod
    def from_config(cls, raw: dict[str, Any]) -> "LladaDiffusionLM":
        """Build from a parsed `config.json`; a missing key or a variant of OLMo that LLaDA does not use is
        an ArtifactError naming the key, its value and the one allowed, as are a mixture of experts and scaled rotary
        positions."""
        return cls(_read(raw))

    @classmethod
    def adapt(cls, raw: dict[str, Any], tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """The checkpoint's tensors without rotary frequencies and without a tied head that was written out."""
        config = _read(raw)
        left = leave_out_frequencies(tensors, config.d_model // config.n_heads, config.rope_theta)
        copies = {"model.transformer.ff_out.weight": "model.transformer.wte.weight"} if config.weight_tying else {}
        return leave_out_copies(left, copies)

    def embed(self, tokens: Tensor, width: int, memory: Memory | None) -> tuple[Tensor, tuple[Any, ...]]:
        """Token embeddings; a block takes the cosines and sines of its positions."""
        transformer: Any = self.model["transformer"]
        size = self.config.d_model // self.config.n_heads
        turns = rotation(width, size, self.config.rope_theta, tokens.device)
        return transformer["wte"](tokens), (turns if memory is None else memory.turned(turns),)

    def layers(self) -> Iterable[nn.Module]:
        """The blocks."""
        transformer: Any = self.model["transformer"]
        blocks: nn.ModuleList = transformer["blocks"]
        return blocks

    def normalise(self, hidden: Tensor) -> Tensor:
        """The last norm."""
        transformer: Any = self.model["transformer"]
        out: Tensor = transformer["ln_f"](hidden)
        return out

    def head(self, hidden: Tensor) -> Tensor:
        """Logits [..., vocab_size]; rows past the vocabulary are cut off."""
        transformer: Any = self.model["transformer"]
        weight = transformer["wte"].weight if self.config.weight_tying else transformer["ff_out"].weight
        logits = F.linear(hidden, weight[: self.config.vocab_size])
        return logits * (1 / math.sqrt(self.config.d_model)) if self.config.scale_logits else logits


def _read(raw: dict[str, Any]) -> LladaConfig:
    """The family's keys of a parsed `config.json`, checked."""
    check_fixed(raw, "llada", _FIXED)
    config = read_fields(LladaConfig, dict(raw) | {"rope_theta": rotary_base(raw, LladaConfig.rope_theta)}, "llada")
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
    for name, value in {"rope_theta": config.rope_theta, "rms_norm_eps": config.rms_norm_eps}.items():
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < float("inf"):
            raise ArtifactError(f"config.json: {name} must be a finite number above 0, got {value!r}")
    for name, flag in {"weight_tying": config.weight_tying, "scale_logits": config.scale_logits}.items():
        if not isinstance(flag, bool):
            raise ArtifactError(f"config.json: {name} must be true or false, got {flag!r}")
    if config.d_model % (2 * config.n_heads) or config.n_heads % config.kv_heads:
        raise ArtifactError(
            f"config.json: d_model {config.d_model} must be n_heads {config.n_heads} times an even number, "
            f"and n_heads a multiple of n_kv_heads {config.kv_heads}"
        )
    if config.rows < config.vocab_size:
        raise ArtifactError(f"config.json: embedding_size {config.rows} is less than vocab_size {config.vocab_size}")
    return config
