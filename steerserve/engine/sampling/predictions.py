"""Predictions of a forward pass: what an engine may ask about the candidates."""

from typing import Protocol

import torch
from torch import Tensor

from steerserve.engine import noise
from steerserve.engine.forward.batch import Batch
from steerserve.engine.forward.gains import pushing
from steerserve.engine.forward.head import blocks, pad_rows
from steerserve.engine.sampling.commit import Alternatives, Place
from steerserve.engine.sampling.sampler import Draw, Settings, alternatives, bar_ends, draw
from steerserve.models import DiffusionLM


def divergence(batch: Batch, model: DiffusionLM, hidden: Tensor, row: Tensor, position: Tensor) -> list[float]:
    """The KL(steered || unsteered) in nats of each row's predictions at the positions that commit, summed; they stand
    at (row [N], canvas position [N]) and hidden [R + G + U, W, hidden_size] is what the forward gave. 0 for rows that
    push nothing at this step, which are their own twins, and for those that are not measured.

    Of the whole distribution at the row's temperature (1 where it is 0, whose KL is not finite), before top-p and
    top-k: what calibration's cost is of. By the chain rule the sum over a run is the KL of the trajectories, for the
    canvases that the steered one came through.
    """
    found = torch.zeros(len(batch.requests), dtype=torch.float64)
    measured = [request.measures_kl and pushing(request, batch.plan) for request in batch.requests]
    if not any(measured):
        return found.tolist()
    own = batch.members(measured)[row]
    row, position = row[own], position[own]
    state, heats = batch.state(position), batch.temperature.masked_fill(batch.temperature == 0, 1.0)
    parts = []
    # In float64, where a KL of nearly nothing is not lost to rounding: blocks of half as many positions.
    for at in blocks(len(row), 2 * model.facts.vocab_size):
        no_eos, heat = batch.no_eos[row[at]], heats[row[at]]
        steered = _log_probabilities(model, hidden[row[at], state[at]], no_eos, heat)
        plain = _log_probabilities(model, hidden[batch.shadow[row[at]], state[at]], no_eos, heat)
        # What neither may draw is minus infinity in both.
        terms = torch.where(steered.isneginf(), 0.0, steered.exp() * (steered - plain))
        parts.append(terms.sum(1))
    total = torch.zeros(len(batch.requests), dtype=torch.float64, device=row.device)
    # Below 0 by rounding alone.
    return total.index_add(0, row, torch.cat(parts)).clamp(min=0.0).tolist()


def _log_probabilities(model: DiffusionLM, hidden: Tensor, no_eos: Tensor, heat: Tensor) -> Tensor:
    logits = model.head(pad_rows(hidden))[: len(hidden)].double()
    if model.facts.forbidden_ids:
        logits[:, list(model.facts.forbidden_ids)] = -torch.inf
    bar_ends(logits, no_eos, model.facts.end_ids)
    return (logits / heat[:, None]).log_softmax(1)


class Predictions(Protocol):
    """The outcome of one forward pass, asked for at (row [N], canvas position [N])."""

    def draw(self, row: Tensor, position: Tensor) -> Draw:
        """A candidate each, with what the orders and transfers of the batch need to know of it."""
        ...

    def alternatives(self, row: Tensor, position: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """The likeliest tokens and their log-probabilities [N, count], largest first."""
        ...

    def divergence(self, row: Tensor, position: Tensor) -> list[float]:
        """KL(steered || unsteered) of each row in nats, summed over the positions that commit."""
        ...


class TorchPredictions:
    """Predictions from the final states of a forward pass in this process."""

    def __init__(self, batch: Batch, model: DiffusionLM, row: Tensor, position: Tensor, again: bool = False) -> None:
        """Make the forward pass, of which no other candidates than those at (row [N], canvas position [N]) will be
        asked for. again: see `Batch.forward`."""
        self._batch, self._model = batch, model
        self._hidden = batch.forward(model, (row, position), again)

    def draw(self, row: Tensor, position: Tensor) -> Draw:
        """Draw a candidate for each position."""
        hidden, unguided = self._at(row, position)
        return draw(self._model, hidden, settings_of(self._batch, row, position), self._batch.needs, unguided)

    def alternatives(self, row: Tensor, position: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """Return the likeliest tokens of each position and their log-probabilities."""
        hidden, unguided = self._at(row, position)
        return alternatives(self._model, hidden, settings_of(self._batch, row, position), count, unguided)

    def divergence(self, row: Tensor, position: Tensor) -> list[float]:
        """KL of each position that commits from its twin's prediction, in nats."""
        return divergence(self._batch, self._model, self._hidden, row, position)

    def _at(self, row: Tensor, position: Tensor) -> tuple[Tensor, Tensor | None]:
        """The states [N, hidden_size] that decide the candidates, with the prompt and, where any is guided, without."""
        batch, state = self._batch, self._batch.state(position)
        unguided = self._hidden[batch.twin[row], state] if len(batch.guided) else None
        return self._hidden[row, state], unguided


def alternatives_of(batch: Batch, predictions: Predictions, row: Tensor, position: Tensor) -> dict[Place, Alternatives]:
    """The likeliest tokens at the positions that commit, (row [N], canvas position [N]), of rows that ask for them."""
    counts = [r.params.top_logprobs if r.params.logprobs else 0 for r in batch.requests]
    if not any(counts):
        return {}
    asked = torch.tensor([count > 0 for count in counts], device=row.device)[row]
    row, position = row[asked], position[asked]
    found = predictions.alternatives(row, position, max(counts))
    told = zip(row.tolist(), position.tolist(), *(one.tolist() for one in found), strict=True)
    return {(r, p): tuple(zip(tokens, values, strict=True))[: counts[r]] for r, p, tokens, values in told}


def settings_of(batch: Batch, row: Tensor, position: Tensor) -> Settings:
    """How the candidates at (row [N], canvas position [N]) are drawn."""
    return Settings(
        batch.temperature.masked_fill(batch.progress.likeliest, 0.0)[row],
        batch.top_p[row],
        batch.top_k[row],
        batch.no_eos[row],
        batch.ends_last[row],
        batch.guidance[row],
        batch.keys(row, position, noise.TOKEN),
    )
