"""Texts that features are read on: drawn from the data, noised, and laid out as one row of tokens."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor

from steerserve.calibrate.texts.noising import noised_texts
from steerserve.errors import ArtifactError
from steerserve.models.base import ModelFacts
from steerserve.train import corpus
from steerserve.train.activations import NoisedBatch

HELD_OUT = 4
"""One text of so many is held out from names, and scores them."""
MIN_WORDS = 5
"""Shorter texts show too little."""


@dataclass(frozen=True)
class ReadTexts:
    """Noised texts as batches, and the same tokens one after another: a place is an index into that row."""

    batches: tuple[NoisedBatch, ...]
    starts: tuple[int, ...]
    """Place of the first token of each batch."""
    tokens: Tensor
    """[places], before masking."""
    masked: Tensor
    """[places], bool."""
    text: Tensor
    """[places], bool: no BOS and no padding."""
    row: Tensor
    """[places], the number of the text."""
    level: Tensor
    """[rows], which mask ratio."""
    ratio: Tensor
    """[rows], the share of the text that is masked."""
    held_out: Tensor
    """[rows], bool."""

    def rows_of(self, number: int) -> Tensor:
        """Numbers of the texts of a batch [rows]."""
        batch, start = self.batches[number], self.starts[number]
        return self.row[start : start + batch.tokens.numel()].view(batch.tokens.shape)[:, 0]


def read_texts(
    texts: Sequence[str],
    tokenizer: Tokenizer,
    facts: ModelFacts,
    ratios: Sequence[float],
    crop: int,
    seed: int,
    batch_tokens: int,
    every: bool = False,
) -> ReadTexts:
    """Noise each text at one of the mask ratios, in turns; or at all of them where `every` is set."""
    batches: list[NoisedBatch] = []
    levels: list[Tensor] = []
    numbers: list[Tensor] = []
    for level, ratio in enumerate(ratios):
        part = list(texts) if every else list(texts[level :: len(ratios)])
        for batch, index in noised_texts(part, tokenizer, facts, (ratio,), crop, seed + level, batch_tokens):
            batches.append(batch)
            levels.append(torch.full((len(index),), level))
            numbers.append(index if every else index * len(ratios) + level)
    if not batches:
        raise ArtifactError("the texts hold no token to read")
    starts = tuple(accumulate((batch.tokens.numel() for batch in batches), initial=0))[:-1]
    first = list(accumulate((len(batch.tokens) for batch in batches), initial=0))
    rows = [
        (begin + torch.arange(len(batch.tokens)))[:, None].expand_as(batch.tokens).flatten()
        for begin, batch in zip(first, batches, strict=False)
    ]
    return ReadTexts(
        batches=tuple(batches),
        starts=starts,
        tokens=torch.cat([batch.tokens.flatten() for batch in batches]),
        masked=torch.cat([batch.masked.flatten() for batch in batches]),
        text=torch.cat([batch.text.flatten() for batch in batches]),
        row=torch.cat(rows),
        level=torch.cat(levels),
        ratio=torch.cat([batch.share() for batch in batches]),
        held_out=torch.cat(numbers) // len(ratios) % HELD_OUT == HELD_OUT - 1,
    )


def drawn_texts(data: Path, tokens: int, crop: int, seed: int) -> list[str]:
    """Different texts of about so many tokens in all when cropped, files taking turns, in a seeded order.

    A token is counted as four fifths of a word, so that nothing has to be tokenised.
    """
    files = [_shuffled(path, seed) for path in corpus.files(data).values()]
    found: dict[str, None] = {}
    left = float(tokens)
    while files and left > 0:
        for source in list(files):
            text = next(source, None)
            if text is None:
                files.remove(source)
            elif text not in found and left > 0:
                found[text] = None
                left -= min(crop, len(text.split()) * 1.25)
    if not found:
        raise ArtifactError(f"{data}: no text of {MIN_WORDS} words or more")
    # Long files outlast short ones: the order says nothing of the file.
    order = np.random.default_rng(seed).permutation(len(found))
    every = list(found)
    return [every[i] for i in order]


def _shuffled(path: Path, seed: int) -> Iterator[str]:
    texts = [row["text"] for row in corpus.rows(path) if len(row["text"].split()) >= MIN_WORDS]
    for i in np.random.default_rng(seed).permutation(len(texts)):
        yield texts[i]
