"""The KL of a steered row from the row without its own pushes, measured where each of its tokens commits."""

import torch
from torch import Tensor

from steerserve.engine.batch import Batch
from steerserve.engine.blocks import blocks
from steerserve.engine.sampler import bar_ends, pad_rows
from steerserve.models import DiffusionLM


def measure_divergence(batch: Batch, model: DiffusionLM, hidden: Tensor, row: Tensor, position: Tensor) -> None:
    """Note with each measured row's forward the KL(steered || unsteered) in nats of the predictions at the positions
    that commit, (row [N], canvas position [N]); hidden [R + G + U, W, hidden_size].

    Of the whole distribution at the row's temperature (1 where it is 0, whose KL is not finite), before top-p and
    top-k, in float32: what calibration's cost is of. By the chain rule the sum over a run is the KL of the
    trajectories, for the canvases that the steered one came through.
    """
    if not len(batch.measured):
        return
    own = batch.shadow[row] > 0
    row, position = row[own], position[own]
    state = batch.state(position)
    parts = []
    heats = batch.temperature.masked_fill(batch.temperature == 0, 1.0)
    for at in blocks(len(row), model.facts.vocab_size):
        no_eos, heat = batch.no_eos[row[at]], heats[row[at]]
        steered = _log_probabilities(model, hidden[row[at], state[at]], no_eos, heat)
        plain = _log_probabilities(model, hidden[batch.shadow[row[at]], state[at]], no_eos, heat)
        # What neither may draw is minus infinity in both.
        terms = torch.where(steered.isneginf(), 0.0, steered.exp() * (steered - plain))
        parts.append(terms.sum(1).double())
    total = torch.zeros(len(batch.requests), dtype=torch.float64, device=row.device)
    total.index_add_(0, row, torch.cat(parts))
    for request, nats in zip(batch.requests, total.tolist(), strict=True):
        request.made[-1].kl = nats


def _log_probabilities(model: DiffusionLM, hidden: Tensor, no_eos: Tensor, heat: Tensor) -> Tensor:
    logits = model.head(pad_rows(hidden))[: len(hidden)].float()
    if model.facts.forbidden_ids:
        logits[:, list(model.facts.forbidden_ids)] = -torch.inf
    bar_ends(logits, no_eos, model.facts.end_ids)
    return (logits / heat[:, None]).log_softmax(1)
