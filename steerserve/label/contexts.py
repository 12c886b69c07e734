"""What is kept of a place where a feature is active: the token, some tokens around it, which of them were masked."""

from collections.abc import Iterator
from typing import Any

from torch import Tensor

from steerserve.label.activity import Places
from steerserve.label.texts import ReadTexts
from steerserve.label.words import Surfaces


def kept_contexts(
    texts: ReadTexts, surfaces: Surfaces, places: Places, feature: int, count: int, width: int
) -> list[dict[str, Any]]:
    """The first `count` places of a feature as JSON, strongest first: `tokens` (at most `width`, as they read), `at`
    (which of them is the place), `masked` (which were hidden from the model), `activation`, `mask_ratio` of the text.
    Contexts of the same tokens are kept once."""
    found: list[dict[str, Any]] = []
    seen: set[tuple[str, ...]] = set()
    for place, value in _in_order(places.place[feature], places.value[feature]):
        first, last = borders(texts, place, width)
        tokens = tuple(surfaces[token] for token in texts.tokens[first:last].tolist())
        if tokens in seen:
            continue
        seen.add(tokens)
        found.append(
            {
                "tokens": list(tokens),
                "at": place - first,
                "masked": [i for i, hidden in enumerate(texts.masked[first:last].tolist()) if hidden],
                "activation": round(value, 2),
                "mask_ratio": round(float(texts.ratio[texts.row[place]]), 2),
            }
        )
        if len(found) == count:
            break
    return found


def borders(texts: ReadTexts, place: int, width: int) -> tuple[int, int]:
    """First place of the `width` tokens around a place, two thirds of them before it, and the one behind the last."""
    first = last = place
    row = texts.row[place]

    def is_same(other: int) -> bool:
        return 0 <= other < len(texts.tokens) and bool(texts.row[other] == row) and bool(texts.text[other])

    while last - first + 1 < width and (is_same(first - 1) or is_same(last + 1)):
        before = place - first < 2 * (last - place) + 2
        if is_same(first - 1) and (before or not is_same(last + 1)):
            first -= 1
        else:
            last += 1
    return first, last + 1


def _in_order(places: Tensor, values: Tensor) -> Iterator[tuple[int, float]]:
    for place, value in zip(places.tolist(), values.tolist(), strict=True):
        if place >= 0:
            yield place, value
