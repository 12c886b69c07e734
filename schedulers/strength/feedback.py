"""The strength by what it has achieved so far: a closed loop on the attribute's readout.

The controller is proportional, with the setpoint looked up ahead on the curve that confident samples follow, a limit
on how fast its output rises, and none on how fast it falls. It has no integral term: a run is tens of readings long,
what has been committed cannot be pushed any more, and an error that is no longer the push's to mend would wind the
integral up, to be spent on the positions that are left. The price is the droop of every proportional controller: it
holds the readout somewhat below the setpoint, the less so the higher the gain. A reading shows what the push before
it did, and a high gain on a late reading swings; the rate limit bounds that: where the readout answers a push g by
b g, every push but the first takes it at most b * rate * peak above a steady setpoint, whatever the gain. The first
push is not limited, since an attribute may be settled by the first few tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from schedulers.choice import integer, number
from schedulers.profile import CommitmentProfile


@dataclass(frozen=True)
class Feedback:
    """Push in proportion to how far the readout is short of its setpoint; nothing above it, nor once committed.

    Source: ours. The readout is what the profile's curve h is the mean of, of one sample: readings and setpoints are
    compared as shares of the rise h(1) - h(0), so that no option depends on the curve's units.
    """

    gain: float = 4.0
    """Proportional gain, above 0: the gain of the push at a shortfall of the whole rise."""
    hold: float = 1.0
    """Share of the rise that is held, above 0: the setpoint is hold times the curve's, h(1) at 1 in the end."""
    release: int = 3
    """Readings in succession at or above the committed level, hold times the rise, after which it lets go for good."""
    lead: float = 0.125
    """Progress, 0 to 1, by which the setpoint is looked up ahead: a push now shows in what is committed next. At 1
    the setpoint is the committed level throughout."""
    rate: float = 0.25
    """The most that the gain of the push rises between two readings, as a share of `peak`; above 0, up to 1."""
    peak: float = 1.0
    """The largest gain of the push, above 0: at 1 the strength asked for is never exceeded."""

    def __post_init__(self) -> None:
        number("gain", self.gain, 1e-6, 1e6)
        number("hold", self.hold, 1e-6, 1e6)
        integer("release", self.release, 1, 1_000_000)
        number("lead", self.lead, 0, 1)
        number("rate", self.rate, 1e-6, 1)
        number("peak", self.peak, 1e-6, 1e6)


@dataclass(frozen=True, eq=False)
class ControllerState:
    """State of R controllers from one reading to the next."""

    gain: Tensor
    """[R] float64, of the last push; infinite before the first, which no rate limits."""
    streak: Tensor
    """[R] int64 readings in succession at the committed level, which stay at `release` once they are there."""


@dataclass(frozen=True, eq=False)
class Controllers:
    """R closed loops side by side, each with its own options and curve; `gains` reads all of them in one go."""

    rise: Tensor
    """[R, longest K + 1] float64 (h - h(0)) / (h(1) - h(0)) at the borders of each curve's slices, then 1."""
    slices: Tensor
    """[R] int64 K of each curve."""
    start: Tensor
    """[R] float64 h(0)."""
    span: Tensor
    """[R] float64 h(1) - h(0), above 0."""
    options: Tensor
    """[5, R] float64: gain, hold, lead, rate, peak."""
    release: Tensor
    """[R] int64."""

    def state(self) -> ControllerState:
        """The state before the first reading."""
        return ControllerState(torch.full_like(self.start, torch.inf), torch.zeros_like(self.release))

    def released(self, state: ControllerState) -> Tensor:
        """True for the controllers that have let go [R] bool."""
        return state.streak >= self.release

    def gains(self, readout: Tensor, progress: Tensor, state: ControllerState) -> tuple[Tensor, ControllerState]:
        """The gain of the next push [R] float64, 0 to `peak`, and the state after it.

        readout [R] in the units of the curves, the newest there is, NaN where there is none: it is then taken to be
        on the curve, and counts for no release. progress [R] in [0, 1], that of the next push. Elementwise: a row's
        gain does not depend on the rows beside it, and no value is fetched from the device.
        """
        gain, hold, lead, rate, peak = self.options
        at = progress.double()
        reading = (readout.double() - self.start) / self.span
        known = ~reading.isnan()
        reading = torch.where(known, reading, hold * self._curve(at))
        above = torch.where(known & (reading >= hold), state.streak + 1, torch.where(known, 0, state.streak))
        streak = torch.where(self.released(state), state.streak, above)
        shortfall = hold * self._curve((at + lead).clamp(max=1)) - reading
        wanted = torch.minimum((gain * shortfall).clamp(min=0), peak)
        pushed = torch.minimum(wanted, state.gain + rate * peak)
        after = ControllerState(torch.where(streak >= self.release, 0.0, pushed), streak)
        return after.gain, after

    def _curve(self, progress: Tensor) -> Tensor:
        """Each row's curve [R], as a share of its rise, linear between borders, at progress [R]."""
        at = progress * self.slices
        below = torch.minimum(at.floor().long().clamp(min=0), self.slices - 1)
        ends = self.rise.gather(1, torch.stack([below, below + 1], dim=1))
        return torch.lerp(ends[:, 0], ends[:, 1], at - below)


def controllers(loops: Sequence[tuple[Feedback, CommitmentProfile]], device: torch.device | str = "cpu") -> Controllers:
    """The loops of R pushes, each a config and the profile of the attribute it reads; raises ValueError for a profile
    whose curve does not end above its start: there is no level to reach."""
    for _, profile in loops:
        check_target(profile)
    longest = max((profile.slices for _, profile in loops), default=1)
    rise = torch.ones(len(loops), longest + 1, dtype=torch.float64)
    for row, (_, profile) in enumerate(loops):
        curve = torch.tensor(profile.curve, dtype=torch.float64)
        rise[row, : len(curve)] = (curve - curve[0]) / (curve[-1] - curve[0])
    curves = [profile.curve for _, profile in loops]
    options = [[loop.gain, loop.hold, loop.lead, loop.rate, loop.peak] for loop, _ in loops]
    return Controllers(
        rise.to(device),
        torch.tensor([profile.slices for _, profile in loops], dtype=torch.int64, device=device),
        torch.tensor([curve[0] for curve in curves], dtype=torch.float64, device=device),
        torch.tensor([curve[-1] - curve[0] for curve in curves], dtype=torch.float64, device=device),
        torch.tensor(options, dtype=torch.float64, device=device).reshape(-1, 5).T,
        torch.tensor([loop.release for loop, _ in loops], dtype=torch.int64, device=device),
    )


def check_target(profile: CommitmentProfile | None) -> None:
    """Raise ValueError for a profile that gives a closed loop nothing to hold."""
    if profile is None:
        raise ValueError("schedule 'feedback' needs a commitment profile: only calibrated attributes have one")
    if profile.curve[-1] <= profile.curve[0]:
        raise ValueError(
            f"schedule 'feedback' needs a curve that ends above its start, not {profile.curve[-1]:g} after "
            f"{profile.curve[0]:g}: there is no level to hold"
        )
