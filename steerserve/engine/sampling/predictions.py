"""Predictions of a forward pass: what an engine may ask about the candidates."""

from collections.abc import Mapping
from typing import Protocol

import torch
from torch import Tensor

from steerserve.engine import noise
from steerserve.engine.forward.batch import Batch
from steerserve.engine.forward.gains import StepGains, pushing
from steerserve.engine.forward.head import blocks, pad_rows
from steerserve.engine.forward.part_plans import PartPlans
from steerserve.engine.forward.states import projections, top_features
from steerserve.engine.sampling.commit import Alternatives, Place
from steerserve.engine.sampling.sampler import Draw, Settings, alternatives, bar_ends, draw
from steerserve.models import DiffusionLM
from steerserve.saes import SparseAutoencoder
from steerserve.steering.push import Push


class Predictions(Protocol):
    """What one forward pass of a batch tells: candidates, asked for at (row [N], canvas position [N]), and what was
    read and done at the steered layers. It changes nothing, and holds until the next pass of the same batch."""

    captured: Mapping[int, Tensor]
    """The outputs [F, W, hidden_size] of the layers of `Batch.captures`, as they arrived there."""

    def draw(self, row: Tensor, position: Tensor) -> Draw:
        """A candidate each, with what the orders and transfers of the batch need to know of it."""
        ...

    def alternatives(self, row: Tensor, position: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """The likeliest tokens and their log-probabilities [N, count], largest first."""
        ...

    def divergence(self, row: Tensor, position: Tensor) -> list[float]:
        """The KL of each row from its baseline, at the positions that commit: see `divergence` below."""
        ...

    def top_features(self, sae: SparseAutoencoder, row: Tensor, position: Tensor) -> Tensor:
        """Top features [N, K] of the states that decide the candidates, without the rows' pushes."""
        ...

    def projections(self, layer: int, directions: Tensor, row: Tensor, position: Tensor) -> Tensor:
        """<h, v> [N] of these states at a layer, without the rows' pushes, v being directions [R, hidden_size] of each
        row."""
        ...

    def readings(self) -> Mapping[int, float]:
        """What every `read` push read, by its `id()`: see `SteeringPlan.readings`."""
        ...

    def projections_of(self, push: Push) -> Tensor:
        """What a `read` push read at each state [W]: see `SteeringPlan.projections`."""
        ...

    def refused(self) -> Mapping[int, tuple[int, float, float]]:
        """The rows of the forward whose pushes went over a bound that refuses: see `SteeringPlan.refused`."""
        ...

    def lost(self) -> Mapping[int, int]:
        """The rows of the forward whose pushes it did not come by: see `SteeringPlan.lost`."""
        ...


class TorchPredictions:
    """Predictions from the states of a forward pass in this process."""

    def __init__(
        self, batch: Batch, model: DiffusionLM, hidden: Tensor, captured: Mapping[int, Tensor], plans: PartPlans
    ) -> None:
        """hidden [F, W, hidden_size]: the final states."""
        self.batch, self._model, self._hidden = batch, model, hidden
        self.captured, self._plans = captured, plans

    def draw(self, row: Tensor, position: Tensor) -> Draw:
        """Draw a candidate for each position."""
        hidden, unguided = self._at(row, position)
        return draw(self._model, hidden, settings_of(self.batch, row, position), self.batch.rules.needs, unguided)

    def alternatives(self, row: Tensor, position: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """Return the likeliest tokens of each position and their log-probabilities."""
        hidden, unguided = self._at(row, position)
        return alternatives(self._model, hidden, settings_of(self.batch, row, position), count, unguided)

    def divergence(self, row: Tensor, position: Tensor) -> list[float]:
        """KL of each row from its baseline in nats, summed over the positions that commit."""
        return divergence(self.batch, self._plans, self._model, self._hidden, row, position)

    def top_features(self, sae: SparseAutoencoder, row: Tensor, position: Tensor) -> Tensor:
        """Return the top features of the states that decide each position."""
        return top_features(sae, self._read(sae.facts.layer, row, position).float())

    def projections(self, layer: int, directions: Tensor, row: Tensor, position: Tensor) -> Tensor:
        """Project the states that decide each position on a direction of their row."""
        return projections(self._read(layer, row, position), directions[row])

    def readings(self) -> dict[int, float]:
        """Return the mean that every `read` push read, by its `id()`."""
        return self._plans.readings()

    def projections_of(self, push: Push) -> Tensor:
        """Return what a `read` push read at each state [W]."""
        return self._plans.projections(push)

    def refused(self) -> dict[int, tuple[int, float, float]]:
        """Return the rows whose pushes went over a bound that refuses."""
        return self._plans.refused()

    def lost(self) -> dict[int, int]:
        """Return the rows with a push that the forward pass did not come by."""
        return self._plans.lost()

    def _at(self, row: Tensor, position: Tensor) -> tuple[Tensor, Tensor | None]:
        """The states [N, hidden_size] that decide the candidates, with the prompt and, where any is guided, without."""
        rows, state = self.batch.forward_rows, self.batch.state(position)
        unguided = None if rows.hides_prompt is None else self._hidden[rows.unprompted[row], state]
        return self._hidden[row, state], unguided

    def _read(self, layer: int, row: Tensor, position: Tensor) -> Tensor:
        """The states [N, hidden_size] of a layer by which these positions are read."""
        return self.captured[layer][self.batch.forward_rows.reader[row], self.batch.state(position)]


def divergence(
    batch: Batch, gains: StepGains, model: DiffusionLM, hidden: Tensor, row: Tensor, position: Tensor
) -> list[float]:
    """The KL(steered || unsteered) in nats of each row's predictions at the positions that commit, summed; they stand
    at (row [N], canvas position [N]) and hidden [F, W, hidden_size] is what the forward gave. 0 for rows that
    push nothing at this step, which are their own baselines, and for those that are not measured.

    Of the whole distribution at the row's temperature (1 where it is 0, whose KL is not finite), before top-p and
    top-k: what calibration's cost is of. By the chain rule the sum over a run is the KL of the trajectories, for the
    canvases that the steered one came through.
    """
    found = torch.zeros(len(batch.requests), dtype=torch.float64)
    measured = [request.measures_kl and pushing(request, gains) for request in batch.requests]
    if not any(measured):
        return found.tolist()
    own = batch.rules.rows(measured)[row]
    row, position = row[own], position[own]
    state, drawn, baseline = batch.state(position), batch.sampling, batch.forward_rows.baseline
    heats = drawn.temperature.masked_fill(drawn.temperature == 0, 1.0)
    parts = []
    # In float64, where a KL of nearly nothing is not lost to rounding: blocks of half as many positions.
    for at in blocks(len(row), 2 * model.facts.vocab_size):
        no_eos, heat = drawn.no_eos[row[at]], heats[row[at]]
        steered = _log_probabilities(model, hidden[row[at], state[at]], no_eos, heat)
        plain = _log_probabilities(model, hidden[baseline[row[at]], state[at]], no_eos, heat)
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
    sampling = batch.sampling
    return Settings(
        sampling.temperature.masked_fill(batch.progress.likeliest, 0.0)[row],
        sampling.top_p[row],
        sampling.top_k[row],
        sampling.no_eos[row],
        sampling.ends_last[row],
        sampling.guidance[row],
        batch.keys(row, position, noise.TOKEN),
    )
