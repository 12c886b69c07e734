"""The LLaDA2 family: LLaDA2.0 and LLaDA2.1, in the layout of `inclusionAI/LLaDA2.X-mini` and `-flash`.

Architecture: LLaDA2.0 (arXiv 2512.15745) over Ling 2.0: pre-norm RMS blocks, grouped queries made with keys and values
by one matrix, RMS norms of each head's queries and keys, rotate-half rotary positions over the first part of each head,
attention causal between blocks of 32 and free within, prediction at the same position. The first layers have one SwiGLU
network for all tokens, the others a router, see `Router`, its experts, and one that every token has beside its own.
Module names are the checkpoint's tensor names, so loading is a strict `load_state_dict`.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from steerserve.errors import ArtifactError
from steerserve.models.attention import attend, mask_of, taken, turned_to
from steerserve.models.base import ModelFacts, SamplerDefaults, check_fixed, check_sizes, read_fields
from steerserve.models.decoder import DecoderLM, SwiGlu
from steerserve.models.experts import StackedExperts, may_stack, outputs
from steerserve.models.llama import RmsNorm, leave_out_frequencies, rotary_base, rotate
from steerserve.models.memory import Keep
from steerserve.models.state_dict import leave_out_copies

# What the published checkpoints say or leave out, and all that this family implements; any other value is refused on
# load.
_FIXED: Final[Mapping[str, Any]] = {
    "hidden_act": "silu",
    "norm_head": False,
    "use_sliding_window": False,
    "using_split_qkv_in_self_attention": False,
    "score_function": "sigmoid",
    "norm_topk_prob": True,
    "moe_router_enable_expert_bias": True,
    "num_nextn_predict_layers": 0,
}
# <|mask|> and <|endoftext|> of the published vocabulary, which `config.json` does not name by their roles.
_MASK, _END_OF_TEXT = 156895, 156892
_BLOCK: Final = 32
"""Length of the blocks that the published checkpoints were trained with; no config says it."""
TURN_END: Final = "<|role_end|>"
"""Token that ends a turn of the published chat template."""


@dataclass(frozen=True)
class Llada2Config:
    """Keys of `config.json` under their published names."""

    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    intermediate_size: int
    """Inner size of the first layers' networks."""
    moe_intermediate_size: int
    num_experts: int
    num_experts_per_tok: int
    n_group: int
    topk_group: int
    first_k_dense_replace: int
    """How many of the first layers have one network for all tokens."""
    max_position_embeddings: int
    rope_theta: float
    head_dim: int | None = None
    partial_rotary_factor: float = 0.5
    num_shared_experts: int | None = None
    routed_scaling_factor: float = 2.5
    rms_norm_eps: float = 1e-6
    use_qk_norm: bool = True
    use_qkv_bias: bool = False
    use_bias: bool = False
    tie_word_embeddings: bool = False
    block_size: int = _BLOCK
    mask_token_id: int = _MASK
    eos_token_id: int = _END_OF_TEXT
    turn_end_token_id: int | None = None

    @property
    def head_size(self) -> int:
        return self.head_dim or self.hidden_size // self.num_attention_heads

    @property
    def rotated(self) -> int:
        """How many numbers of a head are turned by position, from its first."""
        return int(self.head_size * self.partial_rotary_factor)


class Attention(nn.Module):
    """Grouped-query attention over the positions that a mask allows."""

    def __init__(self, config: Llada2Config) -> None:
        super().__init__()
        self.heads, self.kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.size, self.rotated = config.head_size, config.rotated
        width, norm_eps = config.hidden_size, config.rms_norm_eps
        self.query_key_value = nn.Linear(width, (self.heads + 2 * self.kv_heads) * self.size, bias=config.use_qkv_bias)
        self.query_layernorm = RmsNorm(self.size, norm_eps) if config.use_qk_norm else nn.Identity()
        self.key_layernorm = RmsNorm(self.size, norm_eps) if config.use_qk_norm else nn.Identity()
        self.dense = nn.Linear(self.heads * self.size, width, bias=config.use_bias)

    def forward(
        self,
        hidden: Tensor,
        turns: tuple[Tensor, Tensor],
        mask: Tensor | None,
        keep: Keep | None,
        at: Tensor | None,
    ) -> Tensor:
        made = self.query_key_value(hidden)
        parts = [count * self.size for count in (self.heads, self.kv_heads, self.kv_heads)]
        query, key, value = made.split(parts, dim=-1)
        query = self._turned(self.query_layernorm(self._heads(taken(query, at))), turned_to(turns, at))
        key = self._turned(self.key_layernorm(self._heads(key)), turns)
        value = self._heads(value)
        if keep is not None:
            key, value = keep(key, value)
        out: Tensor = self.dense(attend(query, key, value, mask_of(mask, at)))
        return out

    def _heads(self, states: Tensor) -> Tensor:
        """States [rows, length, heads * size] as [rows, heads, length, size]."""
        return states.view(*states.shape[:-1], -1, self.size).transpose(1, 2)

    def _turned(self, heads: Tensor, turns: tuple[Tensor, Tensor]) -> Tensor:
        """Heads [rows, heads, length, size], the first `rotated` numbers of each turned by position."""
        return torch.cat([rotate(heads[..., : self.rotated], *turns), heads[..., self.rotated :]], dim=-1)


