"""Markdown tables, and how figures are written in them."""

import math
from collections.abc import Callable, Sequence

Line = Sequence[str]


def markdown(head: Line, lines: Sequence[Line]) -> str:
    """A Markdown table."""
    return "\n".join(f"| {' | '.join(line)} |" for line in [head, ["---"] * len(head), *lines])


def percent(share: float) -> str:
    """A share as a whole percentage."""
    return "-" if math.isnan(share) else f"{100 * share:.0f} %"


def span(both: Sequence[float], shown: Callable[[float], str]) -> str:
    """An interval, each end as `shown` writes it."""
    return f"({shown(both[0])} to {shown(both[1])})"


def points(share: float) -> str:
    """A difference of shares in percentage points."""
    return f"{100 * share:+.0f}"


def tenths(share: float) -> str:
    """A share as a percentage to a tenth."""
    return f"{100 * share:.1f} %"


def number(value: float) -> str:
    """Two digits, or a dash for what is not a number."""
    return "-" if math.isnan(value) else f"{value:.2f}"
