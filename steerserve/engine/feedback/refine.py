"""Refine finished texts: judge the draft of each row, keep or drop it, and mask a stretch anew."""

import math
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from steerserve.engine import noise
from steerserve.engine.api.events import WORDLESS, Committed, Event, Revised
from steerserve.engine.api.scoring import likelihood
from steerserve.engine.api.text import cut_at_stop
from steerserve.engine.forward.batch import Batch
from steerserve.engine.outputs.result import Text
from steerserve.engine.request.refinement import RefinedText, Refinement
from steerserve.engine.request.request import Request
from steerserve.engine.sampling.commit import stepped

Judge = Callable[[Sequence[Request]], list[tuple[dict[str, float], bool]]]
"""Judges finished rows: returns the verdicts on each text, and True if they took a forward pass."""


@dataclass(frozen=True, eq=False)
class RefineRound:
    """Outcome for a row whose draft has been judged; positions are those of its response."""

    row: int
    request: Request
    refinement: Refinement
    draft: RefinedText
    passed: bool
    """True if judging took a forward pass."""
    best: RefinedText
    """The draft, or the one that it is not better than."""
    stretch: list[int]
    """What is masked next, none after the last round."""
    place: tuple[int, int]
    """The block and its step at which to write the stretch anew."""

    @property
    def canvas(self) -> list[int]:
        """The response as it is to be."""
        anew = set(self.stretch)
        return [self.request.mask_id if i in anew else token for i, token in enumerate(self.best.tokens)]


def refine(batch: Batch, judged: Judge, end_ids: Sequence[int], text: Text, events: list[Event]) -> None:
    """Judge the drafts that are done; put back what was there where they are worse than the best before them, and mask
    the next stretch of rows with rounds left. What changes is added to `events`; the batch's canvas follows."""
    done = [(row, request) for row, request in enumerate(batch.requests) if request.drafted]
    if not done:
        return
    found = judged([request for _, request in done])
    turns = [_turn(row, request, *told, end_ids, text) for (row, request), told in zip(done, found, strict=True)]
    _set(batch, turns)
    # Up to here memory may run out, and all is done again from the same rows as if it had not been begun.
    for turn in turns:
        turn.refinement.passes += turn.passed
    events += stepped([turn.request for turn in turns], more=0)
    for turn in turns:
        _emit(turn, events)


def answer_best(request: Request, events: list[Event]) -> bool:
    """Bring a row that ends inside a round back to its best draft, as of the step just made; whether there was one.
    What changes is added to `events`."""
    refinement = request.refinement
    if refinement is None or refinement.best is None:
        return False
    now = RefinedText(tuple(request.response), dict(request.logprobs), dict(request.top_logprobs), {}, 0.0)
    _take(request, refinement.best, now, request.step, events)
    request.canvas[request.start : request.stop] = refinement.best.tokens
    # Nothing is left to be written or judged.
    refinement.rounds, request.block = len(refinement.made), request.blocks
    return True


def _take(request: Request, best: RefinedText, last: RefinedText, step: int, events: list[Event]) -> None:
    """Give a row the log-probabilities of its best draft, and tell where that differs from the last one: in tokens, or
    in what they were likely."""
    one, other = ([(token, draft.logprobs.get(i)) for i, token in enumerate(draft.tokens)] for draft in (best, last))
    changed = [i for i, (mine, its) in enumerate(zip(one, other, strict=True)) if mine != its]
    request.logprobs, request.top_logprobs = dict(best.logprobs), dict(best.top_logprobs)
    dropped = tuple(i for i in changed if last.tokens[i] != request.mask_id)
    back = tuple(i for i in changed if best.tokens[i] != request.mask_id)
    if dropped:
        events.append(Revised(request.id, step, dropped))
    if back:
        logprobs = tuple(best.logprobs[i] for i in back) if request.params.logprobs else None
        events.append(Committed(request.id, step, back, tuple(best.tokens[i] for i in back), logprobs))


