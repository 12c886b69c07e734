"""Orders beside each other at each number of steps."""

from collections.abc import Mapping
from typing import Any

from bench.steering.report.markdown import markdown, number, span, tenths


def order_table(steps: Mapping[str, Mapping[str, Any]]) -> str:
    """A line for each order and number of steps."""
    lines = []
    for count, ways in steps.items():
        for way, one in ways.items():
            score = next((name for name in ("accuracy", "share") if name in one), None)
            lines.append(
                [
                    count,
                    way,
                    "-" if score is None else f"{100 * one[score]:.1f} % {span(one[f'{score}_interval'], tenths)}",
                    f"{one['nats_per_byte']:.3f} {span(one['nats_per_byte_interval'], number)}",
                    f"{one['distinct_2']:.3f}",
                    f"{one['self_bleu']:.3f}",
                    ", ".join(f"{weight:g}" for weight in one.get("weights", ())) or "-",
                    _order_lead(one),
                ]
            )
    head = ["steps", "order", "accuracy or share", "nats a byte", "distinct-2", "self-BLEU", "weights"]
    return markdown([*head, "lead over the best confident order"], lines)


def _order_lead(one: Mapping[str, Any]) -> str:
    if "lead" not in one:
        return "-"
    scale = 1 if one["judged_by"] == "quality" else 100
    unit = "nats a byte" if one["judged_by"] == "quality" else "points"
    low, high = (scale * value for value in one["lead_interval"])
    return f"{scale * one['lead']:+.3g} ({low:+.3g} to {high:+.3g}) {unit}, p {one['p']:.3f}"
