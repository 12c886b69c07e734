"""The LLaDA-MoE family: a LLaDA whose blocks choose experts, in the layout of `inclusionAI/LLaDA-MoE-7B-A1B-*`.

Architecture: LLaDA-MoE (arXiv 2509.24389, section 2) over OLMoE's module names: pre-norm RMS blocks, RMS norms of each
head's queries and keys, rotate-half rotary positions in the dtype of the states, no biases, full attention, prediction
at the same position. A router gives every token its experts, which are SwiGLU networks: see `Experts`.
Module names are the checkpoint's tensor names, so loading is a strict `load_state_dict`.
"""

from dataclasses import dataclass
from typing import Any, Final

import torch
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
from steerserve.models.experts import each_expert
from steerserve.models.llama import RmsNorm, rotary_base
from steerserve.models.memory import Keep

# What the published checkpoints say or leave out, and all that this family implements; any other value is refused on
# load. The router's groups, scale and normalisation stand in a config, and the published network has none of them.
_FIXED: dict[str, Any] = {
    "hidden_act": "silu",
    "attention_bias": False,
    "clip_qkv": None,
    "partial_rotary_factor": 1,
    "routed_scaling_factor": 1,
    "norm_topk_prob": False,
}
_UNSET: Final = (None, 0, 1)
"""Values of the keys of `_GROUPS` that ask for nothing."""
_GROUPS: Final = ("router_num_group", "router_topk_group")

# <|mask|>, <|endoftext|> and <|role_end|> of the published vocabulary; a config may name none of them.
_MASK, _END_OF_TEXT, _TURN_END = 156895, 156892, 156900


@dataclass(frozen=True)
class LladaMoeConfig:
    """Keys of `config.json` under their published names."""

    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    expert_intermediate_size: int
    num_experts: int
    num_experts_per_tok: int
    moe_layer_freq: tuple[int, ...]
    """For each layer, 0 where it has one network for all tokens."""
    rope_theta: float
    mask_token_id: int = _MASK
    eos_token_id: int = _END_OF_TEXT
    num_key_value_heads: int | None = None
    dense_intermediate_size: int | None = None
    shared_expert_intermediate_size: int | None = None
    """Size of the expert that every token has beside its own; None: there is none."""
    max_position_embeddings: int = 4096
    rms_norm_eps: float = 1e-5
    qk_layernorm: bool = False
    moe_router_enable_expert_bias: bool = False
    tie_word_embeddings: bool = False

    @property
    def kv_heads(self) -> int:
        return self.num_key_value_heads or self.num_attention_heads

    @property
    def head_size(self) -> int:
        return self.hidden_size // self.num_attention_heads


class Experts(nn.Module):
    """The sum of what each token's experts make of it, by the chances that the router gives them.

    The chances are those of a softmax over all experts in float32, of which the largest are taken as they are: they do
    not add up to 1. An expert's bias, where a checkpoint has biases, is added to its chance.
    """

    def __init__(self, config: LladaMoeConfig) -> None:
        super().__init__()
        self.chosen = config.num_experts_per_tok
        self.gate = nn.Linear(config.hidden_size, config.num_experts, bias=False)
        self.experts = nn.ModuleList(
            SwiGlu(config.hidden_size, config.expert_intermediate_size) for _ in range(config.num_experts)
        )
        self.expert_bias: Tensor | None
        self.register_buffer(
            "expert_bias", torch.zeros(config.num_experts) if config.moe_router_enable_expert_bias else None
        )

    def forward(self, hidden: Tensor) -> Tensor:
        states = hidden.flatten(0, -2)
        chances = self.gate(states).softmax(dim=1, dtype=torch.float32)
        chances = chances if self.expert_bias is None else chances + self.expert_bias
        share, expert = chances.topk(self.chosen, dim=1)
        share = share.to(states.dtype)
        mixed = torch.zeros_like(states)
        for token, rank, made in each_expert(self.experts, states, expert):
            mixed.index_add_(0, token, made * share[token, rank, None])
        return mixed.view_as(hidden)


