"""Commitment curves: the activation of an attribute's features along the denoising of unsteered samples.

Source: arXiv 2605.10971, commitment dynamics: the steering features' ReLU activations at every step, averaged over
the samples that a classifier is sure of. Samples are replayed from the step at which each token was committed, so one
set of samples serves every attribute, also one that is added later.
"""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from schedulers import CommitmentProfile
from steerserve.calibrate.generation import GeneratedText
from steerserve.models.base import DiffusionLM
from steerserve.saes.sae import SparseAutoencoder
from steerserve.train.activations import NoisedBatch, states


@torch.inference_mode()
def feature_curves(
    model: DiffusionLM,
    samples: Sequence[GeneratedText],
    saes: Mapping[int, SparseAutoencoder],
    features: Mapping[int, Sequence[int]],
    slices: int,
    batch_tokens: int,
) -> dict[int, Tensor]:
    """Mean activation over the response of the features named, by layer [samples, slices + 1, features of the layer].

    Values are at progress i / slices, linear between the states that a sample went through; steps at which nothing was
    committed are no states of their own. The curve of a sample without tokens is zero. A state is encoded once, however
    many features are read from it.
    """
    layers = sorted(features)
    curves = {layer: torch.zeros(len(samples), slices + 1, len(features[layer])) for layer in layers}
    grid = np.linspace(0.0, 1.0, slices + 1)
    for i, sample in enumerate(tqdm(samples, desc="commitment curves", unit="sample", leave=False)):
        if not sample.tokens:
            continue
        tokens, committed_at = torch.tensor(sample.tokens), torch.tensor(sample.committed_at)
        # The states of a sample are those before each step at which it changed, and the finished text.
        times = sorted({*sample.committed_at, max(sample.committed_at) + 1})
        masked = committed_at >= torch.tensor(times)[:, None]
        rows = max(1, batch_tokens // (len(tokens) + 1))
        progress = 1.0 - masked.double().mean(1).numpy()
        found: dict[int, list[Tensor]] = {layer: [] for layer in layers}
        for first in range(0, len(masked), rows):
            part = masked[first : first + rows]
            for layer, values in _readings(model, tokens, part, saes, features).items():
                found[layer].append(values)
        for layer in layers:
            curves[layer][i] = _interpolate(grid, progress, torch.cat(found[layer]))
    return curves


def _readings(
    model: DiffusionLM,
    tokens: Tensor,
    masked: Tensor,
    saes: Mapping[int, SparseAutoencoder],
    features: Mapping[int, Sequence[int]],
) -> dict[int, Tensor]:
    """Mean activations over the response by layer [states, features]; tokens [length], masked [states, length]."""
    facts = model.facts
    start = 0
    if facts.bos_id is not None:
        tokens, start = torch.cat([torch.tensor([facts.bos_id]), tokens]), 1
    whole = tokens.expand(len(masked), -1)
    text = (torch.arange(len(tokens)) >= start).expand_as(whole)
    masked = torch.cat([masked.new_zeros(len(masked), start), masked], dim=1)
    lengths = torch.full((len(masked),), len(tokens))
    batch = NoisedBatch(whole, whole.masked_fill(masked, facts.mask_id), lengths, masked, text)
    found = states(model, batch, sorted(features))
    return {
        layer: some_activations(saes[layer], hidden[:, start:], features[layer]).float().mean(1).cpu()
        for layer, hidden in found.items()
    }


def some_activations(sae: SparseAutoencoder, hidden: Tensor, features: Sequence[int]) -> Tensor:
    """`sae.relu(hidden)[..., features]`, without encoding the other features."""
    ids = list(features)
    return torch.relu((hidden.to(sae.W_enc) - sae.b_dec) @ sae.W_enc[:, ids] + sae.b_enc[ids])


def _interpolate(grid: np.ndarray, progress: np.ndarray, values: Tensor) -> Tensor:
    """values [states, features] at rising progress [states] -> at the grid [slices + 1, features]."""
    columns = [np.interp(grid, progress, column) for column in values.double().numpy().T]
    return torch.from_numpy(np.stack(columns, axis=1)).float()


def confident(probabilities: np.ndarray, threshold: float, at_least: int) -> tuple[list[int], bool]:
    """Samples whose probability [samples] reaches the threshold; where too few do, the likeliest, and True."""
    kept = np.flatnonzero(probabilities >= threshold)
    if len(kept) >= min(at_least, len(probabilities)):
        return kept.tolist(), False
    likeliest = np.argsort(-probabilities, kind="stable")[:at_least]
    return sorted(likeliest.tolist()), True


def profile(curves: Sequence[Tensor], kept: Sequence[int]) -> CommitmentProfile:
    """The mean curve over kept samples and all features of the layers given, each [samples, slices + 1, features]."""
    values = torch.cat([curve[list(kept)] for curve in curves], dim=2).double().mean(2)
    error = values.std(0) / len(kept) ** 0.5 if len(kept) > 1 else None
    return CommitmentProfile(
        curve=tuple(round(value, 6) for value in values.mean(0).tolist()),
        standard_error=tuple(round(value, 6) for value in error.tolist()) if error is not None else None,
        samples=len(kept),
    )
