"""Noised copies of given texts, for reading a model's states on them."""

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from tokenizers import Tokenizer

from steerserve.models.base import ModelFacts
from steerserve.train.activations import NoisedBatch
from steerserve.train.dlm import draw_masks


def noised_texts(
    texts: Sequence[str],
    tokenizer: Tokenizer,
    facts: ModelFacts,
    ratios: Sequence[float],
    crop: int,
    seed: int,
    batch_tokens: int,
) -> Iterator[tuple[NoisedBatch, torch.Tensor]]:
    """Each text once at each mask ratio, random positions masked, with the index of each row's text [rows].

    Long texts are cropped to `crop` tokens at a seeded place; rows of like length share a batch.
    """
    random = np.random.default_rng(seed)
    generator = torch.Generator().manual_seed(seed)
    start = [] if facts.bos_id is None else [facts.bos_id]
    room = min(crop, facts.max_length - len(start))
    crops = []
    for encoding in tokenizer.encode_batch_fast(list(texts), add_special_tokens=False):
        first = int(random.integers(0, max(0, len(encoding.ids) - room) + 1))
        crops.append(start + encoding.ids[first : first + room])
    items = [(i, ratio) for i, ids in enumerate(crops) for ratio in ratios if len(ids) > len(start)]
    items.sort(key=lambda item: len(crops[item[0]]))
    group: list[tuple[int, float]] = []
    for item in items:
        if group and (len(group) + 1) * len(crops[item[0]]) > batch_tokens:
            yield _batch(group, crops, facts, generator)
            group = []
        group.append(item)
    if group:
        yield _batch(group, crops, facts, generator)


def _batch(
    group: list[tuple[int, float]], crops: list[list[int]], facts: ModelFacts, generator: torch.Generator
) -> tuple[NoisedBatch, torch.Tensor]:
    rows = [crops[i] for i, _ in group]
    width = max(len(row) for row in rows)
    tokens = torch.tensor([row + [facts.eos_id] * (width - len(row)) for row in rows])
    lengths = torch.tensor([len(row) for row in rows])
    masked = _masks(lengths, [ratio for _, ratio in group], width, facts.bos_id is not None, generator)
    text = torch.arange(width) < lengths[:, None]
    if facts.bos_id is not None:
        text[:, 0] = False
    batch = NoisedBatch(tokens, tokens.masked_fill(masked, facts.mask_id), lengths, masked, text)
    return batch, torch.tensor([i for i, _ in group])


def _masks(
    lengths: torch.Tensor, ratios: list[float], width: int, has_bos: bool, generator: torch.Generator
) -> torch.Tensor:
    times = torch.tensor(ratios, dtype=torch.float32)
    if has_bos:
        return draw_masks(lengths, times, width, generator)[0]
    # `draw_masks` never masks the first token: one that is no BOS gets a place in front of it for the draw.
    return draw_masks(lengths + 1, times, width + 1, generator)[0][:, 1:]
