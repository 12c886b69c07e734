"""Judges: classifiers that say which class of a group a text belongs to.

TF-IDF over words and pairs of words, and logistic regression: fast, and easily trained on a split of its own, so that
the judge a strength was chosen by is never the one it is reported by. scikit-learn belongs to the `train` extra.
"""

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from steerserve.errors import ArtifactError

WINDOW_WORDS = 40
"""Long texts are cut to what is judged: about 50 to 64 tokens."""
WINDOWS = 3
"""Windows cut from one long text."""
HELD_OUT_PERCENT = 10


class Judge:
    """A trained classifier of some labels, and how often it is right on texts it was not trained on."""

    def __init__(self, pipeline: Any, accuracy: float, trained_on: int, held_out: int) -> None:
        self._pipeline = pipeline
        self.labels: tuple[str, ...] = tuple(str(label) for label in pipeline.classes_)
        self.accuracy, self.trained_on, self.held_out = accuracy, trained_on, held_out

    def probabilities(self, texts: Sequence[str]) -> NDArray[np.float64]:
        """Probability of each label [texts, labels], rows summing to 1."""
        found: NDArray[np.float64] = self._pipeline.predict_proba(list(texts))
        return found

    def probability(self, label: str, texts: Sequence[str]) -> NDArray[np.float64]:
        """Probability of one label [texts]."""
        return self.probabilities(texts)[:, self.labels.index(label)]

    def assigned(self, label: str, texts: Sequence[str]) -> NDArray[np.bool_]:
        """Whether each text's likeliest label is this one [texts]."""
        likeliest: NDArray[np.intp] = self.probabilities(texts).argmax(axis=1)
        return np.equal(likeliest, self.labels.index(label))

    def summary(self) -> dict[str, float]:
        """What provenance says of it."""
        return {"accuracy": round(self.accuracy, 4), "trained_on": self.trained_on, "held_out": self.held_out}


def train_judge(texts: Mapping[str, Sequence[str]], seed: int) -> Judge:
    """Train on nine tenths of the texts of each label, and measure accuracy on the tenth set aside by hash.

    Raises ArtifactError where a label has no text on one of the two sides.
    """
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline

    check_sides(texts)
    sides: dict[bool, tuple[list[str], list[str]]] = {False: ([], []), True: ([], [])}
    for label, several in texts.items():
        for text in several:
            cut, labels = sides[is_held_out(text)]
            pieces = windows(text)
            cut += pieces
            labels += [label] * len(pieces)
    (train, train_labels), (test, test_labels) = sides[False], sides[True]
    pipeline = make_pipeline(
        # The model writes lower case without accents, and punctuation tells registers apart.
        TfidfVectorizer(
            lowercase=True,
            strip_accents="unicode",
            token_pattern=r"\w+|[^\w\s]",
            ngram_range=(1, 2),
            min_df=2 if len(train) >= 1000 else 1,
            sublinear_tf=True,
            dtype=np.float32,
        ),
        LogisticRegression(C=4.0, class_weight="balanced", max_iter=300, tol=1e-3, random_state=seed),
    )
    pipeline.fit(train, train_labels)
    accuracy = float(np.mean(pipeline.predict(test) == np.array(test_labels)))
    return Judge(pipeline, accuracy, len(train), len(test))


def check_sides(texts: Mapping[str, Sequence[str]]) -> None:
    """Raise ArtifactError where a label has no text to train on, or none to hold out."""
    for use, held_out in (("train on", False), ("hold out", True)):
        lacking = [label for label in texts if all(is_held_out(text) != held_out for text in texts[label])]
        if lacking:
            raise ArtifactError(f"too few texts to {use}: none of {sorted(lacking)}")


def windows(text: str, words: int = WINDOW_WORDS, most: int = WINDOWS) -> list[str]:
    """A short text as it is; of a long one up to `most` stretches of `words` words, evenly spaced over it."""
    parts = text.split()
    if len(parts) <= words:
        return [text]
    count = min(most, -(-len(parts) // words))
    starts = np.linspace(0, len(parts) - words, count).astype(int)
    return [" ".join(parts[start : start + words]) for start in starts]


def is_held_out(text: str) -> bool:
    """Whether a text is among the tenth set aside; it always is or never."""
    # By a hash of its own: the one of `corpus.split_of` has been used up by choosing the split.
    return int.from_bytes(hashlib.sha256(b"judge:" + text.encode()).digest()[:4], "big") % 100 < HELD_OUT_PERCENT
