"""Selection of the candidates that commit at a step: scored by each row's order, counted by each row's transfer."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from schedulers import Candidates, Quota, feature_stability, rank, uptake
from steerserve.engine import noise
from steerserve.engine.api.events import Event
from steerserve.engine.forward.batch import Batch
from steerserve.engine.forward.feature_memory import TopFeatures
from steerserve.engine.sampling.commit import positions_to_remask, stepped, take_back
from steerserve.engine.sampling.predictions import Predictions
from steerserve.engine.sampling.sampler import Draw


def skip_empty_steps(batch: Batch, events: list[Event]) -> bool:
    """Let rows pass the steps at which nothing of theirs commits, without a forward; whether a row came to the end of a
    block. What these steps took back is added to `events`.

    What commits after them is drawn from the very forward it would have been drawn from: where nothing was taken back,
    progress, steering and canvas have not changed, and noise belongs to the step at which a position commits.
    """
    ended: set[str] = set()
    while True:
        batch.refresh()
        due = [request.may_skip and not request.is_done and request.id not in ended for request in batch.requests]
        if not any(due):
            return bool(ended)
        row, position = batch.candidates()
        uniform, commits = _own_draws(batch, row, position)
        counts = _counts(batch, due, _quota(batch, row, due=commits)).tolist()
        idle = [r for r, now, count in zip(batch.requests, due, counts, strict=True) if now and count == 0]
        if not idle:
            return bool(ended)
        taken = positions_to_remask(batch, idle)
        batch.mask(taken)
        events += stepped(idle)
        events += take_back(batch.requests, taken)
        for request in idle:
            block = request.block
            request.advance()
            if request.block > block:
                ended.add(request.id)


def select_before_sampling(batch: Batch, row: Tensor, position: Tensor) -> Tensor:
    """Choose among the positions that may commit, (row [N], position [N]), those to draw candidates for [N] bool.

    Where neither order nor transfer looks at the candidates, only the positions that commit are kept; the rest of
    their logits and noise is never made. The rows that do look keep all of theirs.
    """
    if not any(request.chooses_blindly for request in batch.requests):
        return torch.ones_like(row, dtype=torch.bool)
    chosen, _ = _choose(batch, row, position, None)
    return chosen | ~batch.rules.blind[row]


def select(
    batch: Batch, row: Tensor, position: Tensor, drawn: Draw, predictions: Predictions
) -> tuple[Tensor, list[TopFeatures]]:
    """Choose which of the drawn positions commit.

    Returns [N] bool, with all positions of a row that has chosen before, and the top features that were read for it,
    which the next step compares with.
    """
    if all(request.chooses_blindly for request in batch.requests):
        return torch.ones_like(row, dtype=torch.bool), []
    chosen, found = _choose(batch, row, position, (drawn, predictions))
    return chosen | batch.rules.blind[row], found


def _choose(
    batch: Batch, row: Tensor, position: Tensor, told: tuple[Draw, Predictions] | None
) -> tuple[Tensor, list[TopFeatures]]:
    """The choice of the rows that can be made now: the blind ones before drawing, the others after; [N] bool. told:
    what is known of the candidates then."""
    requests, device = batch.requests, row.device
    drawn, predictions = told or (None, None)
    measures = dict(drawn.measures) if drawn else {}
    due = [request.chooses_blindly == (drawn is None) for request in requests]
    deciding = batch.rules.blind if drawn is None else ~batch.rules.blind
    stability, taken, found = None, None, list[TopFeatures]()
    uniform, commits = _own_draws(batch, row, position, measures.pop("mass", None))
    if predictions is not None and batch.features.saes:
        stability, found = _stability(batch, row, position, predictions)
    if predictions is not None and any(r.uptake for r in requests):
        taken = _uptake(batch, row, position, predictions)
    candidates = Candidates(uniform=uniform, stability=stability, uptake=taken, **measures)
    scores = torch.zeros(len(row), dtype=torch.float64, device=device)
    asked = {request.order for request, is_due in zip(requests, due, strict=True) if is_due}
    for order, mine in batch.rules.orders:
        if order in asked:
            scores = torch.where((mine & deciding)[row], order.score(candidates).double(), scores)
    ranked = rank(scores, row)
    quota = _quota(
        batch,
        row,
        probability=drawn.probability[ranked] if drawn else None,
        entropy=measures["entropy"][ranked] if "entropy" in measures else None,
        due=commits[ranked],
    )
    counts = _counts(batch, due, quota)
    first = quota.masked.cumsum(0) - quota.masked
    place = torch.arange(len(row), device=device) - first[row]
    return torch.zeros_like(row, dtype=torch.bool).scatter(0, ranked, place < counts[row]), found


def _own_draws(batch: Batch, row: Tensor, position: Tensor, log_mass: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Each position's own draw [N] as `Candidates.uniform` has it, and whether it says that the position commits [N].

    log_mass [N]: log of the sum of exp(logits), where a score model was asked for it.
    """
    uniform = noise.uniform(batch.keys(row, position, noise.ORDER))
    commits = torch.zeros_like(row, dtype=torch.bool)
    for transfer, members in batch.rules.transfers:
        hazard = transfer.hazard(batch.progress.block_step, batch.progress.block_steps, batch.facts.sigma)
        if hazard is None:
            continue
        chance = hazard[row]
        if "mass" in transfer.needs:
            if log_mass is None:
                continue
            chance = chance * (log_mass - _log_scale(batch)[row]).exp()
        mine, orderless = members[row], batch.rules.orderless[row]
        excess = uniform - (1 - chance)
        commits |= mine & (excess >= 0)
        uniform = torch.where(mine & orderless, excess, uniform)
    return uniform, commits


