"""Search for features by words: in any order, by their beginnings, and misspelt."""

import re
import threading
from bisect import bisect_left
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Final

from rapidfuzz import process
from rapidfuzz.distance import DamerauLevenshtein

from steerserve.saes.feature_store import FeatureStore

MOST_WORDS: Final = 12
"""Words of a query that are looked up."""
ALIKE: Final = 0.72
"""Least share of equal letters of a word that is taken for a misspelt one."""
SPELLINGS: Final = 3
"""Words that a misspelt one may stand for."""
_WORD: Final = re.compile(r"\w+")


class FeatureSearch:
    """Ranks the features of several SAEs by a query. Any thread may ask."""

    def __init__(self, stores: Mapping[str, Sequence[FeatureStore]]) -> None:
        """stores: by SAE; what an earlier one of an SAE names is not named by a later one."""
        self._stores = stores
        self._lock = threading.Lock()
        self._vocabulary: list[str] | None = None

    def ranked(self, query: str, saes: Sequence[str]) -> list[tuple[str, int]]:
        """SAE and index of every feature that holds a word of the query, the best first.

        Those that hold more of its words come first, then those whose names hold more of them, then by BM25, where
        names count most, times how well the name tells the feature's contexts from others. A word that begins with one
        of the query counts as that. A word that none begins with stands for the words spelled most like it.
        """
        held: dict[tuple[str, int], list[float]] = {}
        named: Counter[tuple[str, int]] = Counter()
        for word in dict.fromkeys(_WORD.findall(query.casefold())[:MOST_WORDS]):
            best: dict[tuple[str, int], float] = {}
            in_name: set[tuple[str, int]] = set()
            spellings = self._spellings(word)
            for name in saes:
                for store in self._stores.get(name, ()):
                    for index, value in store.matching(spellings).items():
                        key, weighed = (name, index), value * (0.5 + store.scores.get(index, 0.5))
                        best[key] = max(best.get(key, 0.0), weighed)
                    in_name |= {(name, index) for index in store.named(spellings)}
            named.update(in_name)
            for key, value in best.items():
                held.setdefault(key, []).append(value)
        return sorted(held, key=lambda key: (-len(held[key]), -named[key], -sum(held[key]), key))

    def _spellings(self, word: str) -> list[str]:
        """The word, or where none begins with it and it has four letters or more, those spelled most like it."""
        with self._lock:
            if self._vocabulary is None:
                every = (store.vocabulary() for several in self._stores.values() for store in several)
                self._vocabulary = sorted(set().union(*every))
        at = bisect_left(self._vocabulary, word)
        known = at < len(self._vocabulary) and self._vocabulary[at].startswith(word)
        if known or len(word) < 4:
            return [word]
        near = process.extract(
            word,
            self._vocabulary,
            scorer=DamerauLevenshtein.normalized_similarity,
            score_cutoff=ALIKE,
            limit=SPELLINGS,
        )
        # The word itself too: the index knows other forms of a word than the vocabulary does.
        return [word, *(found for found, _, _ in near)]
