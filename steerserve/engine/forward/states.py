"""What orders read in the states of the candidates, as they arrive at a layer."""

import torch
from torch import Tensor

from steerserve.engine.forward.head import pad_rows
from steerserve.saes import SparseAutoencoder
from steerserve.steering.encoders import ENCODED

TOP_FEATURES = 32
"""How many of a position's features are kept to be compared with the next step's."""


def top_features(sae: SparseAutoencoder, states: Tensor) -> Tensor:
    """The most active features [N, K] of states [N, hidden_size] float32."""
    k = min(TOP_FEATURES, sae.facts.features)
    return torch.cat([sae.top_ids(pad_rows(part), k)[: len(part)] for part in torch.split(states, ENCODED)])


def projections(states: Tensor, directions: Tensor) -> Tensor:
    """<h, v> [N] float32 of states [N, hidden_size] on directions [N, hidden_size]."""
    # Multiplied and summed, not contracted: see `Site._project`.
    return (states.float() * directions).sum(1)


def state_scopes(inside: Tensor, prompt: Tensor, response: Tensor, masked: Tensor, shift: int) -> Tensor:
    """Scopes [rows, 5, length] in the order of `steerserve.steering.push.SCOPES`, from positions [rows, length] bool.

    Where the state that decides a token stands `shift` places before it, every scope but `all` names the states of its
    tokens, not the states at their places.
    """
    scopes = torch.stack([inside, prompt.expand_as(inside), response, masked, response & ~masked], 1)
    if shift == 0:
        return scopes
    moved = scopes.roll(-shift, dims=2)
    moved[:, :, -shift:] = False
    moved[:, :, 0] |= scopes[:, :, :shift].any(2)
    moved[:, 0] = scopes[:, 0]
    return moved
