"""Receipts as answers show them: short, or whole where the request asks for it."""

from collections.abc import Mapping
from typing import Any, Final, Literal

Form = Literal["short", "full"]

LEFT_OUT: Final = frozenset(
    {"gains", "strength_per_step", "readings", "rounds", "strength_hidden", "positions_clipped", "steps_touched"}
)
"""Fields of which a short receipt has none: those that grow with the steps, rounds or progress of a row, and details of
layers."""
DIGITS: Final = 6
"""Significant digits of a number."""


def in_form(receipt: dict[str, Any], form: Form) -> dict[str, Any]:
    """The receipt of a row as `steering.receipt` asks for it."""
    return receipt if form == "full" else _short(receipt)


def _short(told: Any) -> Any:
    """Without hashes and LEFT_OUT; of the strengths their range is left, `strength_range`."""
    if isinstance(told, float):
        return float(f"{told:.{DIGITS}g}")
    if isinstance(told, list | tuple):
        return [_short(one) for one in told]
    if not isinstance(told, Mapping):
        return told
    kept = {name: _short(one) for name, one in told.items() if name not in LEFT_OUT and not name.endswith("sha256")}
    strengths = told.get("strength_per_step")
    return kept | ({"strength_range": [min(strengths), max(strengths)]} if strengths else {})
