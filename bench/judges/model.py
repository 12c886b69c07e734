"""The judge of quality: a small causal transformer over a byte-level BPE of its own.

It shares nothing with the diffusion model it judges: neither weights nor start, tokenizer, direction of reading nor
training split. Pre-norm blocks with learned positions and tied embeddings, as GPT-2's (Radford et al. 2019).
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F


@dataclass(frozen=True)
class JudgeConfig:
    """Sizes of the judge."""

    vocabulary: int = 8192
    width: int = 256
    layers: int = 5
    heads: int = 4
    context: int = 128
    """Tokens it reads at once, the start token included."""


class Block(nn.Module):
    """Attention and feed-forward layer, each behind a norm and added to the stream."""

    def __init__(self, config: JudgeConfig) -> None:
        super().__init__()
        self.heads = config.heads
        self.before_attention = nn.LayerNorm(config.width)
        self.attention = nn.Linear(config.width, 3 * config.width, bias=False)
        self.attended = nn.Linear(config.width, config.width, bias=False)
        self.before_widening = nn.LayerNorm(config.width)
        self.widen = nn.Linear(config.width, 4 * config.width, bias=False)
        self.narrow = nn.Linear(4 * config.width, config.width, bias=False)

    def forward(self, hidden: Tensor) -> Tensor:
        """hidden [rows, length, width] -> the same shape; a position sees itself and what is before it."""
        rows, length, width = hidden.shape
        split = self.attention(self.before_attention(hidden)).view(rows, length, 3, self.heads, width // self.heads)
        query, key, value = split.permute(2, 0, 3, 1, 4)
        seen = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        hidden = hidden + self.attended(seen.transpose(1, 2).reshape(rows, length, width))
        widened = F.gelu(self.widen(self.before_widening(hidden)), approximate="tanh")
        added: Tensor = hidden + self.narrow(widened)
        return added


class LanguageModel(nn.Module):
    """Predicts each token from those before it."""

    def __init__(self, config: JudgeConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocabulary, config.width)
        self.position = nn.Embedding(config.context, config.width)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = nn.LayerNorm(config.width)
        # The stream adds two branches a layer: their output starts smaller, so that its variance stays that of one.
        for name, parameter in self.named_parameters():
            if parameter.ndim == 2:
                shrunk = name.endswith(("attended.weight", "narrow.weight"))
                nn.init.normal_(parameter, std=0.02 / ((2 * config.layers) ** 0.5 if shrunk else 1.0))

    def forward(self, tokens: Tensor) -> Tensor:
        """tokens [rows, length] -> states that decide the token after each [rows, length, width]."""
        hidden = self.embedding(tokens) + self.position(torch.arange(tokens.shape[1], device=tokens.device))
        for block in self.blocks:
            hidden = block(hidden)
        normed: Tensor = self.norm(hidden)
        return normed

    def losses(self, tokens: Tensor) -> Tensor:
        """Cross-entropy in nats of each token but the first [rows, length - 1]."""
        hidden = self(tokens[:, :-1])
        logits = hidden @ self.embedding.weight.T
        return F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten(), reduction="none").view(hidden.shape[:2])
