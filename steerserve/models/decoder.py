"""The decoder that Qwen2-shaped families share, under the module names of their checkpoints.

Grouped-query attention with rotate-half rotary positions in the dtype of the states, SwiGLU networks, and what stands
around the layers: embeddings, the final norm and the head.
"""

from collections.abc import Iterable, Mapping
from typing import Any, ClassVar, Protocol

from torch import Tensor, nn
from torch.nn import functional as F

from steerserve.models.attention import attend, taken, turned_to
from steerserve.models.layers import TransformerLM
from steerserve.models.llama import RmsNorm, leave_out_frequencies, rotate, rotation
from steerserve.models.memory import Keep, Memory
from steerserve.models.state_dict import leave_out_copies


class DecoderConfig(Protocol):
    """The keys of a family's `config.json` that what stands around its layers needs."""

    @property
    def vocab_size(self) -> int: ...
    @property
    def hidden_size(self) -> int: ...
    @property
    def head_size(self) -> int: ...
    @property
    def rope_theta(self) -> float: ...
    @property
    def rms_norm_eps(self) -> float: ...
    @property
    def tie_word_embeddings(self) -> bool: ...


class Attention(nn.Module):
    """Grouped-query attention over all positions, or those that a mask allows."""

    def __init__(
        self, width: int, heads: int, kv_heads: int, size: int, bias: bool = False, norm_eps: float | None = None
    ) -> None:
        """size: of a head; bias: of queries, keys and values; norm_eps: None for no norm of each head's queries and
        keys."""
        super().__init__()
        self.size = size
        self.q_proj = nn.Linear(width, heads * size, bias=bias)
        self.k_proj = nn.Linear(width, kv_heads * size, bias=bias)
        self.v_proj = nn.Linear(width, kv_heads * size, bias=bias)
        self.o_proj = nn.Linear(heads * size, width, bias=False)
        self.q_norm = nn.Identity() if norm_eps is None else RmsNorm(size, norm_eps)
        self.k_norm = nn.Identity() if norm_eps is None else RmsNorm(size, norm_eps)

    def forward(
        self,
        hidden: Tensor,
        turns: tuple[Tensor, Tensor],
        mask: Tensor | None,
        keep: Keep | None,
        at: Tensor | None,
    ) -> Tensor:
        query = self.q_norm(self.q_proj(taken(hidden, at)).unflatten(-1, (-1, self.size))).transpose(1, 2)
        key = self.k_norm(self.k_proj(hidden).unflatten(-1, (-1, self.size))).transpose(1, 2)
        value = self.v_proj(hidden).unflatten(-1, (-1, self.size)).transpose(1, 2)
        key = rotate(key, *turns)
        if keep is not None:
            key, value = keep(key, value)
        out: Tensor = self.o_proj(attend(rotate(query, *turned_to(turns, at)), key, value, mask))
        return out


class SwiGlu(nn.Module):
    """A gated feed-forward network: down(silu(gate(x)) * up(x)) (arXiv 2002.05202)."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(width, inner, bias=False)
        self.up_proj = nn.Linear(width, inner, bias=False)
        self.down_proj = nn.Linear(inner, width, bias=False)

    def forward(self, hidden: Tensor) -> Tensor:
        out: Tensor = self.down_proj(F.silu(self.gate_proj(hidden)) * self.up_proj(hidden))
        return out


class DecoderLM(TransformerLM):
    """Embeddings, a family's layers, a final norm and a head, which may be the embeddings."""

    embeddings: ClassVar[str] = "embed_tokens"
    """Name of the embeddings in checkpoints."""

    def __init__(self, config: DecoderConfig, layers: Iterable[nn.Module], rotated: int | None = None) -> None:
        """rotated: how many numbers of a head, from its first, are turned by position; None: all of them."""
        super().__init__()
        self._decoder = config
        self._rotated = config.head_size if rotated is None else rotated
        self.model = nn.ModuleDict(
            {
                self.embeddings: nn.Embedding(config.vocab_size, config.hidden_size),
                "layers": nn.ModuleList(layers),
                "norm": RmsNorm(config.hidden_size, config.rms_norm_eps),
            }
        )
        if not config.tie_word_embeddings:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    def embed(self, tokens: Tensor, width: int, memory: Memory | None) -> tuple[Tensor, tuple[Any, ...]]:
        """Return token embeddings, and the cosines and sines of the positions, rounded to the dtype of the states."""
        model: Any = self.model
        hidden = model[self.embeddings](tokens)
        cos, sin = rotation(width, self._rotated, self._decoder.rope_theta, tokens.device)
        turns = (cos.to(hidden.dtype), sin.to(hidden.dtype))
        return hidden, (turns if memory is None else memory.turned(turns),)

    def layers(self) -> Iterable[nn.Module]:
        """Return the layers, first to last."""
        model: Any = self.model
        layers: nn.ModuleList = model["layers"]
        return layers

    def normalise(self, hidden: Tensor) -> Tensor:
        """Return the last layer's output after the final norm."""
        model: Any = self.model
        out: Tensor = model["norm"](hidden)
        return out

    def head(self, hidden: Tensor) -> Tensor:
        """Return logits [..., vocab_size] of hidden states [..., hidden_size]."""
        model: Any = self.model
        weight = model[self.embeddings].weight if self._decoder.tie_word_embeddings else self.lm_head.weight
        return F.linear(hidden, weight)


def adapted(config: DecoderConfig, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The checkpoint's tensors without rotary frequencies and without a tied head that was written out."""
    left = leave_out_frequencies(tensors, config.head_size, config.rope_theta)
    return leave_out_copies(left, {"lm_head.weight": "model.embed_tokens.weight"} if config.tie_word_embeddings else {})
