"""Strength schedules: how hard to push, over denoising progress."""

from collections.abc import Mapping
from typing import Final

from schedulers.choice import Choice, build, parse
from schedulers.strength.base import StrengthSchedule
from schedulers.strength.commitment import Commitment
from schedulers.strength.compile import NORMS, GainTable, check_norm, compile_gains, slice_of
from schedulers.strength.feedback import Controllers, ControllerState, Feedback, check_target, controllers
from schedulers.strength.joint import JointTable, compile_joint, joint_gains, joint_rho, joint_weights
from schedulers.strength.optimal import Optimal
from schedulers.strength.piecewise import PRESETS, Piecewise
from schedulers.strength.uniform import Uniform
from schedulers.strength.window import Window

STRENGTHS: Final[Mapping[str, type[StrengthSchedule]]] = {
    "uniform": Uniform,
    "window": Window,
    "piecewise": Piecewise,
    "commitment": Commitment,
    "optimal": Optimal,
}
"""Open loop: compiled to a table before the run."""

CONTROLLERS: Final[Mapping[str, type[Feedback]]] = {"feedback": Feedback}
"""Closed loop: the gain is worked out at each step, from what was read."""

SCHEDULES: Final[tuple[str, ...]] = (*STRENGTHS, *CONTROLLERS)
"""Every name that a schedule may go by."""


def build_strength(choice: Choice) -> tuple[StrengthSchedule, str | None]:
    """The open-loop schedule that `choice` names, and its `norm` (None: the schedule's own); raises ValueError."""
    name, options = parse("schedule", choice)
    if name in CONTROLLERS:
        raise ValueError(f"schedule '{name}' is a closed loop: its gains are not known before the run")
    norm = options.pop("norm", None)
    schedule = build("schedule", STRENGTHS, {"type": name, **options}, also=["norm"], names=SCHEDULES)
    if norm is None:
        return schedule, None
    try:
        return schedule, check_norm(norm)
    except ValueError as error:
        raise ValueError(f"schedule '{name}': {error}") from error


def build_controller(choice: Choice) -> Feedback:
    """The closed-loop schedule that `choice` names; raises ValueError."""
    return build("closed-loop schedule", CONTROLLERS, choice)


__all__ = [
    "CONTROLLERS",
    "Commitment",
    "ControllerState",
    "Controllers",
    "Feedback",
    "GainTable",
    "JointTable",
    "NORMS",
    "Optimal",
    "PRESETS",
    "Piecewise",
    "SCHEDULES",
    "STRENGTHS",
    "StrengthSchedule",
    "Uniform",
    "Window",
    "build_controller",
    "build_strength",
    "check_target",
    "compile_gains",
    "compile_joint",
    "controllers",
    "joint_gains",
    "joint_rho",
    "joint_weights",
    "slice_of",
]
