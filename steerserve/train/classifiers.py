"""Judges: classifiers that say which class of a group a text belongs to.

TF-IDF over words and pairs of words, and logistic regression: fast, and easily trained on a split of its own, so that
the judge a strength was chosen by is never the one it is reported by. scikit-learn belongs to the `train` extra.
"""

import hashlib
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from steerserve.errors import ArtifactError

WINDOW_WORDS = 40
"""Long texts are cut to what is judged: about 50 to 64 tokens."""
WINDOWS = 3
"""Windows cut from one long text."""
HELD_OUT_PERCENT = 10
FEW, FOLDS = 1000, 5
"""A label with fewer texts than `FEW` has none set aside for good: `FOLDS` parts are held out in turn."""


class Judge:
    """A trained classifier of some labels, and how often it is right on texts it was not trained on."""

    def __init__(
        self, pipeline: Any, accuracy: float, trained_on: int, held_out: int, texts: int = 0, base_rate: float = 0.0
    ) -> None:
        """trained_on and held_out count pieces of texts; texts: those that accuracy was measured on; base_rate: the
        accuracy of always saying the commonest label."""
        self._pipeline = pipeline
        self.labels: tuple[str, ...] = tuple(str(label) for label in pipeline.classes_)
        self.accuracy, self.trained_on, self.held_out = accuracy, trained_on, held_out
        self.texts, self.base_rate = texts, base_rate

    def probabilities(self, texts: Sequence[str]) -> NDArray[np.float64]:
        """Probability of each label [texts, labels], rows summing to 1."""
        found: NDArray[np.float64] = self._pipeline.predict_proba(list(texts))
        return found

    def probability(self, label: str, texts: Sequence[str]) -> NDArray[np.float64]:
        """Probability of one label [texts]."""
        return self.probabilities(texts)[:, self.labels.index(label)]

    def assigned(self, label: str, texts: Sequence[str]) -> NDArray[np.bool_]:
        """True for each text whose likeliest label is this one [texts]."""
        likeliest: NDArray[np.intp] = self.probabilities(texts).argmax(axis=1)
        return np.equal(likeliest, self.labels.index(label))

    def summary(self) -> dict[str, float]:
        """What provenance says of it."""
        return {"accuracy": round(self.accuracy, 4), "trained_on": self.trained_on, "held_out": self.held_out}


@dataclass(frozen=True)
class Pieces:
    """Texts cut into pieces of at most `WINDOW_WORDS` words; every list has one entry a piece."""

    pieces: list[str]
    labels: NDArray[np.str_]
    owners: list[str]
    """The text that each piece is of."""

    @classmethod
    def of(cls, texts: Mapping[str, Sequence[str]]) -> "Pieces":
        """The pieces of texts by label."""
        cut = [(piece, label, text) for label in texts for text in texts[label] for piece in windows(text)]
        pieces, labels, owners = zip(*cut, strict=True)
        return cls(list(pieces), np.array(labels), list(owners))

    def within(self, texts: Set[str]) -> NDArray[np.bool_]:
        """Which pieces are of these texts [pieces]."""
        return np.array([owner in texts for owner in self.owners], dtype=np.bool_)


def train_judge(texts: Mapping[str, Sequence[str]], seed: int) -> Judge:
    """Train a classifier on texts by label, and measure its accuracy on texts that it was not trained on.

    Few texts are all trained on, and accuracy is that of five classifiers, each tried on the fifth of the texts that it
    did not see (cross-validation). Of many texts a tenth is set aside by hash. Raises ArtifactError where a label has
    too few texts.
    """
    sets, cut = held_out_sets(texts), Pieces.of(texts)
    right, tried = 0, 0
    for held_out in sets:
        away = cut.within(held_out)
        pipeline = _fit(
            [piece for piece, out in zip(cut.pieces, away, strict=True) if not out], cut.labels[~away], seed
        )
        test = [piece for piece, out in zip(cut.pieces, away, strict=True) if out]
        right += int((pipeline.predict(test) == cut.labels[away]).sum())
        tried += len(test)
    trained_on = len(cut.pieces) - tried
    if len(sets) > 1:
        pipeline, trained_on = _fit(cut.pieces, cut.labels, seed), len(cut.pieces)
    counts = [len(several) for several in texts.values()]
    return Judge(pipeline, right / tried, trained_on, tried, sum(map(len, sets)), max(counts) / sum(counts))


def _fit(pieces: Sequence[str], labels: NDArray[np.str_], seed: int) -> Any:
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline

    pipeline = make_pipeline(
        # The model writes lower case without accents, and punctuation tells registers apart.
        TfidfVectorizer(
            lowercase=True,
            strip_accents="unicode",
            token_pattern=r"\w+|[^\w\s]",
            ngram_range=(1, 2),
            min_df=2 if len(pieces) >= 1000 else 1,
            sublinear_tf=True,
            dtype=np.float32,
        ),
        LogisticRegression(C=4.0, class_weight="balanced", max_iter=300, tol=1e-3, random_state=seed),
    )
    return pipeline.fit(pieces, labels)


def held_out_sets(texts: Mapping[str, Sequence[str]]) -> list[frozenset[str]]:
    """The texts that are held out in turn to measure what is trained on the others.

    Where a label has fewer than `FEW` texts: five sets, each a fifth of every label's, so that all are used. Else one:
    the tenth that is set aside by hash. Raises ArtifactError where a label cannot be in every set and outside it.
    """
    if min(len(several) for several in texts.values()) < FEW:
        if lacking := sorted(label for label, several in texts.items() if len(several) < FOLDS):
            raise ArtifactError(f"too few texts to train on and to measure by: {lacking} have fewer than {FOLDS}")
        ordered = [sorted(several, key=_hash) for several in texts.values()]
        return [frozenset(text for several in ordered for text in several[fold::FOLDS]) for fold in range(FOLDS)]
    for use, held_out in (("train on", False), ("hold out", True)):
        lacking = [label for label in texts if all(is_held_out(text) != held_out for text in texts[label])]
        if lacking:
            raise ArtifactError(f"too few texts to {use}: none of {sorted(lacking)}")
    return [frozenset(text for several in texts.values() for text in several if is_held_out(text))]


def windows(text: str, words: int = WINDOW_WORDS, most: int = WINDOWS) -> list[str]:
    """A short text as it is; of a long one up to `most` stretches of `words` words, evenly spaced over it."""
    parts = text.split()
    if len(parts) <= words:
        return [text]
    count = min(most, -(-len(parts) // words))
    starts = np.linspace(0, len(parts) - words, count).astype(int)
    return [" ".join(parts[start : start + words]) for start in starts]


def is_held_out(text: str) -> bool:
    """Tell if a text is among the tenth set aside; it always is or never."""
    # By a hash of its own: the one of `corpus.split_of` has been used up by choosing the split.
    return _hash(text) % 100 < HELD_OUT_PERCENT


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.sha256(b"judge:" + text.encode()).digest()[:4], "big")
