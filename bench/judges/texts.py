"""Texts of the judge: a share of the bench split that the bench's classifiers leave to it."""

import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor

from steerserve.errors import ArtifactError
from steerserve.train import corpus

SHARE_PERCENT = 40
"""Share of the bench split's texts; the classifiers get the others."""
HELD_OUT_PERCENT = 4
"""Share of the judge's texts that is set aside to measure its loss."""
START = "<s>"
"""The token before each text."""


def is_judges(text: str) -> bool:
    """Tell if a text of the bench split belongs to the judge, by a hash of its own."""
    return _bucket("judge of quality", text) < SHARE_PERCENT


def judges_texts(data: Path, held_out: bool) -> dict[str, list[str]]:
    """The judge's texts by file stem, as the diffusion model writes: lower case, single spaces."""
    found: dict[str, list[str]] = {}
    for stem, path in corpus.files(data).items():
        texts = (row["text"] for row in corpus.rows(path))
        mine = [
            plain(text)
            for text in texts
            if corpus.split_of(text) == "bench"
            and is_judges(text)
            and (_bucket("held out", text) < HELD_OUT_PERCENT) == held_out
        ]
        if mine:
            found[stem] = mine
    if not found:
        raise ArtifactError(f"{data}: no text falls into the judge's {'held-out ' if held_out else ''}split")
    return found


def plain(text: str) -> str:
    """Lower case with single spaces: case and spacing are no matter of quality here."""
    return " ".join(text.lower().split())


def train_tokenizer(texts: Iterator[str], vocabulary: int) -> Tokenizer:
    """A byte-level BPE, so that no text is unknown to it (Sennrich et al. 2016; Radford et al. 2019)."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[START],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


class Packed:
    """Rows of tokens packed from texts of each file, in the shares of `corpus.MIX`."""

    def __init__(self, tokenizer: Tokenizer, texts: dict[str, list[str]], context: int) -> None:
        self.context, self.start = context, int(tokenizer.token_to_id(START) or 0)
        self.sets = [
            [np.array(one.ids, dtype=np.int64) for one in tokenizer.encode_batch(several)] for several in texts.values()
        ]
        weights = np.array([corpus.MIX.get(stem, corpus.DEFAULT_SHARE) for stem in texts])
        lengths = np.array([np.mean([min(len(one) + 1, context) for one in several]) for several in self.sets])
        self.odds: NDArray[np.float64] = weights / lengths / (weights / lengths).sum()

    def rows(self, seed: int, index: int, rows: int) -> Tensor:
        """Batch `index` of a seed [rows, context + 1]: each row is whole texts and the beginning of another."""
        random = np.random.default_rng([seed, index])
        return torch.from_numpy(np.stack([self._row(random) for _ in range(rows)]))

    def _row(self, random: np.random.Generator) -> NDArray[np.int64]:
        parts: list[NDArray[np.int64]] = []
        room = self.context + 1
        while room > 0:
            several = self.sets[int(random.choice(len(self.sets), p=self.odds))]
            text = self._crop(several[int(random.integers(len(several)))], random)[:room]
            parts.append(text)
            room -= len(text)
        return np.concatenate(parts)

    def _crop(self, text: NDArray[np.int64], random: np.random.Generator) -> NDArray[np.int64]:
        """A text behind the start token; half of the long ones from somewhere inside, as generated texts begin."""
        if len(text) > self.context and random.random() < 0.5:
            text = text[int(random.integers(0, len(text) - self.context + 1)) :]
        return np.concatenate([np.array([self.start], dtype=np.int64), text])


def encode(tokenizer: Tokenizer, texts: Sequence[str], context: int) -> list[list[int]]:
    """Tokens of each text behind the start token, at most `context` of them read."""
    start = int(tokenizer.token_to_id(START) or 0)
    return [[start, *one.ids[:context]] for one in tokenizer.encode_batch([plain(text) for text in texts])]


def _bucket(salt: str, text: str) -> int:
    return int.from_bytes(hashlib.sha256(f"{salt}:{text}".encode()).digest()[:4], "big") % 100
