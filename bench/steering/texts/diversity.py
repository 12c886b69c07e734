"""Diversity of texts: how little they repeat themselves and each other."""

import math
import re
from collections import Counter
from collections.abc import Sequence

_WORD = re.compile(r"\w+|[^\w\s]")


def words(text: str) -> list[str]:
    """Words and marks, lower case."""
    return _WORD.findall(text.lower())


def distinct(tokens: Sequence[str], size: int) -> float:
    """Distinct-n of one text: the share of its n-grams that differ from each other; 1 where it has none.

    Source: Li et al. 2016 (arXiv 1510.03055).
    """
    grams = _grams(tokens, size)
    return len(grams) / grams.total() if grams else 1.0


def self_bleu(texts: Sequence[Sequence[str]], largest: int = 4) -> float:
    """Mean BLEU of each text with all others as references: 0 where no two share a phrase, 1 where all are alike.

    BLEU (Papineni et al. 2002) with n-grams up to `largest`, clipped by the largest count in any one reference, with
    the brevity penalty of the closest length, the shorter one on a tie; a precision without a match counts
    1 / (2 total), so that short texts are not all 0. NaN for fewer than two texts. Source of the measure: Zhu et al.
    2018 (arXiv 1802.01886).
    """
    if len(texts) < 2:
        return math.nan
    logs = [0.0] * len(texts)
    for size in range(1, largest + 1):
        counts = [_grams(text, size) for text in texts]
        # The largest count over the other texts is that over all, or the second largest where a text holds it itself.
        most: dict[tuple[str, ...], tuple[int, int, int]] = {}
        for owner, grams in enumerate(counts):
            for gram, count in grams.items():
                first, holder, second = most.get(gram, (0, -1, 0))
                if count > first:
                    most[gram] = (count, owner, first)
                elif count > second:
                    most[gram] = (first, holder, count)
        for owner, grams in enumerate(counts):
            matched = sum(
                min(count, most[gram][2] if most[gram][1] == owner else most[gram][0]) for gram, count in grams.items()
            )
            total = max(1, grams.total())
            logs[owner] += math.log(matched / total if matched else 0.5 / total) / largest
    return sum(_brevity(i, texts) * math.exp(log) for i, log in enumerate(logs)) / len(texts)


def _brevity(owner: int, texts: Sequence[Sequence[str]]) -> float:
    mine = len(texts[owner])
    closest = min((abs(len(text) - mine), len(text)) for i, text in enumerate(texts) if i != owner)[1]
    return 1.0 if mine >= closest else math.exp(1 - closest / max(1, mine))


def _grams(tokens: Sequence[str], size: int) -> Counter[tuple[str, ...]]:
    return Counter(tuple(tokens[i : i + size]) for i in range(len(tokens) - size + 1))
