"""What a model's states look like on the texts of a class, layer by layer: what classes are told apart by.

Source: arXiv 2605.10971, appendix C.5.2: three noised copies of each text, full ReLU encoding of each token, streaming
moments of each class.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from tokenizers import Tokenizer
from torch import Tensor
from tqdm import tqdm

from steerserve.calibrate.features.moments import Moments
from steerserve.calibrate.recipe import CalibrationRecipe
from steerserve.calibrate.texts.noising import noised_texts
from steerserve.models.base import DiffusionLM
from steerserve.saes.sae import SparseAutoencoder
from steerserve.train.activations import states

_BLOCK = 1 << 23
"""Activations encoded at once: bounds memory whatever the number of features, and is counted twice over in float64."""


@dataclass(frozen=True)
class LayerStatistics:
    """One class at one layer, over the masked positions of its noised texts."""

    activations: Moments
    """Of each feature's activation, per token."""
    hidden: Moments
    """Of the hidden state, per token."""
    text_means: Tensor
    """Each feature's mean activation on each text [texts, features]."""


@torch.inference_mode()
def class_statistics(
    model: DiffusionLM,
    tokenizer: Tokenizer,
    saes: Mapping[int, SparseAutoencoder],
    texts: Sequence[str],
    recipe: CalibrationRecipe,
    title: str,
) -> dict[int, LayerStatistics]:
    """Statistics of one class at every layer that has an SAE, from one forward of each noised text."""
    layers = sorted(saes)
    activations = {layer: Moments(saes[layer].facts.features) for layer in layers}
    hidden = {layer: Moments(model.facts.hidden_size) for layer in layers}
    sums = {layer: torch.zeros(len(texts), saes[layer].facts.features) for layer in layers}
    counts = torch.zeros(len(texts))
    batches = noised_texts(
        texts, tokenizer, model.facts, recipe.mask_ratios, recipe.crop, recipe.seed, recipe.batch_tokens
    )
    with tqdm(total=len(texts) * len(recipe.mask_ratios), desc=title, unit="text", leave=False) as bar:
        for batch, index in batches:
            chosen = batch.chosen("mask")
            owner = index[chosen.nonzero()[:, 0]]
            counts.index_add_(0, owner, torch.ones(len(owner)))
            found = states(model, batch, layers)
            for layer in layers:
                state = found[layer][chosen.to(found[layer].device)].float().to(saes[layer].W_enc.device)
                hidden[layer].update(state)
                size = max(1, _BLOCK // saes[layer].facts.features)
                for part, owners in zip(torch.split(state, size), torch.split(owner, size), strict=True):
                    active = saes[layer].relu(part)
                    activations[layer].update(active)
                    sums[layer].index_add_(0, owners, active.float().cpu())
            bar.update(len(index))
    used = counts > 0
    return {
        layer: LayerStatistics(activations[layer], hidden[layer], sums[layer][used] / counts[used, None])
        for layer in layers
    }


@torch.inference_mode()
def residual_norms(
    model: DiffusionLM, tokenizer: Tokenizer, layers: Sequence[int], texts: Sequence[str], recipe: CalibrationRecipe
) -> dict[int, float]:
    """Mean norm of the hidden state at the masked positions of texts, at each layer: strength 1 in unit `residual`."""
    total, count = dict.fromkeys(layers, 0.0), 0
    for batch, _ in noised_texts(
        texts, tokenizer, model.facts, recipe.mask_ratios, recipe.crop, recipe.seed, recipe.batch_tokens
    ):
        chosen = batch.chosen("mask")
        count += int(chosen.sum())
        for layer, state in states(model, batch, layers).items():
            total[layer] += float(state[chosen.to(state.device)].float().norm(dim=1).sum())
    return {layer: value / count for layer, value in total.items()}
