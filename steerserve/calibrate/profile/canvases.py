"""Canvases that unsteered runs went through, by slice of progress; the cost of a push is measured on them."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from schedulers import slice_of
from steerserve.calibrate.generation import GeneratedText
from steerserve.errors import SteerserveError
from steerserve.models.base import ModelFacts
from steerserve.train.activations import NoisedBatch


@dataclass(frozen=True)
class Canvases:
    """N canvases of one slice of progress, and the masked positions of each that are looked at."""

    batch: NoisedBatch
    row: Tensor
    """[P] int64."""
    position: Tensor
    """[P] int64: canvas positions whose tokens are predicted."""

    def first(self) -> "Canvases":
        """The first canvas alone."""
        whole, inside = self.batch, self.row == 0
        batch = NoisedBatch(whole.tokens[:1], whole.canvas[:1], whole.lengths[:1], whole.masked[:1], whole.text[:1])
        return Canvases(batch, self.row[inside], self.position[inside])


def canvases_by_slice(
    samples: Sequence[GeneratedText], facts: ModelFacts, slices: int, count: int, positions: int, seed: int
) -> dict[int, Canvases]:
    """By slice, `count` canvases that the samples were at while their progress was in it; slices none was in are left
    out.

    Each slice draws its own samples, so that the errors of neighbouring slices are nearly independent; a sample gives
    one canvas to a slice. Only samples of full length are used, all those of the longest; raises SteerserveError where
    none has a token.
    """
    longest = max((len(one.tokens) for one in samples), default=0)
    if longest == 0:
        raise SteerserveError("the unsteered runs have no tokens: nothing can be measured on them")
    full = [one for one in samples if len(one.tokens) == longest]
    found: dict[int, list[tuple[int, int]]] = {}
    for i, one in enumerate(full):
        committed_at = np.array(one.committed_at)
        for step in sorted(set(one.committed_at)):
            progress = torch.tensor(1.0 - float((committed_at >= step).mean()))
            found.setdefault(int(slice_of(progress, slices)), []).append((i, step))
    made = {}
    for place, states in sorted(found.items()):
        random = np.random.default_rng((seed, place))
        # One state a sample: the first drawn.
        states = list({states[j][0]: states[j] for j in random.permutation(len(states))}.values())[:count]
        made[place] = _canvases([(full[i], step) for i, step in states], facts, positions, random)
    return made


def _canvases(
    states: Sequence[tuple[GeneratedText, int]], facts: ModelFacts, positions: int, random: np.random.Generator
) -> Canvases:
    start = 0 if facts.bos_id is None else 1
    tokens = torch.tensor([one.tokens for one, _ in states])
    masked = torch.tensor([[at >= step for at in one.committed_at] for one, step in states])
    if facts.bos_id is not None:
        tokens = torch.cat([torch.full((len(states), 1), facts.bos_id), tokens], dim=1)
        masked = torch.cat([masked.new_zeros(len(states), 1), masked], dim=1)
    text = (torch.arange(tokens.shape[1]) >= start).expand_as(tokens)
    lengths = torch.full((len(states),), tokens.shape[1])
    batch = NoisedBatch(tokens, tokens.masked_fill(masked, facts.mask_id), lengths, masked, text)
    row, position = [], []
    for i, places in enumerate(masked):
        several = random.permutation(places.nonzero()[:, 0].numpy())[:positions]
        row += [i] * len(several)
        position += sorted(several.tolist())
    return Canvases(batch, torch.tensor(row), torch.tensor(position))
