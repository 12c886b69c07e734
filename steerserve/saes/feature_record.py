"""A feature's record as it is told: what `features.db` keeps short, spelled out."""

from collections.abc import Mapping, Sequence
from typing import Any, Final

BINS: Final = 48
"""Bins of a histogram; bin i holds activations from 2^((i - 24) / 2) up to the next, the outer ones all beyond."""
NEAR: Final = 0.1
"""Share of a curve's range within which it counts as where it began, or as where it ends."""


def bin_edge(number: int) -> float:
    """Lower edge of a bin of a histogram."""
    return float(2.0 ** ((number - BINS // 2) / 2))


def spelled_out(record: Mapping[str, Any], meta: Mapping[str, Any]) -> dict[str, Any]:
    """A record of a store with this meta, as JSON for people: numbers with what they are of."""
    largest, *percent = record["curve"]
    curve = [largest * value / 100 for value in percent]
    forms, committed = turning_points(curve)
    first, *counts = record["histogram"] or [0]
    return {
        "named_by": record["named_by"],
        "detection": record.get("detection"),
        "words": record["words"],
        "contexts_from": meta["recipe"]["source"],
        "contexts": [
            {**context, "masked": [i in context["masked"] for i in range(len(context["tokens"]))]}
            for context in record["contexts"]
        ],
        "histogram": [
            {"from": bin_edge(first + i), "to": bin_edge(first + i + 1), "tokens": count}
            for i, count in enumerate(counts)
        ],
        "density_by_noise": [
            {"mask_ratio": ratio, "density": value}
            for ratio, value in zip(meta["noise_levels"], record["density_by_noise"], strict=True)
        ],
        "curve": {
            "progress": [i / (len(curve) - 1) for i in range(len(curve))],
            "mean_activation": [float(f"{value:.3g}") for value in curve],
            "forms_at": forms,
            "committed_at": committed,
        },
        "promoted": _tokens(record["promoted"], "logit"),
        "suppressed": _tokens(record["suppressed"], "logit"),
        "pushed_up": _tokens(record["pushed_up"], "log_probability"),
        "pushed_down": _tokens(record["pushed_down"], "log_probability"),
    }


def neighbours(record: Mapping[str, Any]) -> list[tuple[int, float]]:
    """The nearest features of a record, and the cosine of each's decoder row with the feature's own."""
    return [(index, value / 100) for index, value in record["neighbours"]]


def _tokens(pairs: Sequence[Sequence[Any]], unit: str) -> list[dict[str, Any]]:
    return [{"token": token, unit: value} for token, value in pairs]


def turning_points(curve: Sequence[float]) -> tuple[float | None, float | None]:
    """Progress from which a curve at i / slices has left where it began, and from which it stays where it ends; None
    for a flat one.

    Left and stays by a tenth of its range.
    """
    spread = max(curve) - min(curve)
    if spread <= 0:
        return None, None
    last = len(curve) - 1
    left = next(i for i, value in enumerate(curve) if abs(value - curve[0]) > NEAR * spread or i == last)
    away = [i for i, value in enumerate(curve) if abs(value - curve[-1]) > NEAR * spread]
    return left / last, (away[-1] + 1) / last if away else 0.0
