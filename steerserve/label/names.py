"""A name for a feature from the words of its contexts, without any other model, and how well the name tells them.

A word scores by how much more often it stands at the feature's places, and near them, than at places drawn at random,
weighted by activation and by nearness: its parts of the Kullback-Leibler divergence of the two distributions. Words
that stand near any place, such as "the", score only at the place itself. A name is the word at the place itself, where
most places share it, and the highest scoring words.

Detection after EleutherAI's delphi (arXiv 2410.13928), with the words of the name in the place of a judge: the chance
that a held-out context of the feature holds more of them than a random one (AUC, ties count half).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

from steerserve.label.words import WINDOW, WordTable

NEARNESS: Final = np.array([np.exp(-(abs(o) - 1) / 4) if o else 0.0 for o in range(-WINDOW, WINDOW + 1)])
"""Weight of a word around by its distance from the place: 1 beside it, and falling."""
COMMON: Final = 0.06
"""Rate around random places from which a word is one that stands anywhere."""
SMOOTHING: Final = 0.01
"""Added to both rates, so that a word that random places never show does not win by one context."""
SUPPORT: Final = 3
"""Contexts that must hold a word, where a feature has four times as many; one for a word that the feature promotes."""
SHARED: Final = 0.5
"""Share of the places that must have one word for a name to quote it."""
WORDS: Final = 12
"""Words kept of a feature, for search."""
IN_NAME: Final = 4
"""Words around in a name, at most."""


@dataclass(frozen=True)
class NamedFeature:
    """A name and what it was made of."""

    name: str
    words: tuple[str, ...]
    """Words of its contexts, the most telling ones first; the name is made of some."""
    centre: str | None
    """The word that most of its places have; None where they share none."""


@dataclass(frozen=True)
class Background:
    """What random places look like."""

    centre: np.ndarray
    """[words] share of random places at which each word stands."""
    around: np.ndarray
    """[words] mean nearness weight of each word around a random place."""

    @property
    def is_common(self) -> np.ndarray:
        """[words] bool: words that stand near any place."""
        return self.around >= COMMON


def background(table: WordTable, places: np.ndarray) -> Background:
    """Rates of words at and around places [n] drawn at random."""
    windows, share = table.window(places), np.full(len(places), 1 / max(1, len(places)))
    word, weight, _ = _around(windows, share)
    there = windows[:, WINDOW] >= 0
    return Background(
        np.bincount(windows[there, WINDOW], share[there], minlength=len(table.words)),
        np.bincount(word, weight, minlength=len(table.words)),
    )


def name_feature(
    table: WordTable, known: Background, places: np.ndarray, activation: np.ndarray, promoted: Sequence[str] = ()
) -> NamedFeature | None:
    """The name of a feature from places [n] where it is active so strongly [n]; None for no place with a word.

    promoted: words of the tokens that it makes likelier; those that its contexts hold as well count twice.
    """
    windows = table.window(places)
    some = windows[:, WINDOW] >= 0
    windows, activation = windows[some], activation[some]
    if not len(windows):
        return None
    share = activation / activation.sum()
    middle = windows[:, WINDOW]
    near, weight, context = _around(windows, share)
    at_context = np.concatenate([np.arange(len(middle)), context])
    ids, inverse = np.unique(np.concatenate([middle, near]), return_inverse=True)
    at, around = np.split(inverse, [len(middle)])
    centres = np.bincount(at, share, minlength=len(ids))
    score = _divergence(centres, known.centre[ids])
    score += np.where(
        known.is_common[ids],
        0.0,
        _divergence(np.bincount(around, weight, minlength=len(ids)), known.around[ids]).clip(min=0),
    )
    likelier = {one.strip().casefold() for one in promoted}
    is_likelier = np.array([table.words[i] in likelier for i in ids])
    score[is_likelier] *= 2
    support = np.bincount(np.unique(at_context * len(ids) + inverse) % len(ids), minlength=len(ids))
    score[(support < SUPPORT) & ~is_likelier & (len(windows) >= 4 * SUPPORT)] = -np.inf
    most = int(ids[centres.argmax()])
    centre = table.words[most] if centres.max() >= SHARED else None
    chosen: list[str] = []
    for i in np.argsort(-score, kind="stable"):
        text = table.words[ids[i]]
        if score[i] <= 0 or len(chosen) == WORDS:
            break
        if any(char.isalnum() for char in text) and not any(same_stem(text, other) for other in chosen):
            chosen.append(text)
    beside = [text for text in chosen if centre is None or not same_stem(text, centre)][:IN_NAME]
    if centre is None and not beside:
        centre = table.words[most]
    name = ", ".join(beside)
    if centre is not None:
        name = f'"{centre}"' + (f": {name}" if name else "")
    return NamedFeature(name, tuple(chosen), centre)


def same_stem(one: str, other: str) -> bool:
    """True if two words differ by an English ending only."""
    short, long = sorted((one, other), key=len)
    endings = ("", "s", "es", "ed", "d", "ing", "er", "ers", "ly", "'s", "\u2019s")
    return len(short) > 2 and long.startswith(short) and long[len(short) :] in endings or short == long


def _divergence(rate: np.ndarray, base: np.ndarray) -> np.ndarray:
    return rate * np.log((rate + SMOOTHING) / (base + SMOOTHING))


def _around(windows: np.ndarray, share: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Words around the middle of windows [n, 2 * WINDOW + 1], each context's different words once, where they stand
    nearest: word, weight and context [m]; weight is nearness times the share [n] of the context."""
    context, column = np.nonzero((windows >= 0) & (NEARNESS > 0))
    word, near = windows[context, column], NEARNESS[column]
    order = np.lexsort((-near, word, context))
    context, word, near = context[order], word[order], near[order]
    first = np.ones(len(word), dtype=bool)
    first[1:] = (word[1:] != word[:-1]) | (context[1:] != context[:-1])
    return word[first], near[first] * share[context[first]], context[first]


