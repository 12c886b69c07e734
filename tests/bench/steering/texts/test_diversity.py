"""Repetition figures, worked out by hand."""

import math
from collections import Counter

import pytest

from bench.steering.texts.diversity import distinct, self_bleu, words


def test_words_are_lower_case_and_marks_stand_alone() -> None:
    assert words("The king's, won!") == ["the", "king", "'", "s", ",", "won", "!"]


def test_distinct_is_the_share_of_different_n_grams() -> None:
    assert distinct(["a", "b", "a", "b"], 1) == 0.5
    assert distinct(["a", "b", "a", "b"], 2) == pytest.approx(2 / 3)
    assert distinct(["a"], 2) == 1.0


def test_equal_texts_have_self_bleu_1_and_different_ones_next_to_none() -> None:
    assert self_bleu([["a", "b", "c", "d", "e"]] * 3) == pytest.approx(1.0)
    assert math.isnan(self_bleu([["a"]]))
    # No match of any order: each precision is 1 / (2 total), totals 5, 4, 3 and 2.
    apart = self_bleu([list("abcde"), list("fghij")])
    assert apart == pytest.approx((1 / 10 * 1 / 8 * 1 / 6 * 1 / 4) ** 0.25)


def test_self_bleu_by_hand() -> None:
    texts = [list("aab"), list("ab"), list("aac")]
    # aab: a a b match 2 + 1 (the largest count of a in one other text is 2), aa and ab both match.
    # ab: a and b match, ab matches, and it is as long as needed only against itself: closest length 3.
    # aac: a a match, c does not; aa matches, ac does not.
    first = math.sqrt(3 / 3 * 2 / 2)
    second = math.exp(1 - 3 / 2) * math.sqrt(2 / 2 * 1 / 1)
    third = math.sqrt(2 / 3 * 1 / 2)
    assert self_bleu(texts, largest=2) == pytest.approx((first + second + third) / 3)


def test_self_bleu_is_the_mean_of_plain_bleus() -> None:
    texts = [
        text.split() for text in ("the king won the match", "the king lost the match", "the the crew won won", "x")
    ]

    def bleu(mine: list[str], others: list[list[str]]) -> float:
        log = 0.0
        for size in range(1, 5):
            own = Counter(tuple(mine[i : i + size]) for i in range(len(mine) - size + 1))
            refs = [Counter(tuple(o[i : i + size]) for i in range(len(o) - size + 1)) for o in others]
            matched = sum(min(count, max(ref[gram] for ref in refs)) for gram, count in own.items())
            total = max(1, sum(own.values()))
            log += math.log(matched / total if matched else 1 / (2 * total)) / 4
        closest = min((abs(len(o) - len(mine)), len(o)) for o in others)[1]
        return math.exp(log) * (1.0 if len(mine) >= closest else math.exp(1 - closest / len(mine)))

    expected = sum(bleu(text, texts[:i] + texts[i + 1 :]) for i, text in enumerate(texts)) / len(texts)
    assert self_bleu(texts) == pytest.approx(expected)
