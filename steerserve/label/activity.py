"""Where and how strongly each feature is active on noised texts: counts, a histogram, and the strongest places."""

from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from steerserve.label.texts import ReadTexts
from steerserve.models.base import DiffusionLM
from steerserve.saes.feature_record import BINS
from steerserve.saes.sae import SparseAutoencoder
from steerserve.train.activations import NoisedBatch, states

_ZERO_BIN: Final = BINS // 2
STRONGEST, DRAWN, HELD = 32, 32, 24
"""Places kept of each feature: the strongest, some drawn in proportion to activation, and such of held-out texts."""
_BLOCK = 1 << 24
"""Activations encoded at once."""


@dataclass
class Places:
    """The places with the largest keys of each feature, at most one a text; empty slots have place -1."""

    key: Tensor
    """[features, kept] float32, falling."""
    place: Tensor
    """[features, kept] int64."""
    value: Tensor
    """[features, kept] float32: the activation there."""

    @classmethod
    def empty(cls, features: int, kept: int) -> "Places":
        """No places yet."""
        key = torch.full((features, kept), -torch.inf)
        return cls(key, torch.full((features, kept), -1), torch.zeros(features, kept))

    def update(self, feature: Tensor, row: Tensor, key: Tensor, place: Tensor, value: Tensor) -> None:
        """Take in active places: feature, row, key, place and value are [n]; rows come in one update only."""
        features, kept = self.key.shape
        # By feature and text, the largest key first: the first of each group stays.
        order = key.argsort(descending=True, stable=True)
        order = order[(feature[order] * (int(row.max()) + 1 if len(row) else 1) + row[order]).argsort(stable=True)]
        group = torch.stack([feature[order], row[order]])
        first = torch.ones(len(order), dtype=torch.bool)
        first[1:] = (group[:, 1:] != group[:, :-1]).any(0)
        order = order[first]
        order = order[key[order].argsort(descending=True, stable=True)]
        order = order[feature[order].argsort(stable=True)]
        owner = feature[order]
        count = torch.bincount(owner, minlength=features)
        rank = torch.arange(len(owner)) - (count.cumsum(0) - count)[owner]
        order, owner, rank = order[rank < kept], owner[rank < kept], rank[rank < kept]
        fresh = Places.empty(features, kept)
        fresh.key[owner, rank], fresh.place[owner, rank] = key[order], place[order]
        fresh.value[owner, rank] = value[order]
        best = torch.cat([self.key, fresh.key], 1).sort(dim=1, descending=True, stable=True)
        ids = best.indices[:, :kept]
        self.key = best.values[:, :kept]
        self.place = torch.cat([self.place, fresh.place], 1).gather(1, ids)
        self.value = torch.cat([self.value, fresh.value], 1).gather(1, ids)


