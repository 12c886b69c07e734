"""What steering takes by name: operators, units, scopes, controls. Free of torch; each list is written here alone."""

from collections.abc import Mapping
from typing import Final, Literal, get_args

Operator = Literal["add", "boost", "multiply", "clamp", "project_out", "cap"]
Unit = Literal["residual", "max_act", "raw", "stored", "kl"]
ScopeName = Literal["all", "prompt", "response", "masked", "committed"]
Direction = Literal["sae", "diff_means"]
Control = Literal["random", "sign_flip", "matched_norm"]
Combine = Literal["independent", "joint"]
OnExceed = Literal["clip", "refuse"]

OPERATORS: Final[tuple[Operator, ...]] = get_args(Operator)
UNITS: Final[tuple[Unit, ...]] = get_args(Unit)
SCOPE_NAMES: Final[tuple[ScopeName, ...]] = get_args(ScopeName)
DIRECTIONS: Final[tuple[Direction, ...]] = get_args(Direction)
CONTROLS: Final[tuple[Control, ...]] = get_args(Control)
COMBINE: Final[tuple[Combine, ...]] = get_args(Combine)
ON_EXCEED: Final[tuple[OnExceed, ...]] = get_args(OnExceed)

NEUTRAL: Final[Mapping[str, float]] = {"add": 0.0, "boost": 0.0, "multiply": 1.0, "project_out": 0.0}
"""Strengths at which an operator changes nothing. A clamp or a cap has none: at 0 it takes away what is there."""
