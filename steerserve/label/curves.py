"""When each feature forms during denoising: its mean activation over the writing of unsteered texts."""

from collections.abc import Mapping, Sequence
from typing import Final

import torch
from torch import Tensor

from steerserve.calibrate.features.commitment_curve import feature_curves
from steerserve.calibrate.generation import GeneratedText
from steerserve.models.base import DiffusionLM
from steerserve.saes.sae import SparseAutoencoder

AT_ONCE: Final = 8
"""Texts whose curves are in memory at once."""


def mean_curves(
    model: DiffusionLM,
    samples: Sequence[GeneratedText],
    saes: Mapping[int, SparseAutoencoder],
    slices: int,
    batch_tokens: int,
) -> dict[int, Tensor]:
    """Mean rectified pre-activation over the response of every feature, by layer [slices + 1, features], at progress
    i / slices: the curve that attributes have, as a mean over the texts with tokens."""
    texts = [sample for sample in samples if sample.tokens]
    every = {layer: range(sae.facts.features) for layer, sae in saes.items()}
    sums = {layer: torch.zeros(slices + 1, sae.facts.features) for layer, sae in saes.items()}
    for start in range(0, len(texts), AT_ONCE):
        part = texts[start : start + AT_ONCE]
        for layer, values in feature_curves(model, part, saes, every, slices, batch_tokens).items():
            sums[layer] += values.sum(0)
    return {layer: total / max(1, len(texts)) for layer, total in sums.items()}
