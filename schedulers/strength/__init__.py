"""Strength schedules: how hard to push, over denoising progress."""

from collections.abc import Mapping
from typing import Final

from schedulers.choice import Choice, build, parse
from schedulers.strength.base import StrengthSchedule
from schedulers.strength.commitment import Commitment
from schedulers.strength.compile import NORMS, GainTable, check_norm, compile_gains, slice_of
from schedulers.strength.piecewise import PRESETS, Piecewise
from schedulers.strength.uniform import Uniform
from schedulers.strength.window import Window

STRENGTHS: Final[Mapping[str, type[StrengthSchedule]]] = {
    "uniform": Uniform,
    "window": Window,
    "piecewise": Piecewise,
    "commitment": Commitment,
}


def build_strength(choice: Choice) -> tuple[StrengthSchedule, str | None]:
    """The schedule that `choice` names, and its `norm` (None: the schedule's own); raises ValueError."""
    name, options = parse("schedule", choice)
    norm = options.pop("norm", None)
    schedule = build("schedule", STRENGTHS, {"type": name, **options}, also=["norm"])
    if norm is None:
        return schedule, None
    try:
        return schedule, check_norm(norm)
    except ValueError as error:
        raise ValueError(f"schedule '{name}': {error}") from error


__all__ = [
    "NORMS",
    "PRESETS",
    "STRENGTHS",
    "Commitment",
    "GainTable",
    "Piecewise",
    "StrengthSchedule",
    "Uniform",
    "Window",
    "build_strength",
    "compile_gains",
    "slice_of",
]
