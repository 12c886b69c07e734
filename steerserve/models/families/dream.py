"""The Dream family: a bidirectional Qwen2, in the layout of `Dream-org/Dream-v0-*-7B` and DiffuCoder.

Architecture: Dream 7B (arXiv 2508.15487, section 2) over Qwen2.5 (arXiv 2412.15115): pre-norm RMS blocks, grouped
queries with biases on q, k and v, rotate-half rotary positions in the dtype of the states, SwiGLU, full attention. The
model was an autoregressive one, so the state of position i decides token i + 1: `facts.shift` is 1 and the states are
not moved.
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

# What the published checkpoints say or leave out, and all that this family implements; any other value is refused on
# load. A block size is that of Dream's block-wise successors, which bear the same model_type and are not shifted.
_FIXED: dict[str, Any] = {
    "hidden_act": "silu",
    "use_mrope": False,
    "use_sliding_window": False,
    "block_size": None,
}

# <|im_end|> of Qwen2.5's vocabulary, which every published checkpoint uses; a config does not name it.
_TURN_END = 151645


@dataclass(frozen=True)
class DreamConfig:
    """Keys of `config.json` under their published names."""

    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    intermediate_size: int
    max_position_embeddings: int
    rope_theta: float
    mask_token_id: int
    eos_token_id: int
    head_dim: int | None = None
    rms_norm_eps: float = 1e-6
    tie_word_embeddings: bool = False

    @property
    def head_size(self) -> int:
        return self.head_dim or self.hidden_size // self.num_attention_heads


class Attention(nn.Module):
    def __init__(self, config: DreamConfig) -> None:
        super().__init__()
        width, self.size = config.hidden_size, config.head_size
        wide, narrow = config.num_attention_heads * self.size, config.num_key_value_heads * self.size
        self.q_proj = nn.Linear(width, wide)
        self.k_proj = nn.Linear(width, narrow)
        self.v_proj = nn.Linear(width, narrow)
        self.o_proj = nn.Linear(wide, width, bias=False)

    def forward(
        self,
        hidden: Tensor,
        turns: tuple[Tensor, Tensor],
        mask: Tensor | None,
        keep: Keep | None,
        at: Tensor | None,
    ) -> Tensor:
        query, key, value = (
            project(states).unflatten(-1, (-1, self.size)).transpose(1, 2)
            for project, states in ((self.q_proj, taken(hidden, at)), (self.k_proj, hidden), (self.v_proj, hidden))
        )
        key = rotate(key, *turns)
        if keep is not None:
            key, value = keep(key, value)
        out: Tensor = self.o_proj(attend(rotate(query, *turned_to(turns, at)), key, value, mask))
        return out


class Mlp(nn.Module):
    def __init__(self, config: DreamConfig) -> None:
        super().__init__()
        width, inner = config.hidden_size, config.intermediate_size
        self.gate_proj = nn.Linear(width, inner, bias=False)
        self.up_proj = nn.Linear(width, inner, bias=False)
        self.down_proj = nn.Linear(inner, width, bias=False)

    def forward(self, hidden: Tensor) -> Tensor:
        out: Tensor = self.down_proj(F.silu(self.gate_proj(hidden)) * self.up_proj(hidden))
        return out


class Layer(nn.Module):
    def __init__(self, config: DreamConfig) -> None:
        super().__init__()
        self.input_layernorm = RmsNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RmsNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = Mlp(config)

    def forward(
        self,
        hidden: Tensor,
        turns: tuple[Tensor, Tensor],
        mask: Tensor | None,
        at: Tensor | None = None,
        keep: Keep | None = None,
    ) -> Tensor:
        """Next states; at: the positions asked for, which only the last layer is given."""
        hidden = taken(hidden, at) + self.self_attn(self.input_layernorm(hidden), turns, mask, keep, at)
        out: Tensor = hidden + self.mlp(self.post_attention_layernorm(hidden))
        return out


class DreamDiffusionLM(TransformerLM):
    """Dream; sites are the outputs of its layers."""

    # The settings of the authors' own example (README of HKUNLP/Dream): alg "entropy", temperature 0.2, top_p 0.95.
    defaults = SamplerDefaults(
        temperature=0.2, top_p=0.95, order={"type": "entropy", "filtered": True}, transfer="timesteps"
    )

    def __init__(self, config: DreamConfig) -> None:
        super().__init__()
        self.config = config
        self.model = nn.ModuleDict(
            {
                "embed_tokens": nn.Embedding(config.vocab_size, config.hidden_size),
                "layers": nn.ModuleList(Layer(config) for _ in range(config.num_hidden_layers)),
                "norm": RmsNorm(config.hidden_size, config.rms_norm_eps),
            }
        )
        if not config.tie_word_embeddings:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.facts = ModelFacts(
            family="dream",
            vocab_size=config.vocab_size,
            hidden_size=config.hidden_size,
            num_layers=config.num_hidden_layers,
            max_length=config.max_position_embeddings,
            mask_id=config.mask_token_id,
            eos_id=config.eos_token_id,
            turn_end_id=_TURN_END if config.vocab_size > _TURN_END else None,
            shift=1,
            keys=(config.num_key_value_heads, config.head_size),
        )

    @classmethod
    def from_config(cls, raw: dict[str, Any]) -> "DreamDiffusionLM":
        """Build from a parsed `config.json`; a missing key, or a variant of Qwen2 that Dream does not use, is an
        ArtifactError naming the key, and its value and the one allowed.

        Where `eos_token_id` is left out it is `pad_token_id`: Dream pads with the end of text, and its own config class
        names only the latter.
        """
        return cls(_read(raw))

    @classmethod
    def adapt(cls, raw: dict[str, Any], tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """The checkpoint's tensors without rotary frequencies and without a tied head that was written out."""
        config = _read(raw)
        left = leave_out_frequencies(tensors, config.head_size, config.rope_theta)
        return leave_out_copies(
            left, {"lm_head.weight": "model.embed_tokens.weight"} if config.tie_word_embeddings else {}
        )

    def embed(self, tokens: Tensor, width: int, memory: Memory | None) -> tuple[Tensor, tuple[Any, ...]]:
        """Token embeddings; a layer takes the cosines and sines of its positions.

        Dream's own layers round them to the dtype of the states, and rotate in it.
        """
        model: Any = self.model
        hidden = model["embed_tokens"](tokens)
        cos, sin = rotation(width, self.config.head_size, self.config.rope_theta, tokens.device)
        turns = (cos.to(hidden.dtype), sin.to(hidden.dtype))
        return hidden, (turns if memory is None else memory.turned(turns),)

    def layers(self) -> Iterable[nn.Module]:
        """The decoder layers."""
        model: Any = self.model
        layers: nn.ModuleList = model["layers"]
        return layers

    def normalise(self, hidden: Tensor) -> Tensor:
        """The last norm."""
        model: Any = self.model
        out: Tensor = model["norm"](hidden)
        return out

    def head(self, hidden: Tensor) -> Tensor:
        """Logits [..., vocab_size] of hidden states [..., hidden_size]."""
        model: Any = self.model
        weight = model["embed_tokens"].weight if self.config.tie_word_embeddings else self.lm_head.weight
        return F.linear(hidden, weight)


