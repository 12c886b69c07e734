"""What orders read in the states of the candidates, as they arrive at a layer."""

import torch
from torch import Tensor

from steerserve.engine.sampler import pad_rows
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
