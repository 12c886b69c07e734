"""Which candidates commit at a step: scored by each row's order, counted by each row's transfer."""

import torch
from torch import Tensor

from schedulers import Candidates, Quota, feature_stability, rank
from steerserve.engine import noise
from steerserve.engine.batch import TOP_FEATURES, Batch
from steerserve.engine.sampler import Draw, pad_rows


def choose_blindly(batch: Batch, row: Tensor, position: Tensor) -> Tensor:
    """Of the positions that may commit, (row [N], position [N]), those to draw candidates for [N] bool.

    Where neither order nor transfer looks at the candidates, only the positions that commit are kept; the rest of
    their logits and noise is never made. The rows that do look keep all of theirs.
    """
    if not any(request.chooses_blindly for request in batch.requests):
        return torch.ones_like(row, dtype=torch.bool)
    return _choose(batch, row, position, None) | ~batch.blind[row]


def choose(batch: Batch, row: Tensor, position: Tensor, drawn: Draw) -> Tensor:
    """Of the positions drawn, those that commit [N] bool; all of a row that has chosen before."""
    if all(request.chooses_blindly for request in batch.requests):
        return torch.ones_like(row, dtype=torch.bool)
    return _choose(batch, row, position, drawn) | batch.blind[row]


def _choose(batch: Batch, row: Tensor, position: Tensor, drawn: Draw | None) -> Tensor:
    """The choice of the rows that can be made now: the blind ones before drawing, the others after; [N] bool."""
    requests, device = batch.requests, row.device
    due = [request.chooses_blindly == (drawn is None) for request in requests]
    candidates = Candidates(
        probability=drawn.probability if drawn else None,
        margin=drawn.margin if drawn else None,
        entropy=drawn.entropy if drawn else None,
        uniform=noise.uniform(batch.keys(row, position, noise.ORDER)),
        stability=_stability(batch, row, position) if drawn and batch.saes else None,
    )
    scores = torch.zeros(len(row), dtype=torch.float64, device=device)
    for order in dict.fromkeys(r.order for r, now in zip(requests, due, strict=True) if now):
        mine = torch.tensor([now and r.order == order for r, now in zip(requests, due, strict=True)], device=device)
        scores = torch.where(mine[row], order.score(candidates).double(), scores)
    ranked = rank(scores, row)
    step, steps, total = torch.tensor(
        [(r.block_step, r.block_steps, r.block_total) for r in requests], device=device
    ).unbind(1)
    quota = Quota(
        step=step,
        steps=steps,
        total=total,
        masked=torch.bincount(row, minlength=len(requests)),
        row=row,
        probability=drawn.probability[ranked] if drawn else None,
        entropy=drawn.entropy[ranked] if drawn and drawn.entropy is not None else None,
    )
    counts = torch.zeros_like(step)
    for transfer in dict.fromkeys(r.transfer for r, now in zip(requests, due, strict=True) if now):
        mine = torch.tensor(
            [now and r.transfer == transfer for r, now in zip(requests, due, strict=True)], device=device
        )
        counts = torch.where(mine, transfer.counts(quota), counts)
    first = quota.masked.cumsum(0) - quota.masked
    place = torch.arange(len(row), device=device) - first[row]
    return torch.zeros_like(row, dtype=torch.bool).scatter(0, ranked, place < counts[row])


def _stability(batch: Batch, row: Tensor, position: Tensor) -> Tensor:
    """How little the top features of each candidate changed since the last step [N]; 0 for other rows."""
    stability = torch.zeros(len(row), dtype=torch.float64, device=row.device)
    for sae, members in batch.saes.items():
        index = members[row].nonzero()[:, 0]
        r, p = row[index], position[index]
        states = pad_rows(batch.plan.captured[sae.facts.layer][r, p].float())
        ids = sae.top_ids(states, min(TOP_FEATURES, sae.facts.features))[: len(index)]
        before = batch.features[r, p, : ids.shape[1]]
        stability[index] = feature_stability(before, ids, before[:, 0] >= 0).double()
        batch.features[r, p, : ids.shape[1]] = ids
    return stability
