"""The words that a row of tokens spells, whatever the tokenizer, and which tokens each word stands at."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from tokenizers import Tokenizer

from steerserve.engine.api.text import continuation
from steerserve.label.texts import ReadTexts

WINDOW: Final = 8
"""Words on either side that count as the surroundings of a token."""
_UNIT: Final = re.compile(r"\w+(?:['\u2019-]\w+)*|[^\w\s]")


class Surfaces:
    """What each token id adds to a text: ` word`, or `ing` for a piece that is glued to what stands before it."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._known: dict[int, str] = {}
        ids = range(tokenizer.get_vocab_size())
        self._before = next(([i] for i in ids if self._decode([i]).strip().isalpha()), [])

    def __getitem__(self, token: int) -> str:
        if token not in self._known:
            self._known[token] = continuation(self._decode, self._before, [token])
        return self._known[token]

    def _decode(self, ids: Sequence[int]) -> str:
        text: str = self._tokenizer.decode(list(ids), skip_special_tokens=True)
        return text


@dataclass(frozen=True)
class WordTable:
    """Every word of noised texts in order, case-folded; a mark of punctuation is a word of its own."""

    words: tuple[str, ...]
    """Different words."""
    word: np.ndarray
    """[occurrences] index into `words`."""
    row: np.ndarray
    """[occurrences] number of the text."""
    at: np.ndarray
    """[places] occurrence that a token belongs to; -1 for none."""

    def window(self, places: np.ndarray) -> np.ndarray:
        """Words around places [n, 2 * WINDOW + 1], the word of the place itself in the middle; -1 for none."""
        centre = self.at[places]
        index = centre[:, None] + np.arange(-WINDOW, WINDOW + 1)
        inside = (centre[:, None] >= 0) & (index >= 0) & (index < len(self.word))
        index = np.where(inside, index, 0)
        inside &= self.row[index] == self.row[np.maximum(centre, 0)][:, None]
        return np.where(inside, self.word[index], -1)


def word_table(texts: ReadTexts, surfaces: Surfaces) -> WordTable:
    """The words of every text, hidden tokens as they were before masking."""
    known: dict[str, int] = {}
    word: list[int] = []
    owner: list[int] = []
    at = np.full(len(texts.tokens), -1, dtype=np.int64)
    tokens, row = texts.tokens.tolist(), texts.row.numpy()
    is_text = texts.text.numpy()
    borders = np.flatnonzero(np.diff(row, prepend=-1, append=-1)).tolist()
    for start, end in zip(borders, borders[1:], strict=False):
        places = [place for place in range(start, end) if is_text[place]]
        pieces = [surfaces[tokens[place]] for place in places]
        of_character = [place for place, piece in zip(places, pieces, strict=True) for _ in piece]
        for match in _UNIT.finditer("".join(pieces)):
            for place in of_character[match.start() : match.end()]:
                at[place] = len(word)
            word.append(known.setdefault(match[0].casefold(), len(known)))
            owner.append(int(row[start]))
    return WordTable(tuple(known), np.array(word, dtype=np.int64), np.array(owner, dtype=np.int64), at)