class Router(nn.Module):
    """Chooses each token's experts, and how much each of them counts.

    The scores are sigmoids in float32. With each expert's bias added they decide: first which groups of experts, by the
    sum of the two best scores of a group, then which experts of these. The scores without bias are the shares, divided
    by their sum and times a factor.
    """

    def __init__(self, config: Llada2Config) -> None:
        super().__init__()
        self.chosen, self.groups, self.chosen_groups = config.num_experts_per_tok, config.n_group, config.topk_group
        self.factor = config.routed_scaling_factor
        self.weight = nn.Parameter(torch.empty(config.num_experts, config.hidden_size))
        self.expert_bias: Tensor
        self.register_buffer("expert_bias", torch.zeros(config.num_experts))

    def forward(self, states: Tensor) -> tuple[Tensor, Tensor]:
        """Experts [tokens, K] int64 of states [tokens, width], and their shares [tokens, K] float32."""
        scores = F.linear(states.float(), self.weight.float()).sigmoid()
        grouped = (scores + self.expert_bias).view(len(scores), self.groups, -1)
        best = grouped.topk(min(2, grouped.shape[2]), dim=2).values.sum(2).topk(self.chosen_groups, dim=1).indices
        outside = torch.ones_like(grouped[:, :, 0], dtype=torch.bool).scatter(1, best, False)
        expert = grouped.masked_fill(outside[:, :, None], -torch.inf).flatten(1).topk(self.chosen, dim=1).indices
        share = scores.gather(1, expert)
        if self.chosen > 1:
            share = share / (share.sum(1, keepdim=True) + 1e-20)
        return expert, share * self.factor


class Experts(nn.Module):
    """The sum of what each token's experts make of it, by their shares, and what the shared network does."""

    def __init__(self, config: Llada2Config) -> None:
        super().__init__()
        width, inner, shared = config.hidden_size, config.moe_intermediate_size, config.num_shared_experts
        self.gate = Router(config)
        self.experts = nn.ModuleList(SwiGlu(width, inner) for _ in range(config.num_experts))
        self.shared_experts = SwiGlu(width, inner * shared) if shared else None
        self._stacked: StackedExperts | None = None

    def forward(self, hidden: Tensor) -> Tensor:
        states = hidden.flatten(0, -2)
        expert, share = self.gate(states)
        if self._stacked is None and may_stack(self.experts[0], states):
            # At the first forward, which no graph records: by then the file's tensors are gone.
            self._stacked = StackedExperts.of(self.experts)
        stacked = self._stacked
        made = outputs(self.experts, states, expert) if stacked is None else stacked.outputs(states, expert)
        # One after the other: a sum over a dimension may round by the number of tokens.
        mixed: Tensor = made[:, 0] * share[:, 0, None]
        for rank in range(1, made.shape[1]):
            mixed = mixed + made[:, rank] * share[:, rank, None]
        mixed = mixed.to(hidden.dtype).view_as(hidden)
        if self.shared_experts is not None:
            mixed = mixed + self.shared_experts(hidden)
        return mixed


class Layer(nn.Module):
    def __init__(self, config: Llada2Config, sparse: bool) -> None:
        super().__init__()
        self.input_layernorm = RmsNorm(config.hidden_size, config.rms_norm_eps)
        self.attention = Attention(config)
        self.post_attention_layernorm = RmsNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = Experts(config) if sparse else SwiGlu(config.hidden_size, config.intermediate_size)

    def forward(
        self,
        hidden: Tensor,
        turns: tuple[Tensor, Tensor],
        mask: Tensor | None,
        at: Tensor | None = None,
        keep: Keep | None = None,
    ) -> Tensor:
        """Next states; at: the positions asked for, which only the last layer is given."""
        hidden = taken(hidden, at) + self.attention(self.input_layernorm(hidden), turns, mask, keep, at)
        out: Tensor = hidden + self.mlp(self.post_attention_layernorm(hidden))
        return out


