"""Quality of finished texts: their loss under the unsteered model, and how little they repeat themselves."""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Final

import torch

from steerserve.engine.api.events import Quality, Result
from steerserve.engine.request.request import Request
from steerserve.models.base import DiffusionLM, deciding
from steerserve.models.losses import token_losses
from steerserve.models.sigma import level_of_share

RATIOS: Final = 8
"""Mask ratios that a loss is the mean over; a row of a forward each."""
_FORWARD_TOKENS: Final = 2048
"""Tokens of one forward, where a row has fewer."""


def assess(results: list[Result], requests: Sequence[Request], model: DiffusionLM) -> None:
    """Put into the results of finished rows the quality that they asked for, and the passes that it took."""
    for i, request in enumerate(requests):
        if not request.params.quality:
            continue
        tokens, passes = results[i].tokens, results[i].forward_passes
        loss = text_loss(model, request.prompt_ids, tokens, request.suffix_ids) if tokens else None
        found = Quality(loss, distinct_pairs(tokens))
        results[i] = replace(results[i], quality=found, forward_passes=passes + (RATIOS if tokens else 0))


@torch.inference_mode()
def text_loss(model: DiffusionLM, before: Sequence[int], tokens: Sequence[int], after: Sequence[int]) -> float:
    """NELBO estimate of tokens between others, in nats per token.

    The NELBO of MDLM (arXiv 2406.07524) is the mean over mask ratios of the cross-entropy at the masked positions; here
    over the ratios (i + 1/2) / RATIOS. The masks are the same for every text: of two texts, the first positions are
    masked alike. It depends on nothing but the canvas. Raises ValueError without tokens.
    """
    if not tokens:
        raise ValueError("there are no tokens")
    facts, device = model.facts, next(model.parameters()).device
    count = len(tokens)
    # Drawn position by position, so that a position's draw does not depend on how many there are.
    order = torch.rand(count, RATIOS, generator=torch.Generator().manual_seed(0)).T.argsort(1)
    canvas = torch.tensor([*before, *tokens, *after]).repeat(RATIOS, 1)
    masked = torch.zeros_like(canvas, dtype=torch.bool)
    for i in range(RATIOS):
        masked[i, len(before) + order[i, : math.ceil((i + 0.5) / RATIOS * count)]] = True
    share = masked.sum(1) / count
    rows, total = max(1, _FORWARD_TOKENS // canvas.shape[1]), 0.0
    for first in range(0, RATIOS, rows):
        part, asked = canvas[first : first + rows].to(device), masked[first : first + rows].to(device)
        sigma = None if facts.sigma is None else level_of_share(facts.sigma, share[first : first + rows]).to(device)
        hidden = deciding(model(part.masked_fill(asked, facts.mask_id), None, None, sigma), facts.shift)
        losses = token_losses(model, hidden[asked], part[asked]).double()
        owner = asked.nonzero()[:, 0]
        sums = torch.zeros(len(part), dtype=torch.float64, device=device).index_add(0, owner, losses)
        total += float((sums / asked.sum(1)).sum())
    return total / RATIOS


def distinct_pairs(tokens: Sequence[int]) -> float:
    """Distinct-2 within one text: the share of its pairs of neighbouring tokens that are different from each other.

    Source: Li et al. 2016 (arXiv 1510.03055). 1 for a text of fewer than two tokens. A model's own loss falls where a
    text repeats itself, so it must be read beside this.
    """
    pairs = list(zip(tokens, tokens[1:], strict=False))
    return len(set(pairs)) / len(pairs) if pairs else 1.0