class Layer(nn.Module):
    def __init__(self, config: LladaMoeConfig, sparse: bool) -> None:
        super().__init__()
        width, shared = config.hidden_size, config.shared_expert_intermediate_size
        self.input_layernorm = RmsNorm(width, config.rms_norm_eps)
        self.self_attn = Attention(
            width,
            config.num_attention_heads,
            config.kv_heads,
            config.head_size,
            norm_eps=config.rms_norm_eps if config.qk_layernorm else None,
        )
        self.post_attention_layernorm = RmsNorm(width, config.rms_norm_eps)
        self.mlp = Experts(config) if sparse else SwiGlu(width, config.dense_intermediate_size or 0)
        self.shared_expert = SwiGlu(width, shared) if sparse and shared is not None else None

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
        normed = self.post_attention_layernorm(hidden)
        made = self.mlp(normed)
        made = made if self.shared_expert is None else made + self.shared_expert(normed)
        out: Tensor = hidden + made
        return out


class LladaMoeDiffusionLM(DecoderLM):
    """LLaDA-MoE; sites are the outputs of its layers."""

    # Those of the authors' `generate`, which is LLaDA's.
    defaults = SamplerDefaults(temperature=0.0, order="confidence", transfer="linear")

    def __init__(self, config: LladaMoeConfig) -> None:
        super().__init__(config, (Layer(config, sparse=bool(sparse)) for sparse in config.moe_layer_freq))
        self.config = config
        self.facts = ModelFacts(
            family="lladamoe",
            vocab_size=config.vocab_size,
            hidden_size=config.hidden_size,
            num_layers=config.num_hidden_layers,
            max_length=config.max_position_embeddings,
            mask_id=config.mask_token_id,
            eos_id=config.eos_token_id,
            turn_end_id=_TURN_END if config.vocab_size > _TURN_END else None,
            keys=(config.kv_heads, config.head_size),
        )

    @classmethod
    def from_config(cls, raw: dict[str, Any]) -> "LladaMoeDiffusionLM":
        """Build from a parsed `config.json`; a missing key, or a variant that is not implemented, is an ArtifactError
        naming the key, and its value and the one allowed."""
        return cls(_read(raw))

    @classmethod
    def adapt(cls, raw: dict[str, Any], tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """The checkpoint's tensors without rotary frequencies and without a tied head that was written out."""
        return adapted(_read(raw), tensors)


def _read(raw: dict[str, Any]) -> LladaMoeConfig:
    """The family's keys of a parsed `config.json`, checked."""
    given: dict[str, Any] = {name: value for name, value in raw.items() if value is not None}
    check_fixed(given, "lladamoe", _FIXED)
    if given.get("moe_router_score_function", "softmax") != "softmax":
        raise ArtifactError(
            f"config.json: moe_router_score_function is {given['moe_router_score_function']!r}, the lladamoe family "
            "implements 'softmax'"
        )
    for name in _GROUPS:
        if raw.get(name) not in _UNSET:
            raise ArtifactError(f"config.json: {name} is {raw[name]!r}, which the published LLaDA-MoE has not")
    base = rotary_base(raw)
    given |= {} if base is None else {"rope_theta": base}
    config = read_fields(LladaMoeConfig, given, "lladamoe")
    check_sizes(
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        num_hidden_layers=config.num_hidden_layers,
        num_attention_heads=config.num_attention_heads,
        expert_intermediate_size=config.expert_intermediate_size,
        num_experts=config.num_experts,
        num_experts_per_tok=config.num_experts_per_tok,
        max_position_embeddings=config.max_position_embeddings,
        num_key_value_heads=config.kv_heads,
    )
    layers = config.moe_layer_freq
    if not isinstance(layers, list | tuple) or len(layers) != config.num_hidden_layers:
        raise ArtifactError(
            f"config.json: moe_layer_freq must tell of each of {config.num_hidden_layers} layers, got {layers!r}"
        )
    if not all(layers):
        check_sizes(dense_intermediate_size=config.dense_intermediate_size)
    if config.shared_expert_intermediate_size is not None:
        check_sizes(shared_expert_intermediate_size=config.shared_expert_intermediate_size)
    if config.num_experts_per_tok > config.num_experts:
        raise ArtifactError(
            f"config.json: num_experts_per_tok {config.num_experts_per_tok} is more than num_experts "
            f"{config.num_experts}"
        )
    if config.hidden_size % config.num_attention_heads or config.head_size % 2:
        raise ArtifactError(
            f"config.json: hidden_size {config.hidden_size} must be an even number for each of num_attention_heads "
            f"{config.num_attention_heads}"
        )
    if config.num_attention_heads % config.kv_heads:
        raise ArtifactError(
            f"config.json: num_attention_heads {config.num_attention_heads} must be a multiple of "
            f"num_key_value_heads {config.kv_heads}"
        )
    return config
