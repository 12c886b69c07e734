"""The BERT family: post-norm encoders with learned positions, in the layout of `BertForMaskedLM`.

Architecture: Devlin et al. 2019 (arXiv 1810.04805). A BERT whose masked-LM head was trained at every mask
ratio is a masked diffusion model (arXiv 2406.07524, section 3); the bundled model is one.
Module names are the checkpoint's tensor names, so loading is a strict `load_state_dict`.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from steerserve.errors import ArtifactError
from steerserve.models.attention import attend, taken
from steerserve.models.base import ModelFacts, check_fixed, check_sizes, read_fields
from steerserve.models.layers import TransformerLM
from steerserve.models.memory import Keep, Memory
from steerserve.models.state_dict import leave_out_copies

# All that this family implements; any other value is refused on load.
_FIXED: dict[str, Any] = {
    "hidden_act": "gelu",
    "position_embedding_type": "absolute",
    "is_decoder": False,
    "add_cross_attention": False,
    "tie_word_embeddings": True,
}


_UNUSED = ("bert.pooler.", "cls.seq_relationship.", "bert.embeddings.position_ids")
_TIED = {
    "cls.predictions.decoder.weight": "bert.embeddings.word_embeddings.weight",
    "cls.predictions.decoder.bias": "cls.predictions.bias",
}


@dataclass(frozen=True)
class BertConfig:
    """Keys of `config.json` under their published names."""

    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    intermediate_size: int
    max_position_embeddings: int
    mask_token_id: int
    sep_token_id: int
    cls_token_id: int
    pad_token_id: int = 0
    unk_token_id: int | None = None
    type_vocab_size: int = 2
    layer_norm_eps: float = 1e-12


class Attention(nn.Module):
    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        width = config.hidden_size
        self.heads = config.num_attention_heads
        self.self = nn.ModuleDict({name: nn.Linear(width, width) for name in ("query", "key", "value")})
        self.output = nn.ModuleDict(
            {"dense": nn.Linear(width, width), "LayerNorm": nn.LayerNorm(width, config.layer_norm_eps)}
        )

    def forward(self, hidden: Tensor, mask: Tensor | None, keep: Keep | None, at: Tensor | None) -> Tensor:
        asked = taken(hidden, at)
        query, key, value = (
            self.self[name](states).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for name, states in (("query", asked), ("key", hidden), ("value", hidden))
        )
        if keep is not None:
            key, value = keep(key, value)
        mixed = attend(query, key, value, mask)
        out: Tensor = self.output["LayerNorm"](asked + self.output["dense"](mixed))
        return out


class Layer(nn.Module):
    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        width, inner = config.hidden_size, config.intermediate_size
        self.attention = Attention(config)
        self.intermediate = nn.ModuleDict({"dense": nn.Linear(width, inner)})
        self.output = nn.ModuleDict(
            {"dense": nn.Linear(inner, width), "LayerNorm": nn.LayerNorm(width, config.layer_norm_eps)}
        )

    def forward(
        self, hidden: Tensor, mask: Tensor | None, at: Tensor | None = None, keep: Keep | None = None
    ) -> Tensor:
        """Next states; at: the positions asked for, which only the last layer is given."""
        hidden = self.attention(hidden, mask, keep, at)
        out: Tensor = self.output["LayerNorm"](
            hidden + self.output["dense"](F.gelu(self.intermediate["dense"](hidden)))
        )
        return out


class BertDiffusionLM(TransformerLM):
    """Bidirectional BERT with its masked-LM head; sites are the outputs of the encoder layers."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        width = config.hidden_size
        self.config = config
        self.bert = nn.ModuleDict(
            {
                "embeddings": nn.ModuleDict(
                    {
                        "word_embeddings": nn.Embedding(config.vocab_size, width),
                        "position_embeddings": nn.Embedding(config.max_position_embeddings, width),
                        "token_type_embeddings": nn.Embedding(config.type_vocab_size, width),
                        "LayerNorm": nn.LayerNorm(width, config.layer_norm_eps),
                    }
                ),
                "encoder": nn.ModuleDict(
                    {"layer": nn.ModuleList(Layer(config) for _ in range(config.num_hidden_layers))}
                ),
            }
        )
        self.cls = nn.ModuleDict({"predictions": MaskedHead(config)})
        self.facts = ModelFacts(
            family="bert",
            vocab_size=config.vocab_size,
            hidden_size=width,
            num_layers=config.num_hidden_layers,
            max_length=config.max_position_embeddings,
            mask_id=config.mask_token_id,
            eos_id=config.sep_token_id,
            bos_id=config.cls_token_id,
            keys=(config.num_attention_heads, width // config.num_attention_heads),
            forbidden_ids=tuple(
                token
                for token in (config.pad_token_id, config.unk_token_id, config.cls_token_id, config.mask_token_id)
                if token is not None
            ),
        )

    @classmethod
    def from_config(cls, raw: dict[str, Any]) -> "BertDiffusionLM":
        """Build from a parsed `config.json`; a missing key, or a variant of BERT that is not implemented, is an
        ArtifactError naming the key, and its value and the one allowed."""
        check_fixed(raw, "bert", _FIXED)
        config = read_fields(BertConfig, raw, "bert")
        check_sizes(
            vocab_size=config.vocab_size,
            hidden_size=config.hidden_size,
            num_hidden_layers=config.num_hidden_layers,
            num_attention_heads=config.num_attention_heads,
            intermediate_size=config.intermediate_size,
            max_position_embeddings=config.max_position_embeddings,
            type_vocab_size=config.type_vocab_size,
        )
        if config.hidden_size % config.num_attention_heads:
            raise ArtifactError(
                f"config.json: num_attention_heads {config.num_attention_heads} must divide "
                f"hidden_size {config.hidden_size}"
            )
        return cls(config)

    @classmethod
    def adapt(cls, raw: dict[str, Any], tensors: dict[str, Tensor]) -> dict[str, Tensor]:  # noqa: ARG003 (interface)
        """The checkpoint's tensors, norms under their present names, without the parts of a pretrained BERT that
        predict no token (pooler and next-sentence head), and without the tied head where it was written out."""
        named = {
            name.replace("LayerNorm.gamma", "LayerNorm.weight").replace("LayerNorm.beta", "LayerNorm.bias"): tensor
            for name, tensor in tensors.items()
            if not name.startswith(_UNUSED)
        }
        return leave_out_copies(named, _TIED)

    def embed(self, tokens: Tensor, width: int, memory: Memory | None) -> tuple[Tensor, tuple[Any, ...]]:
        """Word, token-type and position embeddings, normalised; a layer takes nothing beside the states."""
        embeddings: Any = self.bert["embeddings"]
        positions = torch.arange(width, device=tokens.device)
        if memory is not None and memory.filled is not None:
            positions = memory.position
        hidden = (
            embeddings["word_embeddings"](tokens)
            + embeddings["token_type_embeddings"].weight[0]
            + embeddings["position_embeddings"](positions)
        )
        return embeddings["LayerNorm"](hidden), ()

    def layers(self) -> Iterable[nn.Module]:
        """The encoder layers."""
        encoder: Any = self.bert["encoder"]
        layers: nn.ModuleList = encoder["layer"]
        return layers

    def head(self, hidden: Tensor) -> Tensor:
        """Logits [..., vocab_size]; the output matrix is the word embedding (tied)."""
        embeddings: Any = self.bert["embeddings"]
        predictions: Any = self.cls["predictions"]
        logits: Tensor = F.linear(predictions(hidden), embeddings["word_embeddings"].weight, predictions.bias)
        return logits


class MaskedHead(nn.Module):
    """Dense, GELU and norm before the tied output matrix, and the output bias."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        width = config.hidden_size
        self.bias = nn.Parameter(torch.zeros(config.vocab_size))
        self.transform = nn.ModuleDict(
            {"dense": nn.Linear(width, width), "LayerNorm": nn.LayerNorm(width, config.layer_norm_eps)}
        )

    def forward(self, hidden: Tensor) -> Tensor:
        out: Tensor = self.transform["LayerNorm"](F.gelu(self.transform["dense"](hidden)))
        return out
