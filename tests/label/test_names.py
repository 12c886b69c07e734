"""Names made of words, and what a name is worth."""

import numpy as np
import pytest

from steerserve.label.names import auc, background, detection, held_words, name_feature, same_stem
from steerserve.label.words import WordTable

LINES = [
    "the team won the match in the second half",
    "the coach said the team will win the match",
    "the team lost the match and the coach left",
    "the king saw the ship in the river near the city",
    "the lord spoke to the king of the city",
    "the ship went to the island and the river",
] * 4 + [f"the {'abcdefghijklmnopqrstuvwxyz'[i % 26] * (2 + i // 26)} of one and the other {i}" for i in range(120)]


def table() -> WordTable:
    words = [line.split() for line in LINES]
    known = sorted({word for line in words for word in line})
    flat = [known.index(word) for line in words for word in line]
    rows = [row for row, line in enumerate(words) for _ in line]
    return WordTable(tuple(known), np.array(flat), np.array(rows), np.arange(len(flat)))


def places(made: WordTable, word: str) -> np.ndarray:
    return np.flatnonzero(made.word == made.words.index(word))


def test_a_name_quotes_a_shared_word_and_tells_the_words_around() -> None:
    made = table()
    known = background(made, np.arange(len(made.at)))
    found = name_feature(made, known, places(made, "team"), np.ones(12))
    assert found is not None and found.centre == "team"
    assert found.name.startswith('"team": ')
    assert "match" in found.words and "the" not in found.name.split(": ")[1].split(", ")
    several = np.concatenate([places(made, word) for word in ("coach", "match", "team")])
    found = name_feature(made, known, several, np.ones(len(several)))
    assert found is not None and found.centre is None
    assert {"coach", "match", "team"} & set(found.name.split(", "))
    assert name_feature(made, known, np.zeros(0, dtype=np.int64), np.zeros(0)) is None


def test_strong_places_count_for_more() -> None:
    made = table()
    known = background(made, np.arange(len(made.at)))
    both = np.concatenate([places(made, "ship"), places(made, "coach")])
    activation = np.array([5.0] * len(places(made, "ship")) + [0.1] * len(places(made, "coach")))
    found = name_feature(made, known, both, activation)
    assert found is not None and found.centre == "ship"
    found = name_feature(made, known, both, activation[::-1])
    assert found is not None and found.centre == "coach"


def test_a_name_tells_its_places_from_others_and_a_foreign_one_does_not() -> None:
    made = table()
    known = background(made, np.arange(len(made.at)))
    words = {0: ["team", "match"], 1: ["river", "island"]}
    held = {0: places(made, "team"), 1: places(made, "river")}
    found = detection(made, known, words, held, np.arange(len(made.at)), seed=0)
    assert found[0][0] > 0.8 and found[1][0] > 0.8
    windows, chance = made.window(held[0]), made.window(np.arange(len(made.at)))
    ids = [made.words.index(word) for word in words[0]]
    ours = [sum(2 * (row[8] == w) + (w in row) for w in ids) for row in windows.tolist()]
    theirs = [sum(2 * (row[8] == w) + (w in row) for w in ids) for row in chance.tolist()]
    plain = np.mean([(a > b) + 0.5 * (a == b) for a in ours for b in theirs])
    assert held_words(windows, ids, known).tolist() == ours
    assert found[0][0] == pytest.approx(plain)
    assert auc(np.array([1.0]), np.array([1.0, 0.0])) == 0.75


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("movie", "movies", True),
        ("play", "playing", True),
        ("car", "carpet", False),
        ("a", "as", False),
        ("x", "x", True),
    ],
)
def test_endings_of_a_word(one: str, other: str, same: bool) -> None:
    assert same_stem(one, other) is same_stem(other, one) is same