class Llada2DiffusionLM(DecoderLM):
    """LLaDA2; sites are the outputs of its layers."""

    embeddings = "word_embeddings"
    # Those of the authors' `generate` for LLaDA2.0. LLaDA2.1 has the same config, and asks for `joint_threshold`.
    defaults = SamplerDefaults(temperature=0.0, order="confidence", transfer={"type": "threshold", "value": 0.95})

    def __init__(self, config: Llada2Config) -> None:
        dense = config.first_k_dense_replace
        layers = (Layer(config, sparse=index >= dense) for index in range(config.num_hidden_layers))
        super().__init__(config, layers, config.rotated)
        self.config = config
        self.attention = f"full within blocks of {config.block_size} positions, causal between them"
        self.facts = ModelFacts(
            family="llada2",
            vocab_size=config.vocab_size,
            hidden_size=config.hidden_size,
            num_layers=config.num_hidden_layers,
            max_length=config.max_position_embeddings,
            mask_id=config.mask_token_id,
            eos_id=config.eos_token_id,
            turn_end_id=config.turn_end_token_id,
            block=config.block_size,
        )

    @classmethod
    def from_config(cls, raw: dict[str, Any]) -> "Llada2DiffusionLM":
        """Build from a parsed `config.json`; a missing key, or a variant that is not implemented, is an ArtifactError
        naming the key, and its value and the one allowed."""
        return cls(_read(raw))

    @classmethod
    def adapt(cls, raw: dict[str, Any], tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """The checkpoint's tensors without rotary frequencies and without a tied head that was written out."""
        config = _read(raw)
        left = leave_out_frequencies(tensors, config.rotated, config.rope_theta)
        copies = {"lm_head.weight": "model.word_embeddings.weight"} if config.tie_word_embeddings else {}
        return leave_out_copies(left, copies)


def _read(raw: dict[str, Any]) -> Llada2Config:
    """The family's keys of a parsed `config.json`, checked."""
    given: dict[str, Any] = _with_rotary({name: value for name, value in raw.items() if value is not None})
    check_fixed(given, "llada2", _FIXED)
    config = read_fields(Llada2Config, given, "llada2")
    names = ["vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads"]
    names += ["intermediate_size", "moe_intermediate_size", "num_experts", "num_experts_per_tok", "n_group"]
    names += ["topk_group", "max_position_embeddings", "block_size"]
    check_sizes(**{name: getattr(config, name) for name in names})
    check_sizes(head_dim=config.head_size)
    for name in ("rope_theta", "rms_norm_eps", "partial_rotary_factor", "routed_scaling_factor"):
        value = getattr(config, name)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
            raise ArtifactError(f"config.json: {name} must be a finite number above 0, got {value!r}")
    dense, shared = config.first_k_dense_replace, config.num_shared_experts
    for name, count in (("first_k_dense_replace", dense), ("num_shared_experts", shared or 0)):
        if isinstance(count, bool) or not isinstance(count, int) or count < 0:
            raise ArtifactError(f"config.json: {name} must be a whole number, 0 or more, got {count!r}")
    for name in ("use_qk_norm", "use_qkv_bias", "use_bias", "tie_word_embeddings"):
        if not isinstance(getattr(config, name), bool):
            raise ArtifactError(f"config.json: {name} must be true or false, got {getattr(config, name)!r}")
    heads, kv_heads, experts = config.num_attention_heads, config.num_key_value_heads, config.num_experts
    groups, chosen_groups, chosen = config.n_group, config.topk_group, config.num_experts_per_tok
    turned = f"head_dim {config.head_size} x partial_rotary_factor {config.partial_rotary_factor}"
    rules = {
        f"{turned} must be an even number, at most head_dim": 0 < config.rotated <= config.head_size
        and config.rotated % 2 == 0,
        f"num_attention_heads {heads} must be a multiple of num_key_value_heads {kv_heads}": heads % kv_heads == 0,
        f"num_experts {experts} must be a multiple of n_group {groups}": experts % groups == 0,
        f"topk_group {chosen_groups} is more than n_group {groups}": chosen_groups <= groups,
        f"num_experts_per_tok {chosen} is more than the experts of topk_group {chosen_groups} groups": chosen
        <= chosen_groups * (experts // groups),
    }
    for rule, holds in rules.items():
        if not holds:
            raise ArtifactError(f"config.json: {rule}")
    return config


def _with_rotary(given: dict[str, Any]) -> dict[str, Any]:
    """A parsed `config.json` whose rotary base and rotated share stand where the published files have them; newer files
    have them in `rope_parameters`."""
    names = ("rope_parameters", "rope_scaling")
    sections = {name: dict(given[name]) for name in names if isinstance(given.get(name), Mapping)}
    shares = {section.pop("partial_rotary_factor", None) for section in sections.values()} - {None}
    shares |= {given["partial_rotary_factor"]} if "partial_rotary_factor" in given else set()
    if len(shares) > 1:
        raise ArtifactError(f"config.json: two values of partial_rotary_factor, {sorted(shares)}")
    given |= sections
    base = rotary_base(given)
    given |= {} if base is None else {"rope_theta": base}
    return given | ({"partial_rotary_factor": shares.pop()} if shares else {})