def detection(
    table: WordTable,
    known: Background,
    words: Mapping[int, Sequence[str]],
    held: Mapping[int, np.ndarray],
    random: np.ndarray,
    seed: int,
) -> dict[int, tuple[float, float]]:
    """For each feature how well the words of its name tell its held-out places from random ones [n], and how well the
    words of another feature's name, drawn at random, do.

    words: those of each name; held: places by feature. Features without a name or a held-out place are left out.
    """
    index = {word: i for i, word in enumerate(table.words)}
    ids = {feature: [index[word] for word in several if word in index] for feature, several in words.items()}
    chance, draw = table.window(random), np.random.default_rng(seed)
    every = sorted(ids)
    found = {}
    for feature in every:
        if not len(held[feature]) or not len(random):
            continue
        windows = table.window(held[feature])
        other = every[int(draw.integers(len(every)))]
        found[feature] = (
            auc(held_words(windows, ids[feature], known), held_words(chance, ids[feature], known)),
            auc(held_words(windows, ids[other], known), held_words(chance, ids[other], known)),
        )
    return found


def held_words(windows: np.ndarray, words: Sequence[int], known: Background) -> np.ndarray:
    """How many of words each window [n, 2 * WINDOW + 1] holds [n]: in the middle a word counts twice, and words that
    stand anywhere count nowhere else."""
    count = np.zeros(len(windows))
    for word in words:
        there = windows == word
        count += 2.0 * there[:, WINDOW]
        if not known.is_common[word]:
            count += there.any(1)
    return count


def auc(ours: np.ndarray, theirs: np.ndarray) -> float:
    """Chance that one of ours [n] is larger than one of theirs [m]; ties count half."""
    gap = ours[:, None] - theirs[None]
    return float(((gap > 0) + 0.5 * (gap == 0)).mean())
