"""The KL of a steered row from the row without its own pushes, measured where each of its tokens commits."""

import torch
from torch import Tensor

from steerserve.engine.batch import Batch
from steerserve.engine.blocks import blocks
from steerserve.engine.limits import pushing
from steerserve.engine.sampler import bar_ends, pad_rows
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
