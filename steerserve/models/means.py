"""Mean states of whole texts."""

from collections.abc import Sequence
from functools import partial
from typing import Final

import torch
from torch import Tensor

from steerserve.models.base import DiffusionLM
from steerserve.models.capture import layer_outputs
from steerserve.models.sigma import level_of_share

ROWS: Final = 32
"""Texts of one forward."""
TILE: Final = 16
"""What the width of a forward is rounded up to: a text has the same bits beside others of any lengths on a CPU, where
matrix products of fewer tokens take other kernels."""


@torch.inference_mode()
def mean_states(model: DiffusionLM, texts: Sequence[Sequence[int]], layers: Sequence[int]) -> dict[int, Tensor]:
    """For each layer the mean of its outputs over each text's tokens [texts, hidden_size], float32 on the CPU.

    texts: token ids, none of them masked, of which as many are read as the model's canvas holds; a BOS token is put
    before them and not counted. The mean of a text without tokens is 0.
    """
    facts = model.facts
    found = {layer: torch.zeros(len(texts), facts.hidden_size) for layer in layers}
    if not layers:
        return found
    device = next(model.parameters()).device
    start = [] if facts.bos_id is None else [facts.bos_id]
    rows = [[*start, *ids][: facts.max_length] for ids in texts]
    # Rows of like lengths share a forward: what is padding is computed too.
    order = sorted((i for i, row in enumerate(rows) if len(row) > len(start)), key=lambda i: len(rows[i]))
    for first in range(0, len(order), ROWS):
        chosen = order[first : first + ROWS]
        lengths = torch.tensor([len(rows[i]) for i in chosen])
        width = min(-(-int(lengths.max()) // TILE) * TILE, facts.max_length)
        tokens = torch.tensor([rows[i] + [facts.eos_id] * (width - len(rows[i])) for i in chosen], device=device)
        sigma = None if facts.sigma is None else level_of_share(facts.sigma, torch.zeros(len(chosen), device=device))
        forward = partial(model, tokens, lengths.to(device), sigma=sigma)
        for layer, hidden in layer_outputs(layers, forward).items():
            # Each by itself: a sum over padding too goes in an order that depends on how much there is.
            means = [hidden[r, len(start) : len(rows[i])].float().mean(0) for r, i in enumerate(chosen)]
            found[layer][chosen] = torch.stack(means).cpu()
    return found
