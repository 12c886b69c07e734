"""Mean and variance of feature activations and hidden states over the texts of a class, layer by layer.

Source: arXiv 2605.10971, appendix C.5.2: three noised copies of each text, full ReLU encoding of each token, streaming
moments of each class.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from tokenizers import Tokenizer
from torch import Tensor
from tqdm import tqdm

from steerserve.calibrate.recipes import CalibrationRecipe
from steerserve.calibrate.texts.noising import noised_texts
from steerserve.models.base import DiffusionLM
from steerserve.saes.sae import SparseAutoencoder
from steerserve.train.activations import states

_BLOCK = 1 << 23
"""Activations encoded at once: bounds memory whatever the number of features, and is counted twice over in float64."""


class Moments:
    """Streaming mean and variance of each component, numerically stable, a batch at a time.

    Source: Welford 1962, in the pairwise form of Chan, Golub and LeVeque 1979; kept in float64.
    """

    def __init__(self, size: int) -> None:
        self.count = 0
        self.mean = torch.zeros(size, dtype=torch.float64)
        self.squares = torch.zeros(size, dtype=torch.float64)
        """Sum of squared deviations from the mean [size]."""

    def update(self, values: Tensor) -> None:
        """Take values [n, size] in, from whatever device."""
        if len(values):
            variance, mean = torch.var_mean(values.double(), dim=0, correction=0)
            self._merge(len(values), mean.cpu(), variance.cpu() * len(values))

    def merge(self, other: "Moments") -> None:
        """Take another stream in, as if its values had come one by one."""
        if other.count:
            self._merge(other.count, other.mean, other.squares)

    @property
    def variance(self) -> Tensor:
        """Sample variance [size], divided by count - 1; zero for fewer than two values."""
        return self.squares / max(1, self.count - 1)

    def _merge(self, count: int, mean: Tensor, squares: Tensor) -> None:
        total = self.count + count
        gap = mean - self.mean
        self.mean = self.mean + gap * (count / total)
        self.squares = self.squares + squares + gap.square() * (self.count * count / total)
        self.count = total


def pooled(streams: list[Moments]) -> Moments:
    """The moments of several streams together."""
    whole = Moments(len(streams[0].mean))
    for stream in streams:
        whole.merge(stream)
    return whole


def cohens_d(target: Moments, contrast: Moments) -> Tensor:
    """`(mean_A - mean_B) / sqrt((var_A + var_B) / 2)` [size]; 0 where nothing varies (arXiv 2605.10971, eq. 16)."""
    spread = ((target.variance + contrast.variance) / 2).sqrt()
    return torch.where(spread > 0, (target.mean - contrast.mean) / spread, torch.zeros_like(spread))


@dataclass(frozen=True)
class LayerStatistics:
    """One class at one layer, over the masked positions of its noised texts."""

    activations: Moments
    """Mean and variance of each feature's activation, per token."""
    hidden: Moments
    """Mean and variance of the hidden state, per token."""
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
