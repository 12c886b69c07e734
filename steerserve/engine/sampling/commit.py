"""Commits: what a step changes in its rows, and the events that tell it.

What is to change is found first, on the host: memory may run out then, and nothing has changed that was not told.
"""

from collections.abc import Collection, Mapping, Sequence

import torch
from torch import Tensor

from steerserve.engine import noise
from steerserve.engine.api.events import Committed, Revised, Stepped
from steerserve.engine.forward.batch import Batch
from steerserve.engine.request.request import Request
from steerserve.engine.sampling.sampler import Draw

Place = tuple[int, int]
"""A row of the batch and a canvas position."""
Commit = tuple[int, int, float]
"""A canvas position, a token, and the log of its probability."""
Alternatives = tuple[tuple[int, float], ...]
"""Tokens with their log-probabilities, likeliest first."""


def stepped(requests: Sequence[Request], more: int = 1) -> list[Stepped]:
    """Tell of the step that those of `requests` which ask for it are making, `more` than they have made."""
    return [Stepped(one.id, one.step + more, one.passes) for one in requests if one.params.tell_steps]


def collect_commits(
    batch: Batch, row: Tensor, position: Tensor, token: Tensor, probability: Tensor
) -> list[list[Commit]]:
    """What each row commits, of token [N] at (row [N], canvas position [N])."""
    found: list[list[Commit]] = [[] for _ in batch.requests]
    # Whole numbers are exact in float64: one transfer from the device instead of four.
    told = torch.stack([row.double(), position.double(), token.double(), probability.log()], dim=1)
    for row_, position_, token_, lp in told.tolist():
        # A model that may draw its own mask token leaves the position masked: nothing was committed.
        if int(token_) != batch.facts.mask_id:
            found[int(row_)].append((int(position_), int(token_), lp))
    return found


def apply_commits(
    requests: Sequence[Request],
    found: Sequence[Sequence[Commit]],
    alternatives: Mapping[Place, Alternatives],
    revised: Collection[Place] = (),
) -> list[Committed]:
    """Write what each row commits, and the alternatives where it asks for them; revised: the places whose tokens were
    taken back at this step."""
    events = []
    for (row, place), likeliest in alternatives.items():
        requests[row].top_logprobs[place - requests[row].start] = likeliest
    taken = set(revised)
    for row, (request, mine) in enumerate(zip(requests, found, strict=True)):
        request.made[-1].commits = len(mine)
        # One position commits at each step in any case.
        filled = sum((row, position) not in taken for position, _, _ in mine) if request.bounded else 0
        request.at_bound += max(0, filled - 1)
        for p, t, lp in mine:
            request.canvas[p] = t
            if request.params.logprobs:
                request.logprobs[p - request.start] = lp
        if mine:
            positions = tuple(p - request.start for p, _, _ in mine)
            logprobs = tuple(lp for _, _, lp in mine) if request.params.logprobs else None
            events.append(Committed(request.id, request.step, positions, tuple(t for _, t, _ in mine), logprobs))
    return events


def positions_to_remask(batch: Batch, requests: Sequence[Request]) -> list[Place]:
    """The committed positions of `requests`, rows of the batch, whose draws say that they are masked again at this
    step."""
    due = [one for one in requests if one.transfer.remasks]
    if not due:
        return []
    row, position = batch.committed()
    uniform = noise.uniform(batch.keys(row, position, noise.REMASK))
    chance = torch.zeros(len(batch.requests), dtype=torch.float64, device=row.device)
    now, revising = batch.progress, batch.rules.rows([one in due for one in batch.requests])
    for transfer, mine in batch.rules.transfers:
        own = transfer.remask(now.block_step, now.block_steps)
        if own is not None:
            chance = torch.where(mine & revising, own, chance)
    return places_of((row, position), uniform < chance[row])


def places_of(found: tuple[Tensor, Tensor], taken: Tensor) -> list[Place]:
    """Those of places, given as (row [N], canvas position [N]), that are taken [N] bool."""
    row, position = found
    return [(r, p) for r, p in torch.stack([row[taken], position[taken]], dim=1).tolist()] if len(row) else []


def positions_to_replace(batch: Batch, row: Tensor, position: Tensor, drawn: Draw) -> Tensor:
    """Tell which committed positions, (row [N], canvas position [N]), take the token that was drawn there, by the
    transfers of their rows: [N] bool. The mask is no token: a position is not masked again that way."""
    replaced = torch.zeros_like(row, dtype=torch.bool)
    for transfer, mine in batch.rules.transfers:
        if transfer.edits:
            replaced |= mine[row] & transfer.replaces(drawn.probability)
    return replaced & (drawn.token != batch.canvas[row, position]) & (drawn.token != batch.facts.mask_id)


def remask(requests: Sequence[Request], places: Sequence[Place]) -> list[Revised]:
    """Mask committed positions again; see `Batch.mask`."""
    found: list[list[int]] = [[] for _ in requests]
    for r, p in places:
        requests[r].canvas[p] = requests[r].mask_id
        found[r].append(p - requests[r].start)
    told = zip(requests, found, strict=True)
    return [Revised(request.id, request.step, tuple(positions)) for request, positions in told if positions]


def take_back(requests: Sequence[Request], places: Sequence[Place]) -> list[Revised]:
    """Mask committed positions that the transfers of their rows take back, to leave them masked or to write other
    tokens at once; they are counted for the receipts."""
    for r, _ in places:
        requests[r].revised += 1
    return remask(requests, places)


def cut_behind_end(request: Request, end_ids: tuple[int, ...]) -> bool:
    """Drop what lies behind the first end token of a row that asked for it; whether anything did."""
    if not request.params.early_exit:
        return False
    ends = [i for i, token in enumerate(request.response[:-1]) if token in end_ids]
    if not ends:
        return False
    request.length = ends[0] + 1
    del request.canvas[request.stop :]
    return True
