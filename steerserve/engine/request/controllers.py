"""Runtime state of what a run decides: the gain of an intervention, and the end or rewriting of a row."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from schedulers import CommitmentProfile, Feedback, GainTable
from steerserve.engine.api.conditions import Condition, Quantity, Remask, holds
from steerserve.engine.request.readouts import Readout
from steerserve.steering.push import GainOverride


@dataclass(eq=False)
class FeedbackLoop:
    """One intervention's controller, and what it remembers from one forward to the next."""

    config: Feedback
    profile: CommitmentProfile
    reading: Quantity
    """The quantity that the profile's curve is the mean of."""
    gain: float = math.inf
    """Gain of the next push; infinite before the first one is worked out."""
    streak: int = 0
    readings: list[float] = field(default_factory=list)
    """Reading of each forward made."""
    gains: list[float] = field(default_factory=list)
    """Gain of each forward made: 0 where the push did not hold, and less than was worked out where a limit asked for
    it."""
    released_at: float | None = None
    """Progress at which it let go."""

    def schedule_json(self) -> dict[str, Any]:
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


@dataclass(eq=False)
class InterventionController:
    """Runtime state of one intervention of a row: its current gain, and if its condition holds."""

    gauges: Mapping[Quantity, Readout]
    loop: FeedbackLoop | None = None
    when: Condition | None = None
    override: GainOverride = field(default_factory=GainOverride)
    """Gain that all its pushes take."""
    begun: bool = False
    """True once the gain of the first push has been worked out."""
    passes: int = 0
    """Forwards at which its condition held."""

    def notes(self, strength: float) -> list[str]:
        """What a plan says beside the number it cannot know."""
        found = []
        if self.loop is not None:
            found.append(
                f"the strength at each step depends on the run: 0 to {strength * self.loop.config.peak:g}, by what the "
                f"forward before it read"
            )
        if self.when is not None:
            found.append("pushes only while its condition holds, which is judged after each forward for the next")
        return found

    def settle(self, values: Mapping[Quantity, float], progress: float) -> None:
        """Set the override for the next forward; the loop has been turned."""
        self.begun = True
        if self.loop is not None:
            self.override.gain = self.loop.gain
        if self.when is not None:
            self.override.held = holds(self.when, values, progress)

    def count(self, values: Mapping[Quantity, float], gain: float) -> None:
        """Keep what a forward read, whether the push held at it, and the gain that it then had."""
        self.passes += self.override.held
        if self.loop is not None:
            self.loop.readings.append(values[self.loop.reading])
            self.loop.gains.append(gain)

    def receipt(self) -> dict[str, Any]:
        """What it adds to the receipt of its intervention."""
        told: dict[str, Any] = {} if self.loop is None else {"feedback": self.loop.receipt()}
        return told if self.when is None else told | {"held_passes": self.passes}


@dataclass(eq=False)
class Triggers:
    """Conditions of a row that end it or have tokens of it written anew, and what came of that."""

    gauges: Mapping[Quantity, Readout]
    abort: Condition | None
    remask: Remask | None
    aborted: dict[str, Any] | None = None
    """Step and progress at which it was ended, and what it answers: what was committed, or its best draft."""
    remasked: list[dict[str, Any]] = field(default_factory=list)

    @property
    def rewrites(self) -> bool:
        """Tell if tokens may yet be masked again."""
        return self.remask is not None and len(self.remasked) < self.remask.times

    def span(self, block: tuple[int, int], response: tuple[int, int]) -> tuple[int, int]:
        """Canvas positions [first, last + 1) of which the committed ones are masked; block and response are those of
        the canvas, as it is."""
        assert self.remask is not None
        if isinstance(self.remask.span, tuple):
            return response[0] + self.remask.span[0], response[0] + self.remask.span[1]
        return block if self.remask.span == "block" else response

    def due(self, values: Mapping[Quantity, float], progress: float) -> tuple[bool, bool]:
        """Two answers: end the row, and mask tokens again."""
        abort = self.abort is not None and holds(self.abort, values, progress)
        again = self.rewrites and self.remask is not None and holds(self.remask.condition, values, progress)
        return abort, again and not abort

    def receipt(self) -> dict[str, Any]:
        """What it adds to the row's receipt."""
        told: dict[str, Any] = {} if self.abort is None else {"aborted": self.aborted}
        return told if self.remask is None else told | {"remasked": self.remasked}
