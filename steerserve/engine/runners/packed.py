"""The usual runner: every canvas is computed anew at each step."""

import torch
from torch import Tensor

from steerserve.engine.forward.batch import Batch
from steerserve.engine.forward.packing import PackedForward
from steerserve.engine.sampling.predictions import TorchPredictions
from steerserve.models import DiffusionLM
from steerserve.steering.push import Push


class PackedRunner:
    """A `ModelRunner` that keeps nothing between steps; rows of like lengths share a forward pass."""

    def __init__(self, batch: Batch, model: DiffusionLM) -> None:
        self._batch, self._model = batch, model
        rows = batch.forward_rows
        self.packed = PackedForward(
            rows.pushes,
            [len(request.canvas) for request in rows.requests],
            batch.canvas.shape[1],
            batch.device,
            batch.dtype,
            batch.captures,
        )

    def begin(self) -> None:
        """Set the gains of a step of the batch as it is."""
        batch = self._batch
        self.packed.set_step(batch.forward_rows.spread(batch.progress.progress), batch.scopes())

    def gain(self, push: Push) -> float:
        """Return the gain of a push at the step that was begun."""
        return self.packed.plans.gain(push)

    def scale(self, push: Push, factor: float) -> None:
        """Multiply the gain of a push, for this step."""
        self.packed.plans.scale(push, factor)

    def run(self, row: Tensor, position: Tensor) -> TorchPredictions:
        """Make the forward pass, with candidates at (row [N], canvas position [N])."""
        hidden = self.forward((row, position))
        return TorchPredictions(self._batch, self._model, hidden, self.packed.captured, self.packed.plans)

    def forward(self, candidates: tuple[Tensor, Tensor] | None = None) -> Tensor:
        """Final states [F, W, hidden_size] of the step that was begun; where candidates, (row [N], canvas position
        [N]), are given, those of the states that decide them, and of others or 0."""
        asked = None if candidates is None else self._asked(*candidates)
        return self.packed.forward(self._model, self._batch.shown(), self._batch.sigma(), asked)

    def count(self) -> None:
        """Let the step count, with what its last pass did."""
        self.packed.plans.count()

    def flush(self) -> None:
        """Bring what the pushes of the rows did up to date with the steps that count."""
        self.packed.plans.flush()

    def close(self) -> None:
        """Hand what the pushes did to the rows."""
        self.flush()

    def _asked(self, row: Tensor, position: Tensor) -> Tensor | None:
        """The states [F, W] bool that decide these candidates; None where counting them costs more than is saved: on a
        device that would have to be waited for."""
        batch = self._batch
        if batch.device.type != "cpu":
            return None
        asked = torch.zeros_like(batch.inside)
        asked[row, batch.state(position)] = True
        return batch.forward_rows.spread(asked)
