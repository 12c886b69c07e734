"""The loss of many texts under the unsteered model."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from steerserve.models.base import DiffusionLM
from steerserve.models.losses import token_losses
from steerserve.train.activations import NoisedBatch, final_states

_BATCH_TOKENS = 2048
"""Tokens of one forward."""


@torch.inference_mode()
def text_losses(model: DiffusionLM, texts: Sequence[Sequence[int]], masks: int, seed: int = 0) -> Tensor:
    """NELBO estimate of each text of token ids in nats per token [texts] float64.

    The NELBO of MDLM (arXiv 2406.07524) is the mean over mask ratios of the cross-entropy at the masked positions;
    here over the `masks` ratios (i + 1/2) / masks. The masks are seeded and common to all texts (of two texts, the
    first positions are masked alike), so that differences between texts are not differences between masks.
    Raises ValueError for an empty text.
    """
    if not all(len(text) for text in texts):
        raise ValueError(f"text {next(i for i, text in enumerate(texts) if not len(text))} has no tokens")
    losses = torch.zeros(len(texts), dtype=torch.float64)
    if not len(texts):
        return losses
    longest = max(len(text) for text in texts)
    # Drawn position by position, so that a position's draw does not depend on the longest text.
    draws = torch.rand(longest, masks, generator=torch.Generator().manual_seed(seed)).T
    rows = max(1, _BATCH_TOKENS // (longest + 1))
    for first in range(0, len(texts), rows):
        part = texts[first : first + rows]
        for index, draw in enumerate(draws):
            losses[first : first + rows] += _losses(model, part, draw, (index + 0.5) / masks) / masks
    return losses


def _losses(model: DiffusionLM, texts: Sequence[Sequence[int]], draw: Tensor, ratio: float) -> Tensor:
    """Mean cross-entropy at the masked positions of each text [texts], one mask ratio."""
    facts = model.facts
    start = [] if facts.bos_id is None else [facts.bos_id]
    width = max(len(text) for text in texts)
    masked = torch.zeros(len(texts), len(start) + width, dtype=torch.bool)
    for row, text in enumerate(texts):
        positions = draw[: len(text)].argsort()[: math.ceil(ratio * len(text))]
        masked[row, len(start) + positions] = True
    tokens = torch.tensor([start + list(text) + [facts.eos_id] * (width - len(text)) for text in texts])
    lengths = torch.tensor([len(start) + len(text) for text in texts])
    place = torch.arange(tokens.shape[1])
    inside = (place >= len(start)) & (place < lengths[:, None])
    hidden = final_states(
        model, NoisedBatch(tokens, tokens.masked_fill(masked, facts.mask_id), lengths, masked, inside)
    )
    asked = masked.to(hidden.device)
    loss = token_losses(model, hidden[asked], tokens.to(hidden.device)[asked]).double().cpu()
    owner = masked.nonzero()[:, 0]
    total = torch.zeros(len(texts), dtype=torch.float64).index_add(0, owner, loss)
    return total / torch.bincount(owner, minlength=len(texts))
