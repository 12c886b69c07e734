"""The log-probability of each token of a prompt: every one in turn is masked, and the model is asked for it.

A token is scored as a response of one token, between those before and behind it, would draw it at its only step, under
the pushes of the row that asks: a masked model's log p(x_i | all other x), the terms of the pseudo-log-likelihood
(Salazar et al., arXiv 1910.14659). The response and the suffix are no part of it, nor is guidance by the prompt.
"""

import logging
import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field, replace

import torch

from steerserve.engine.admission.catalogue import Catalogue
from steerserve.engine.admission.validate import scored_places
from steerserve.engine.api.events import Done, Event, Failed, Result, Scored, Stepped
from steerserve.engine.api.params import GenerationParams
from steerserve.engine.batching.memory import MemoryLimits, MemoryUse, footprint
from steerserve.engine.feedback.unapplied import missed, unapplied
from steerserve.engine.forward.batch import Batch
from steerserve.engine.forward.gains import hold_to_budgets
from steerserve.engine.outputs.receipt import receipt
from steerserve.engine.request.request import Request
from steerserve.engine.runners.packed import PackedRunner
from steerserve.engine.sampling.sampler import scores
from steerserve.errors import RequestError
from steerserve.models import DiffusionLM, ModelFacts

logger = logging.getLogger(__name__)


@dataclass(eq=False)
class Ended:
    """A row that has written what it will, and whose prompt has yet to be scored."""

    request: Request
    result: Result
    found: dict[int, Scored] = field(default_factory=dict)
    """What has been found, by place in the prompt."""
    touched: int = 0
    """Positions that its pushes changed meanwhile."""

    @property
    def passes(self) -> int:
        """Forward passes made for the row so far."""
        return self.result.forward_passes + len(self.found)

    def done(self) -> Done:
        """The row's end, once all has been found."""
        request, result = self.request, self.result
        if request.params.prompt_logprobs:
            prompt = tuple(self.found.get(place) for place in range(len(request.prompt_ids)))
            result = replace(result, prompt=prompt, forward_passes=self.passes)
            # Of a row that writes nothing this is all that its pushes did.
            whole = result.receipt if request.writes else receipt(request)
            if whole is not None:
                told = {"forward_passes": len(self.found), "positions_touched": self.touched}
                result = replace(result, receipt=whole | {"prompt": told})
        return Done(request.id, result)