class FeatureActivity:
    """What one SAE's features did on the texts that were read so far, at the positions of its policy."""

    def __init__(self, features: int, levels: int) -> None:
        self.fired = torch.zeros(levels, features, dtype=torch.int64)
        """[levels, features]: tokens on which each feature was active."""
        self.seen = torch.zeros(levels, dtype=torch.int64)
        """[levels]: tokens read."""
        self.summed = torch.zeros(features, dtype=torch.float64)
        self.largest = torch.zeros(features)
        self.histogram = torch.zeros(features, BINS, dtype=torch.int64)
        self.strongest = Places.empty(features, STRONGEST)
        self.drawn = Places.empty(features, DRAWN)
        self.held = Places.empty(features, HELD)

    @property
    def density(self) -> Tensor:
        """Share of tokens on which each feature is active [features]."""
        return self.fired.sum(0) / self.seen.sum().clamp(min=1)

    @property
    def density_by_level(self) -> Tensor:
        """The same at each mask ratio [levels, features]."""
        return self.fired / self.seen.clamp(min=1)[:, None]

    @property
    def mean(self) -> Tensor:
        """Mean activation over the tokens on which a feature is active [features]; 0 where it never is."""
        return (self.summed / self.fired.sum(0).clamp(min=1)).float()

    def update(
        self, activations: Tensor, place: Tensor, row: Tensor, level: Tensor, held_out: Tensor, uniform: Tensor
    ) -> None:
        """Take in activations [tokens, features] at places [tokens], with each token's row, level, whether its text is
        held out, and a uniform number in (0, 1) for each active feature, drawn in order."""
        self.seen += torch.bincount(level, minlength=len(self.seen))
        token, feature = activations.nonzero(as_tuple=True)
        value = activations[token, feature].float()
        features = len(self.largest)
        self.fired += torch.bincount(level[token] * features + feature, minlength=len(self.seen) * features).view_as(
            self.fired
        )
        self.summed.index_add_(0, feature, value.double())
        self.largest = self.largest.maximum(activations.amax(0).float() if len(activations) else self.largest)
        bins = (2 * value.abs().log2()).floor().long().add(_ZERO_BIN).clamp(0, BINS - 1)
        self.histogram += torch.bincount(feature * BINS + bins, minlength=features * BINS).view_as(self.histogram)
        # Efraimidis and Spirakis 2006: the largest log(u) / w are a sample in proportion to w.
        key = uniform[: len(value)].log() / value.clamp(min=1e-6)
        positive, held = value > 0, held_out[token]
        for chosen, order, kept in (
            (positive & ~held, value, self.strongest),
            (positive & ~held, key, self.drawn),
            (positive & held, key, self.held),
        ):
            kept.update(feature[chosen], row[token][chosen], order[chosen], place[token][chosen], value[chosen])

    def tensors(self) -> dict[str, Tensor]:
        """Everything, by name."""
        found = {name: value for name, value in vars(self).items() if isinstance(value, Tensor)}
        for name in ("strongest", "drawn", "held"):
            found |= {f"{name}.{part}": value for part, value in vars(getattr(self, name)).items()}
        return {name: value.contiguous() for name, value in found.items()}

    def restore(self, tensors: dict[str, Tensor]) -> None:
        """Put back what `tensors` gave."""
        for name, value in tensors.items():
            owner, _, part = name.rpartition(".")
            setattr(getattr(self, owner) if owner else self, part, value)


def positions(sae: SparseAutoencoder, batch: NoisedBatch) -> Tensor:
    """Text positions [rows, width] that an SAE reads: those of its policy, or all where it has none."""
    return batch.text if sae.facts.policy is None else batch.chosen(sae.facts.policy)


@torch.inference_mode()
def read_batch(
    model: DiffusionLM,
    saes: dict[str, SparseAutoencoder],
    texts: ReadTexts,
    number: int,
    activity: dict[str, FeatureActivity],
    seed: int,
) -> None:
    """Take one batch of texts into the activity of every SAE, from one forward."""
    batch = texts.batches[number]
    found = states(model, batch, sorted({sae.facts.layer for sae in saes.values()}))
    places = texts.starts[number] + torch.arange(batch.tokens.numel()).view(batch.tokens.shape)
    rows = texts.rows_of(number)[:, None].expand_as(places)
    generator = torch.Generator().manual_seed(seed * 1_000_003 + number)
    for name, sae in saes.items():
        chosen = positions(sae, batch)
        hidden = found[sae.facts.layer][chosen.to(found[sae.facts.layer].device)]
        place, row = places[chosen], rows[chosen]
        size = max(1, _BLOCK // sae.facts.features)
        parts = [sae.encode(part.to(sae.W_enc)).cpu() for part in torch.split(hidden, size)]
        active = torch.cat(parts) if parts else torch.zeros(0, sae.facts.features)
        uniform = torch.rand(int((active != 0).sum()), generator=generator).clamp(min=1e-12)
        activity[name].update(active, place, row, texts.level[row], texts.held_out[row], uniform)
