"""The loss of tokens under what a model may write in their place."""

import torch
from torch import Tensor

from steerserve.models.base import DiffusionLM

_BLOCK_BYTES = 64 << 20
"""Bound on one block of logits; a few copies of it live at once."""


def token_losses(model: DiffusionLM, states: Tensor, tokens: Tensor) -> Tensor:
    """Cross-entropy in nats [N] float32 of tokens [N] at the states that decide them [N, hidden_size].

    Special tokens that are never text have probability zero beside the token itself, as where it is sampled. Of a score
    model it is the probability given that the position is no mask: its log ratios log p(token) / p(mask) are logits
    over the other tokens, whatever is added to them all (SEDD, arXiv 2310.16834).
    """
    facts = model.facts
    barred = [*facts.forbidden_ids, *([facts.mask_id] if facts.parameterisation == "score" else [])]
    size = max(1, _BLOCK_BYTES // (4 * facts.vocab_size))
    losses = []
    for part, wanted in zip(torch.split(states, size), torch.split(tokens, size), strict=True):
        logits = model.head(part).float()
        own = logits.gather(1, wanted[:, None])
        logits = logits.index_fill(1, torch.tensor(barred, device=logits.device, dtype=torch.int64), -torch.inf)
        losses.append(logits.scatter(1, wanted[:, None], own).logsumexp(1) - own[:, 0])
    return torch.cat(losses)