class Scoring:
    """The rows whose prompts are scored, some places at a step of the engine, of as many rows as fit into a forward."""

    def __init__(self, facts: ModelFacts, admit: Callable[[GenerationParams, Catalogue], Request]) -> None:
        self._facts = facts
        self._admit = admit
        self._rows: list[Ended] = []
        self._most: float = math.inf
        """Places of one forward; fewer after one that did not fit into memory."""

    def __len__(self) -> int:
        return len(self._rows)

    def check(self, request: Request) -> None:
        """Raise RequestError for a row whose prompt could not be scored."""
        places = scored_places(request.prompt_ids, self._facts)
        if request.params.prompt_logprobs and places:
            try:
                self._admit(self._asked(request, places[-1]), request.catalogue)
            except RequestError as error:
                message = f"for the prompt's log-probabilities, each that of a response of one token: {error}"
                raise type(error)(message, error.param) from error

    def add(self, request: Request, result: Result) -> None:
        """Score the prompt of a row, if it asks for that, and let it end."""
        self._rows.append(Ended(request, result))

    def drop(self, ids: Collection[str]) -> list[Event]:
        """Forget rows that were aborted."""
        gone = [one.request.id for one in self._rows if one.request.id in ids]
        self._rows = [one for one in self._rows if one.request.id not in ids]
        return [Failed(name, "aborted", aborted=True) for name in gone]

    def clear(self) -> None:
        """Forget all rows."""
        self._rows = []

    def step(self, model: DiffusionLM, limits: MemoryLimits, kept: int) -> list[Event]:
        """Score some places, and end the rows that have all of theirs; kept: positions whose keys and values other rows
        have in memory. What fails ends the rows it was made for, and no other; so does a push that does not take."""
        chunk: list[tuple[Ended, int]] = []
        unsteered: dict[str, Failed] = {}
        try:
            rows = self._chosen(chunk, limits, kept)
            if rows:
                unsteered = _score(chunk, rows, model)
        except (torch.OutOfMemoryError, MemoryError):
            self._most = max(1, len(chunk) // 2)
            if len(chunk) == 1:
                return self._fail(chunk, "out of memory")
        except Exception:
            logger.exception("the prompts of %d rows could not be scored", len({one.request.id for one, _ in chunk}))
            return self._fail(chunk, "the step failed")
        events: list[Event] = [*unsteered.values()]
        self._rows = [one for one in self._rows if one.request.id not in unsteered]
        for one in {id(ended): ended for ended, _ in chunk}.values():
            if one.request.id not in unsteered and one.request.params.tell_steps:
                events.append(Stepped(one.request.id, one.result.steps, one.passes))
        done = [one for one in self._rows if not self._left(one)]
        self._rows = [one for one in self._rows if one not in done]
        self._most = self._most if self._rows else math.inf
        return [*events, *(one.done() for one in done)]

    def _left(self, one: Ended) -> list[int]:
        """The places that have yet to be scored."""
        asked = one.request.params.prompt_logprobs
        places = scored_places(one.request.prompt_ids, self._facts) if asked else ()
        return [place for place in places if place not in one.found]

    def _chosen(self, chunk: list[tuple[Ended, int]], limits: MemoryLimits, kept: int) -> list[Request]:
        """The rows of the next forward, what they are for being put into `chunk`."""
        taken, rows = MemoryUse(kept=kept), list[Request]()
        for ended, place in ((one, place) for one in self._rows for place in self._left(one)):
            # So that it is known whose row it is that cannot be admitted.
            chunk.append((ended, place))
            request = self._admit(self._asked(ended.request, place), ended.request.catalogue)
            request.id = ended.request.id
            together = taken + footprint(request, self._facts)
            if rows and (len(rows) >= self._most or not limits.hold(together)):
                chunk.pop()
                break
            taken = together
            rows.append(request)
        return rows

    def _fail(self, chunk: Sequence[tuple[Ended, int]], message: str) -> list[Event]:
        """End the rows that a forward was made for."""
        gone = {one.request.id for one, _ in chunk}
        self._rows = [one for one in self._rows if one.request.id not in gone]
        return [Failed(name, message) for name in sorted(gone)]

    def _asked(self, request: Request, place: int) -> GenerationParams:
        """A response of one token in the place of one of a prompt."""
        first = self._facts.bos_id is not None
        return replace(
            request.params,
            prompt=request.prompt_ids[first:place],
            suffix=request.prompt_ids[place + 1 :],
            max_tokens=1,
            steps=1,
            block_length=None,
            early_exit=False,
            stop=(),
            logprobs=False,
            top_logprobs=0,
            prompt_logprobs=False,
            tell_steps=False,
            trace=None,
            abort_when=None,
            remask_when=None,
            refine=None,
            measure_kl=False,
            verdicts=(),
            quality=False,
        )


def _score(chunk: Sequence[tuple[Ended, int]], rows: Sequence[Request], model: DiffusionLM) -> dict[str, Failed]:
    """Make one forward of rows of one masked position each, and note what it says of the tokens that stand there; the
    ends of those rows that it did not steer."""
    parameter = next(model.parameters())
    batch = Batch(rows, model.facts, parameter.device, parameter.dtype)
    runner = PackedRunner(batch, model)
    row, position = batch.candidates()
    runner.begin()
    hold_to_budgets(rows, [one.begin() for one in rows], runner)
    hidden = runner.forward((row, position))[row, batch.state(position)]
    lost = runner.packed.plans.lost()
    runner.count()
    runner.flush()
    token = torch.tensor([one.request.prompt_ids[place] for one, place in chunk], device=hidden.device)
    counts = [one.request.params.top_logprobs for one, _ in chunk]
    own, tokens, values = (part.tolist() for part in scores(model, hidden, token, max(counts)))
    for i, (one, place) in enumerate(chunk):
        pairs = tuple(zip(tokens[i], values[i], strict=True))[: counts[i]]
        one.found[place] = Scored(one.request.prompt_ids[place], own[i], pairs)
        for mine, its in zip(one.request.interventions, rows[i].interventions, strict=True):
            for push, scored in zip(mine.pushes, its.pushes, strict=True):
                one.touched += scored.applied.positions
                if not one.request.writes:
                    push.applied.add(scored.applied)
    return missed(rows) | unapplied(batch.forward_rows.requests, lost)