def _turn(
    row: int, request: Request, verdicts: dict[str, float], passed: bool, end_ids: Sequence[int], text: Text
) -> RefineRound:
    refinement = request.refinement
    assert refinement is not None
    # A text that shows nothing would else be the surest to lack what is not wanted.
    score = -math.inf if WORDLESS in verdicts.values() else likelihood(verdicts, refinement.absent)
    draft = RefinedText(tuple(request.response), dict(request.logprobs), dict(request.top_logprobs), verdicts, score)
    best, left = draft, refinement.rounds
    if refinement.best is not None:
        best = draft if refinement.betters(draft) else refinement.best
        left = refinement.rounds_left - 1
    stretch = _next(request, refinement, best, end_ids, text) if left else []
    place = request.beginning(stretch) if stretch else (request.block, request.block_step)
    return RefineRound(row, request, refinement, draft, passed, best, stretch, place)


def _next(request: Request, refinement: Refinement, best: RefinedText, end_ids: Sequence[int], text: Text) -> list[int]:
    """The positions to write anew: a stretch drawn from the tokens up to the first end token or the end of the first
    stop string, whichever comes first."""
    ends = [i for i, token in enumerate(best.tokens) if token in end_ids]
    before = best.tokens[: ends[0] + 1] if ends else best.tokens
    # A model that may draw its own mask token leaves gaps: there is nothing to write anew in them.
    tokens = [i for i, token in enumerate(before) if token != request.mask_id]

    def stopped(count: int) -> bool:
        more = count < len(tokens)
        return cut_at_stop(text(request, [best.tokens[i] for i in tokens[:count]], more), request.params.stop)[1]

    if request.params.stop:
        # A text with a stop string keeps it however it goes on, so that few of its beginnings need be decoded.
        tokens = tokens[: bisect_left(range(len(tokens)), True, key=stopped)]
    if not tokens:
        return []
    span = min(refinement.span, len(tokens))
    seed, row, step = (torch.tensor([one]) for one in (request.params.seed, request.params.row, request.step))
    drawn = noise.uniform(noise.keys(seed, row, step, torch.tensor([0]), noise.STRETCH))
    first = int(drawn.item() * (len(tokens) - span + 1))
    return [i for i in tokens[first : first + span] if i < tokens[first] + span]


def _set(batch: Batch, turns: Sequence[RefineRound]) -> None:
    """Bring the batch's tensors, and the pushes of its next forward, to what the rows are about to become."""
    written: list[tuple[int, int, int]] = []
    masked: list[tuple[int, int]] = []
    for turn in turns:
        row, start, mask = turn.row, turn.request.start, turn.request.mask_id
        canvas = turn.canvas
        for i, (token, other) in enumerate(zip(canvas, turn.draft.tokens, strict=True)):
            if token != other and token != mask:
                written.append((row, start + i, token))
        masked += [(row, start + i) for i, token in enumerate(canvas) if token == mask]
        if turn.stretch:
            batch.begin_round(row, start + turn.stretch[0], start + turn.stretch[-1] + 1)
    if written:
        places = torch.tensor(written, device=batch.device)
        batch.write(places[:, 0], places[:, 1], places[:, 2])
    batch.mask(masked)


def _emit(turn: RefineRound, events: list[Event]) -> None:
    """Change the row, and tell it as of the step that was made last."""
    request, step = turn.request, turn.request.step - 1
    turn.refinement.weigh(turn.draft)
    request.canvas[request.start : request.stop] = turn.canvas
    _take(request, turn.best, turn.draft, step, events)
    if turn.stretch:
        events.append(Revised(request.id, step, tuple(turn.stretch)))
        turn.refinement.stretch = (turn.stretch[0], turn.stretch[-1] + 1)
        request.write_again(turn.place)
    else:
        # No token is there to be written anew, or no round is left.
        turn.refinement.rounds = len(turn.refinement.made)
