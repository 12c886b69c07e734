"""What a batch does when rows that refine themselves have written a draft: judge it, keep or drop it, mask anew."""

from collections.abc import Callable, Sequence

import torch

from steerserve.engine import noise
from steerserve.engine.batch import Batch
from steerserve.engine.changes import Place, take_back
from steerserve.engine.events import Committed, Event, Revised
from steerserve.engine.refinement import Draft, likelihood
from steerserve.engine.request import Request

Judge = Callable[[Sequence[Request]], list[tuple[dict[str, float], bool]]]
"""Of finished rows: the verdicts on the text of each, and whether they took a forward pass."""


def refine(batch: Batch, judged: Judge, end_ids: Sequence[int], events: list[Event]) -> None:
    """Judge the drafts that are done; put back what was there where they are worse than the best before them, and mask
    the next stretch of rows with rounds left. What changes is added to `events`; the batch's canvas follows."""
    done = [(i, one) for i, one in enumerate(batch.requests) if one.drafted]
    if not done:
        return
    found = judged([request for _, request in done])
    # Up to here memory may run out, and nothing has changed.
    written: list[tuple[int, int, int]] = []
    masked: list[Place] = []
    for (row, request), (verdicts, passed) in zip(done, found, strict=True):
        refinement = request.refinement
        assert refinement is not None
        refinement.passes += passed
        score = likelihood(verdicts, refinement.absent)
        draft = Draft(tuple(request.response), dict(request.logprobs), dict(request.top_logprobs), verdicts, score)
        if not refinement.weigh(draft):
            written += [(row, position, token) for position, token in _put_back(request, events)]
        held = _next(request, end_ids) if refinement.going else []
        if held:
            events += take_back(batch.requests, [(row, position) for position in held])
            masked += [(row, position) for position in held]
            request.write_again(held[0])
            batch.begin_round(row)
    if written:
        places = torch.tensor(written, device=batch.canvas.device)
        batch.write(places[:, 0], places[:, 1], places[:, 2])
    batch.mask(masked)


def _put_back(request: Request, events: list[Event]) -> list[tuple[int, int]]:
    """Give a row the tokens of its best draft again; the canvas positions that change, with their tokens."""
    refinement = request.refinement
    assert refinement is not None and refinement.best is not None
    best, now, mask = refinement.best, request.response, request.mask_id
    changed = [i for i, (token, other) in enumerate(zip(best.tokens, now, strict=True)) if token != other]
    for i in changed:
        request.canvas[request.start + i] = best.tokens[i]
    request.logprobs, request.top_logprobs = dict(best.logprobs), dict(best.top_logprobs)
    dropped = tuple(i for i in changed if now[i] != mask)
    kept = tuple(i for i in changed if best.tokens[i] != mask)
    if dropped:
        events.append(Revised(request.id, request.step, dropped))
    if kept:
        logprobs = tuple(best.logprobs[i] for i in kept) if request.params.logprobs else None
        events.append(Committed(request.id, request.step, kept, tuple(best.tokens[i] for i in kept), logprobs))
    return [(request.start + i, best.tokens[i]) for i in changed]


def _next(request: Request, end_ids: Sequence[int]) -> list[int]:
    """The canvas positions to write anew: a stretch drawn from the tokens up to the first end token."""
    refinement, response = request.refinement, request.response
    assert refinement is not None
    ends = [i for i, token in enumerate(response) if token in end_ids]
    before = response[: ends[0] + 1] if ends else response
    # A model that may draw its own mask token leaves gaps: there is nothing to write anew in them.
    tokens = [i for i, token in enumerate(before) if token != request.mask_id]
    if not tokens:
        refinement.rounds = len(refinement.made)
        return []
    span = min(refinement.span, len(tokens))
    seed, row, step = (torch.tensor([one]) for one in (request.params.seed, request.params.row, request.step))
    drawn = noise.uniform(noise.keys(seed, row, step, torch.tensor([0]), noise.STRETCH))
    first = int(drawn.item() * (len(tokens) - span + 1))
    stretch = tokens[first : first + span]
    refinement.stretch = (stretch[0], stretch[-1] + 1)
    return [request.start + i for i in stretch]