def _read(raw: dict[str, Any]) -> DreamConfig:
    """The family's keys of a parsed `config.json`, checked."""
    check_fixed(raw, "dream", _FIXED)
    if any(kind != "full_attention" for kind in raw.get("layer_types") or ()):
        raise ArtifactError(
            f"config.json: layer_types is {raw['layer_types']!r}, the dream family implements 'full_attention'"
        )
    given: dict[str, Any] = {name: value for name, value in raw.items() if value is not None}
    base = rotary_base(raw)
    given |= {} if base is None else {"rope_theta": base}
    if "pad_token_id" in given:
        given.setdefault("eos_token_id", given["pad_token_id"])
    config = read_fields(DreamConfig, given, "dream")
    check_sizes(
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        num_hidden_layers=config.num_hidden_layers,
        num_attention_heads=config.num_attention_heads,
        num_key_value_heads=config.num_key_value_heads,
        intermediate_size=config.intermediate_size,
        max_position_embeddings=config.max_position_embeddings,
        **({} if config.head_dim is None else {"head_dim": config.head_dim}),
    )
    for name in ("rope_theta", "rms_norm_eps"):
        value = getattr(config, name)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
            raise ArtifactError(f"config.json: {name} must be a finite number above 0, got {value!r}")
    if not isinstance(config.tie_word_embeddings, bool):
        raise ArtifactError(
            f"config.json: tie_word_embeddings must be true or false, got {config.tie_word_embeddings!r}"
        )
    if config.head_dim is None and config.hidden_size % config.num_attention_heads:
        raise ArtifactError(
            f"config.json: num_attention_heads {config.num_attention_heads} must divide "
            f"hidden_size {config.hidden_size} where head_dim is not given"
        )
    if config.head_size % 2:
        raise ArtifactError(f"config.json: the size of a head must be even, got {config.head_size}")
    if config.num_attention_heads % config.num_key_value_heads:
        raise ArtifactError(
            f"config.json: num_attention_heads {config.num_attention_heads} must be a multiple of "
            f"num_key_value_heads {config.num_key_value_heads}"
        )
    return config
