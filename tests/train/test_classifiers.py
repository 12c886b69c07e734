"""Judges: what they learn, and that they are scored on what they did not see."""

import random

import numpy as np
import pytest

from steerserve.errors import ArtifactError
from steerserve.train.classifiers import train_judge, windows

FILLER = ("a", "the", "we", "saw", "it", "then", "over", "there")
MARKS = {"sea": ("boat", "wave", "harbour"), "hill": ("peak", "ridge", "valley"), "town": ("street", "shop", "tram")}


def texts(count: int, length: int = 9) -> dict[str, list[str]]:
    draw = random.Random(0)
    return {
        label: [" ".join(draw.choices(FILLER, k=length) + draw.choices(marks, k=2)) for _ in range(count)]
        for label, marks in MARKS.items()
    }


def test_a_judge_tells_its_labels_apart() -> None:
    judge = train_judge(texts(80), 0)
    assert judge.labels == ("hill", "sea", "town")
    assert judge.accuracy > 0.95 and judge.held_out > 5
    found = judge.probabilities(["The BOAT was on a wave", "up to the peak and the ridge"])
    assert found.shape == (2, 3)
    assert found.sum(axis=1) == pytest.approx([1.0, 1.0])
    assert judge.assigned("sea", ["the boat", "the peak"]).tolist() == [True, False]
    assert np.array_equal(judge.probability("hill", ["the peak"]), judge.probabilities(["the peak"])[:, 0])


def test_labels_without_meaning_are_not_learnt() -> None:
    draw = random.Random(1)
    noise = {label: [" ".join(draw.choices(FILLER, k=12)) for _ in range(400)] for label in ("a", "b")}
    assert 0.2 < train_judge(noise, 0).accuracy < 0.8


def test_training_is_repeatable() -> None:
    first, second = train_judge(texts(40), 0), train_judge(texts(40), 0)
    assert np.array_equal(first.probabilities(["the boat"]), second.probabilities(["the boat"]))


def test_long_texts_are_cut_into_windows() -> None:
    words = [str(i) for i in range(100)]
    assert windows("short text  as it is", 5) == ["short text  as it is"]
    cut = windows(" ".join(words), 10, 3)
    assert [part.split()[0] for part in cut] == ["0", "45", "90"]
    assert all(len(part.split()) == 10 for part in cut)
    assert len(windows(" ".join(words[:15]), 10, 3)) == 2


def test_too_few_texts_are_refused() -> None:
    with pytest.raises(ArtifactError, match="none of"):
        train_judge({"a": ["one text here"], "b": ["another one there"]}, 0)
