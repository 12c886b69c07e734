"""What a forward pass lets an engine know of the candidates."""

from typing import Protocol

from torch import Tensor

from steerserve.engine.batch import Batch
from steerserve.engine.divergence import divergence
from steerserve.engine.sampler import Draw, alternatives, draw
from steerserve.models import DiffusionLM


class Seen(Protocol):
    """The outcome of one forward pass, asked for at (row [N], canvas position [N])."""

    def draw(self, row: Tensor, position: Tensor) -> Draw:
        """A candidate each, with what the orders and transfers of the batch need to know of it."""
        ...

    def alternatives(self, row: Tensor, position: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """The likeliest tokens and their log-probabilities [N, count], largest first."""
        ...

    def divergence(self, row: Tensor, position: Tensor) -> list[float]:
        """See `steerserve.engine.divergence.divergence`; of the positions that commit."""
        ...


class States:
    """See `Seen`; from the final states of a forward pass in this process."""

    def __init__(self, batch: Batch, model: DiffusionLM, row: Tensor, position: Tensor, again: bool = False) -> None:
        """Make the forward pass, of which no other candidates than those at (row [N], canvas position [N]) will be
        asked for. again: see `Batch.forward`."""
        self._batch, self._model = batch, model
        self._hidden = batch.forward(model, (row, position), again)

    def draw(self, row: Tensor, position: Tensor) -> Draw:
        """See `Seen.draw`."""
        hidden, unguided = self._at(row, position)
        return draw(self._model, hidden, self._batch.settings(row, position), self._batch.needs, unguided)

    def alternatives(self, row: Tensor, position: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """See `Seen.alternatives`."""
        hidden, unguided = self._at(row, position)
        return alternatives(self._model, hidden, self._batch.settings(row, position), count, unguided)

    def divergence(self, row: Tensor, position: Tensor) -> list[float]:
        """See `Seen.divergence`."""
        return divergence(self._batch, self._model, self._hidden, row, position)

    def _at(self, row: Tensor, position: Tensor) -> tuple[Tensor, Tensor | None]:
        """The states [N, hidden_size] that decide the candidates, with the prompt and, where any is guided, without."""
        batch, state = self._batch, self._batch.state(position)
        unguided = self._hidden[batch.twin[row], state] if len(batch.guided) else None
        return self._hidden[row, state], unguided
