"""Judges: what they learn, and that they are scored on what they did not see."""

import random

import numpy as np
import pytest

from steerserve.errors import ArtifactError
from steerserve.train.classifiers import FEW, FOLDS, held_out_sets, is_held_out, train_judge, windows

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


def test_of_few_texts_all_are_trained_on_and_all_are_measured_by() -> None:
    few = texts(40)
    sets = held_out_sets(few)
    assert len(sets) == FOLDS
    assert sorted(text for held_out in sets for text in held_out) == sorted(
        {t for several in few.values() for t in several}
    )
    for held_out in sets:
        assert all(0 < sum(text in held_out for text in several) < len(several) for several in few.values())
    judge = train_judge(few, 0)
    assert judge.trained_on == judge.texts == judge.held_out == 120
    assert judge.base_rate == pytest.approx(1 / 3)


def test_a_piece_is_never_tried_by_a_classifier_that_saw_another_piece_of_its_text() -> None:
    draw = random.Random(2)
    # Only the text itself tells its label: a word of its own, in each of its pieces.
    long = {
        label: [" ".join([f"{label}{i}own"] * 60 + draw.choices(FILLER, k=60)) for i in range(30)]
        for label in ("a", "b")
    }
    assert train_judge(long, 0).accuracy < 0.8


def test_of_many_texts_a_tenth_is_set_aside() -> None:
    many = {label: [f"{label} {i} of many texts" for i in range(FEW)] for label in ("one", "two")}
    (held_out,) = held_out_sets(many)
    assert held_out == {text for several in many.values() for text in several if is_held_out(text)}
    assert 0.07 * 2 * FEW < len(held_out) < 0.13 * 2 * FEW


def test_too_few_texts_are_refused() -> None:
    with pytest.raises(ArtifactError, match=r"\['a', 'b'\] have fewer than 5"):
        train_judge({"a": ["one text here"], "b": ["another one there"]}, 0)
