"""What the rows of a batch read of themselves after each forward, and how hard they push at the next."""

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from schedulers import ControllerState, controllers
from steerserve.engine.api.conditions import Quantity
from steerserve.engine.forward.gains import StepGains
from steerserve.engine.forward.meter import ReadoutBatch
from steerserve.engine.request.controllers import FeedbackLoop
from steerserve.engine.request.request import Request


class FeedbackLoops:
    """The loops of a batch, worked out side by side."""

    def __init__(self, loops: Sequence[FeedbackLoop]) -> None:
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


class Monitor:
    """The readouts and controllers of a batch's rows. What lasts is the rows' own: a batch may be rebuilt any time."""

    def __init__(self, requests: Sequence[Request], device: torch.device) -> None:
        self.requests = requests
        self.rows = [row for row, request in enumerate(requests) if request.watches]
        """The rows that watch anything."""
        read = [(row, reading, one) for row in self.rows for reading, one in requests[row].gauges.items()]
        self.keys = [(row, reading) for row, reading, _ in read]
        self.meter = ReadoutBatch([(row, one) for row, _, one in read], device) if read else None
        self.layers = frozenset[int]() if self.meter is None else self.meter.layers
        """The layers whose outputs it reads."""
        self.pushed = [
            (row, one.controller, one.pushes[0])
            for row in self.rows
            for one in requests[row].interventions
            if one.controller is not None
        ]
        """What governs an intervention, with one of its pushes: all have the same gain."""
        self.governed = [(row, one) for row, one, _ in self.pushed]
        self.looped = [(row, one.loop) for row, one in self.governed if one.loop is not None]
        self.loops = FeedbackLoops([loop for _, loop in self.looped])
        self._begin()

    def _begin(self) -> None:
        """Set the first push of what is new; nothing has been read for it."""
        new = [(row, one) for row, one in self.governed if not one.begun]
        fresh = [(row, one.loop) for row, one in new if one.loop is not None]
        progress = [self.requests[row].progress for row, _ in fresh]
        FeedbackLoops([loop for _, loop in fresh]).turn([math.nan] * len(fresh), progress)
        for row, one in new:
            one.settle({}, self.requests[row].progress)

    def read(
        self, captured: Mapping[int, Tensor], response: Tensor, states: Tensor, reader: Tensor
    ) -> dict[int, dict[Quantity, float]]:
        """What the forward just made told of each watching row, by row: one transfer from the device. See
        `ReadoutBatch.read`."""
        values: dict[int, dict[Quantity, float]] = {row: {} for row in self.rows}
        told = [] if self.meter is None else self.meter.read(captured, response, states, reader).tolist()
        for (row, reading), value in zip(self.keys, told, strict=True):
            values[row][reading] = value
        return values

    def count(self, values: Mapping[int, Mapping[Quantity, float]], gains: StepGains) -> None:
        """Keep what a forward read whose outcome stands, and the gains that it had."""
        for row, one, push in self.pushed:
            one.count(values[row], gains.gain(push))

    def rearm(self, row: int) -> None:
        """Let a row that begins to write tokens anew push as one does that has read nothing yet."""
        mine = [one for at, one in self.governed if at == row]
        loops = [one.loop for one in mine if one.loop is not None]
        for loop in loops:
            loop.gain, loop.streak = math.inf, 0
        FeedbackLoops(loops).turn([math.nan] * len(loops), [0.0] * len(loops))
        for one in mine:
            one.settle({}, 0.0)

    def settle(self, values: Mapping[int, Mapping[Quantity, float]]) -> None:
        """Set the pushes of the next forward."""
        progress = {row: self.requests[row].progress for row in self.rows}
        self.loops.turn(
            [values[row][loop.reading] for row, loop in self.looped], [progress[row] for row, _ in self.looped]
        )
        for row, one in self.governed:
            one.settle(values[row], progress[row])
