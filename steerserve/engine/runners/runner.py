"""What the engine needs of whatever makes its forward passes."""

from typing import Protocol

from torch import Tensor

from steerserve.engine.forward.gains import StepGains
from steerserve.engine.sampling.predictions import Predictions


class ModelRunner(StepGains, Protocol):
    """Makes the forward passes of one batch, steered, and keeps what outlasts a step: caches, what pushes did.

    A step is `begin`, one or more calls of `run`, and `count`. A step that is never counted, because memory ran out or
    it failed, leaves no trace: neither in the rows nor in what is kept."""

    def begin(self) -> None:
        """Set the gains of a step of the batch as it is; they may be changed with `scale` before each `run`."""
        ...

    def run(self, row: Tensor, position: Tensor) -> Predictions:
        """Make the forward pass, of which no other candidates than those at (row [N], canvas position [N]) will be
        asked for; a second one takes the place of the first."""
        ...

    def count(self) -> None:
        """Let the step count, with what its last pass did: its outcome stands. Needs no memory."""
        ...

    def flush(self) -> None:
        """Bring what the pushes of the rows did up to date with the steps that count; see `Push.applied`."""
        ...

    def close(self) -> None:
        """Hand what outlives the batch to its rows: they may run on in another one."""
        ...
