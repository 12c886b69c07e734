"""Closed loops: interventions whose gain is worked out after each forward from what it read of their attribute."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from schedulers import (
    CONTROLLERS,
    CommitmentProfile,
    ControllerState,
    Feedback,
    GainTable,
    build_controller,
    check_target,
    controllers,
)
from steerserve.engine.api.conditions import Reading
from steerserve.engine.api.params import Choice
from steerserve.errors import RequestError
from steerserve.steering.attribute import Attribute


@dataclass(eq=False)
class Loop:
    """One intervention's controller, and what it remembers from one forward to the next."""

    config: Feedback
    profile: CommitmentProfile
    reading: Reading
    """The quantity that the profile's curve is the mean of."""
    gain: float = math.inf
    """Of the next push; infinite before the first one is worked out."""
    streak: int = 0
    readings: list[float] = field(default_factory=list)
    """Of each forward made."""
    gains: list[float] = field(default_factory=list)
    """Of each forward made: 0 where the push did not hold, and less than was worked out where a limit asked for it."""
    released_at: float | None = None
    """Progress at which it let go."""

    def told(self) -> dict[str, Any]:
        """The schedule, as a plan has it."""
        return {"type": "feedback", **asdict(self.config), "norm": None, "gains": None}

    def bound(self, slices: int) -> GainTable:
        """The most that it may push, at every slice of progress."""
        return GainTable(torch.full((slices,), self.config.peak), "peak", None, None)

    def receipt(self) -> dict[str, Any]:
        """What it read and did. `spent` adds up what a uniform push of the same strength adds up to the number of
        forward passes."""
        spent = {"gain": round(sum(self.gains), 6), "gain_squared": round(sum(gain * gain for gain in self.gains), 6)}
        curve = self.profile.curve
        return {
            "gains": [round(gain, 6) for gain in self.gains],
            "readings": [round(value, 6) for value in self.readings],
            "target": round(curve[0] + self.config.hold * (curve[-1] - curve[0]), 6),
            "let_go_at": self.released_at,
            "spent": spent,
        }


def closed_loop(
    choice: Choice, attribute: Attribute | None, op: str, strength: float, profile: CommitmentProfile | None, param: str
) -> Loop | None:
    """The controller of an intervention whose schedule is a closed loop, else None; raises RequestError.

    param: of the intervention. The controller reads the attribute's steering features at the layers its curve was
    measured at, wherever it pushes.
    """
    name = choice if isinstance(choice, str) else choice.get("type")
    if not isinstance(name, str) or name not in CONTROLLERS:
        return None
    if op != "add":
        raise RequestError(f"schedule {name!r} is for op 'add', got {op!r}", f"{param}.op")
    if not strength > 0:
        raise RequestError(
            f"schedule {name!r} pushes towards its attribute: strength must be above 0, got {strength:g}",
            f"{param}.strength",
        )
    try:
        config = build_controller(choice)
        check_target(profile)
    except ValueError as error:
        raise RequestError(str(error), f"{param}.schedule") from error
    assert attribute is not None and profile is not None
    return Loop(config, profile, Reading(attribute=attribute.name, read="activation"))


class Loops:
    """The loops of a batch, worked out side by side."""

    def __init__(self, loops: Sequence[Loop]) -> None:
        self.loops = list(loops)
        self._controllers = controllers([(loop.config, loop.profile) for loop in loops]) if loops else None

    def turn(self, readouts: Sequence[float], progress: Sequence[float]) -> None:
        """Work out the gain of each loop's next push, at the progress given; readout NaN: there is none yet."""
        if self._controllers is None:
            return
        state = ControllerState(
            torch.tensor([loop.gain for loop in self.loops], dtype=torch.float64),
            torch.tensor([loop.streak for loop in self.loops], dtype=torch.int64),
        )
        readout, now = (torch.tensor(one, dtype=torch.float64) for one in (readouts, progress))
        gains, after = self._controllers.gains(readout, now, state)
        released = self._controllers.released(after)
        told = zip(self.loops, gains.tolist(), after.streak.tolist(), released.tolist(), progress, strict=True)
        for loop, gain, streak, let_go, at in told:
            loop.gain, loop.streak = gain, streak
            if let_go and loop.released_at is None:
                loop.released_at = at
