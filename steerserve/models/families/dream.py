"""The Dream family: a bidirectional Qwen2, in the layout of `Dream-org/Dream-v0-*-7B` and DiffuCoder.

Architecture: Dream 7B (arXiv 2508.15487, section 2) over Qwen2.5 (arXiv 2412.15115): pre-norm RMS blocks, grouped
queries with biases on q, k and v, rotate-half rotary positions in the dtype of the states, SwiGLU, full attention. The
model was an autoregressive one, so the state of position i decides token i + 1: `facts.shift` is 1 and the states are
not moved.
Module names are the checkpoint's tensor names, so loading is a strict `load_state_dict`.
"""

import math
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from steerserve.errors import ArtifactError
from steerserve.models.attention import taken
from steerserve.models.base import (
    ModelFacts,
    SamplerDefaults,
    check_fixed,
    check_sizes,
    read_fields,
)
from steerserve.models.decoder import Attention, DecoderLM, SwiGlu, adapted
from steerserve.models.llama import RmsNorm, rotary_base
from steerserve.models.memory import Keep

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


class Layer(nn.Module):
    def __init__(self, config: DreamConfig) -> None:
        super().__init__()
        self.input_layernorm = RmsNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(
            config.hidden_size, config.num_attention_heads, config.num_key_value_heads, config.head_size, bias=True
        )
        self.post_attention_layernorm = RmsNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = SwiGlu(config.hidden_size, config.intermediate_size)

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


class DreamDiffusionLM(DecoderLM):
    """Dream; sites are the outputs of its layers."""

    # The settings of the authors' own example (README of HKUNLP/Dream): alg "entropy", temperature 0.2, top_p 0.95.
    defaults = SamplerDefaults(
        temperature=0.2, top_p=0.95, order={"type": "entropy", "filtered": True}, transfer="timesteps"
    )

    def __init__(self, config: DreamConfig) -> None:
        super().__init__(config, (Layer(config) for _ in range(config.num_hidden_layers)))
        self.config = config
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
        return adapted(_read(raw), tensors)


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