def _log_scale(batch: Batch) -> Tensor:
    """What a score model's head is above its log ratios [R] (SEDD, arXiv 2310.16834, appendix C.2)."""
    facts, rows = batch.facts, len(batch.requests)
    if facts.sigma is None or not facts.scale_by_sigma:
        return torch.zeros(rows, dtype=torch.float64, device=batch.canvas.device)
    return torch.expm1(facts.sigma.total(batch.rules.times(batch.progress))).log() + math.log(facts.vocab_size - 1)


def _quota(batch: Batch, row: Tensor, **known: Tensor | None) -> Quota:
    now, masked = batch.progress, torch.bincount(row, minlength=len(batch.requests))
    return Quota(step=now.block_step, steps=now.block_steps, total=now.block_total, masked=masked, row=row, **known)


def _counts(batch: Batch, due: Sequence[bool], quota: Quota) -> Tensor:
    """How many positions of each row commit [R], 0 for rows that are not due."""
    counts, rows = torch.zeros_like(quota.step), batch.rules.rows(due)
    asked = {request.transfer for request, is_due in zip(batch.requests, due, strict=True) if is_due}
    for transfer, mine in batch.rules.transfers:
        if transfer in asked:
            counts = torch.where(mine & rows, transfer.counts(quota), counts)
    return torch.where(batch.progress.alone & rows, quota.masked, counts)


def _stability(
    batch: Batch, row: Tensor, position: Tensor, predictions: Predictions
) -> tuple[Tensor, list[TopFeatures]]:
    """How little the top features of each candidate changed since the last step [N], 0 for other rows; and these."""
    found: list[TopFeatures] = []
    stability = torch.zeros(len(row), dtype=torch.float64, device=row.device)
    for sae, members in batch.features.saes.items():
        index = members[row].nonzero()[:, 0]
        r, p = row[index], position[index]
        ids = predictions.top_features(sae, r, p)
        before = batch.features.last(r, p, ids.shape[1])
        stability[index] = feature_stability(before, ids, before[:, 0] >= 0).double()
        found.append((r, p, ids))
    return stability, found


def _uptake(batch: Batch, row: Tensor, position: Tensor, predictions: Predictions) -> Tensor:
    """How far each candidate has taken up the attribute its row's order reads [N], without the row's pushes: from the
    least of its row's candidates, 0, to the most, 1; 0 for other rows."""
    taken = torch.zeros(len(row), dtype=torch.float32, device=row.device)
    for layer in {r.uptake.push.layer for r in batch.requests if r.uptake}:
        directions = torch.stack(
            [
                r.uptake.push.direction
                if r.uptake and r.uptake.push.layer == layer
                else torch.zeros(batch.facts.hidden_size)
                for r in batch.requests
            ]
        ).to(row.device)
        projection = predictions.projections(layer, directions, row, position)
        low = projection.new_full((len(batch.requests),), torch.inf).scatter_reduce(0, row, projection, "amin")
        high = projection.new_full((len(batch.requests),), -torch.inf).scatter_reduce(0, row, projection, "amax")
        taken = taken + uptake(projection, low[row], high[row])
    return taken
