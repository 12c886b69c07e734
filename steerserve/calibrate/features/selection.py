"""Choose the features that tell a class from its contrast, and make a direction of them.

Source: arXiv 2605.10971, appendix C.5.2; how the steering features are weighted is not stated there, so it is a choice.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from steerserve.calibrate.features.statistics import LayerStatistics, cohens_d, pooled
from steerserve.calibrate.recipes import CalibrationRecipe
from steerserve.errors import ArtifactError
from steerserve.saes.sae import SparseAutoencoder
from steerserve.steering.attribute import FeatureWeight


@dataclass(frozen=True)
class Selection:
    """Features and directions of an attribute at one layer."""

    features: tuple[FeatureWeight, ...]
    """Kept features, positive ones first, each side by falling |d|; weight 0 where a feature does not steer."""
    direction: Tensor
    """From the steering features' decoder rows, unit [hidden_size]."""
    diff_means: Tensor
    """Difference of the mean hidden states, unit [hidden_size]."""
    note: str | None
    """Says when the significance test had to be passed over."""

    @property
    def steering(self) -> list[int]:
        """Ids of the steering features."""
        return [feature.index for feature in self.features if feature.weight > 0]


def select(
    target: LayerStatistics, contrast: Sequence[LayerStatistics], sae: SparseAutoencoder, recipe: CalibrationRecipe
) -> Selection:
    """The selection at one layer, the target class against all contrast classes together."""
    others = pooled([one.activations for one in contrast])
    d = cohens_d(target.activations, others)
    # Ties, such as the zeros of dead features, go to the lower id.
    ids = d.abs().sort(descending=True, stable=True).indices[: recipe.candidates]
    ids = ids[d[ids] != 0]
    other_means = torch.cat([one.text_means[:, ids] for one in contrast])
    p_values = bonferroni(target.text_means[:, ids], other_means)
    significant = p_values < recipe.p_value
    positive, negative = (ids[significant & (sign * d[ids] > 0)][: recipe.kept] for sign in (1, -1))
    note = None
    if not len(positive):
        positive = ids[d[ids] > 0][: recipe.kept]
        note = "no feature is significantly more active on the target; those of largest d steer all the same"
    if not len(positive):
        raise ArtifactError(f"SAE {sae.facts.id}: no feature is more active on the target than on the contrast")
    steering = positive[: recipe.steering]
    weights = _weights(d[steering], (target.activations.mean - others.mean)[steering], recipe.weights)
    p_of = dict(zip(ids.tolist(), p_values.tolist(), strict=True))
    weight_of = dict(zip(steering.tolist(), weights.tolist(), strict=True))
    features = tuple(
        FeatureWeight(j, round(float(d[j]), 6), float(f"{p_of[j]:.6g}"), round(weight_of.get(j, 0.0), 8))
        for j in [*positive.tolist(), *negative.tolist()]
    )
    direction = weights.float() @ sae.W_dec[steering].float().cpu()
    difference = (target.hidden.mean - pooled([one.hidden for one in contrast]).mean).float()
    return Selection(features, direction / direction.norm(), difference / difference.norm(), note)


def bonferroni(target: Tensor, contrast: Tensor) -> Tensor:
    """Two-sided Mann-Whitney p of each column, times the number of columns, at most 1 [columns].

    target [n, columns], contrast [m, columns]; the normal approximation with its correction for ties.
    """
    from scipy.stats import mannwhitneyu

    if not target.shape[1]:
        return torch.zeros(0)
    p = mannwhitneyu(target.numpy(), contrast.numpy(), axis=0, method="asymptotic", alternative="two-sided").pvalue
    # Columns that are the same everywhere have no p-value: nothing tells the classes apart there.
    return (torch.from_numpy(p).nan_to_num(1.0) * target.shape[1]).clamp(max=1.0)


def _weights(d: Tensor, difference: Tensor, kind: str) -> Tensor:
    """Weights [steering] that sum to 1."""
    raw = {"equal": torch.ones_like(d), "d": d, "diff_means": difference}[kind]
    return raw / raw.sum()
