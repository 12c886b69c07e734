"""The torch engine: step-level batching of denoising rows in this process."""

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from traceback import clear_frames

import torch
from tokenizers import Tokenizer
from torch import Tensor

from steerserve.config import EngineConfig
from steerserve.engine.admission.admit import admit
from steerserve.engine.admission.catalogue import Catalogue
from steerserve.engine.api.events import Done, Event, Failed, Trace
from steerserve.engine.api.params import GenerationParams
from steerserve.engine.api.text import certain, continuation, vocabulary
from steerserve.engine.batching.batcher import Batcher
from steerserve.engine.batching.memory import Costs, MemoryLimits, footprint, free_bytes
from steerserve.engine.batching.queue import Queue
from steerserve.engine.feedback.limits import Refused, account, end
from steerserve.engine.feedback.react import Read, react, read
from steerserve.engine.feedback.refine import refine
from steerserve.engine.feedback.unapplied import missed, unapplied
from steerserve.engine.forward.batch import Batch
from steerserve.engine.forward.feature_memory import TopFeatures
from steerserve.engine.forward.gains import hold_to_budgets, lowers
from steerserve.engine.outputs.quality import assess
from steerserve.engine.outputs.result import empty_result, is_finished, result, text_so_far
from steerserve.engine.outputs.trace import due_traces, keep_traces
from steerserve.engine.outputs.verdicts import judge, judgements, reader
from steerserve.engine.prompt_scoring import Scoring
from steerserve.engine.request.intervention import Forward
from steerserve.engine.request.request import Request
from steerserve.engine.runners.cached import CachedRunner
from steerserve.engine.runners.packed import PackedRunner
from steerserve.engine.runners.runner import ModelRunner
from steerserve.engine.sampling.commit import (
    Alternatives,
    Commit,
    Place,
    apply_commits,
    collect_commits,
    cut_behind_end,
    places_of,
    positions_to_remask,
    positions_to_replace,
    stepped,
    take_back,
)
from steerserve.engine.sampling.predictions import alternatives_of
from steerserve.engine.sampling.selection import select, select_before_sampling, skip_empty_steps
from steerserve.errors import QueueFullError, RequestError
from steerserve.models import DiffusionLM

logger = logging.getLogger(__name__)
MEMORY_ERRORS = (torch.OutOfMemoryError, MemoryError)
MAX_FAILURES = 3
"""Failing steps in a row after which the engine gives up: by then it is not one batch's fault."""


@dataclass(frozen=True, eq=False)
class StepResult:
    """What one forward pass of a batch came to, before any row has changed."""

    row: Tensor
    """Rows [N] of the batch of which a position commits."""
    position: Tensor
    """Canvas positions [N] that commit."""
    token: Tensor
    """What they commit [N]."""
    commits: list[list[Commit]]
    """The same for each row, on the host, with log-probabilities."""
    alternatives: dict[Place, Alternatives]
    """The likeliest tokens at positions that commit, of rows that ask for them."""
    remasked: list[Place]
    """Committed positions that are masked again, or whose token another one replaces."""
    traces: list[Trace]
    read: Read
    """What the readouts of each row told."""
    refused: Refused
    """Rows whose pushes went over a limit on their size that refuses."""
    unsteered: Mapping[int, int]
    """Rows of the forward whose pushes were due at a layer that the forward did not come by, with that layer."""
    forwards: list[Forward]
    """The forward of each row, to be counted with the step."""
    features: list[TopFeatures]
    """Top features of the candidates, for orders that compare steps."""


Batches = Callable[[Sequence[Request]], list[tuple[Batch, ModelRunner]]]
"""Puts rows into batches, each with what makes its forward passes."""


class DiffusionEngine:
    """Runs denoising steps of many rows at once: see `steerserve.engine.api.base.Engine`."""

    def __init__(
        self,
        model: DiffusionLM,
        tokenizer: Tokenizer,
        catalogue: Catalogue,
        config: EngineConfig,
        batches_of: Batches | None = None,
    ) -> None:
        """batches_of: None makes the forward passes with the model in this process."""
        self.model, self.tokenizer, self.catalogue, self.config = model, tokenizer, catalogue, config
        self.reader = reader(tokenizer, catalogue)
        """What finished texts are read with to be judged."""
        self.vocabulary = vocabulary(tokenizer)
        parameter = next(model.parameters())
        self.device, self.dtype = parameter.device, parameter.dtype
        free = free_bytes(model, self.device) if config.max_batch_bytes is None else config.max_batch_bytes
        limits = MemoryLimits(config.max_rows, config.max_batch_tokens, free, Costs.of(model))
        self.batcher = Batcher(model.facts, limits, config.max_rows)
        self.batches_of: Batches = batches_of or self._torch_batches
        self.batches: list[tuple[Batch, ModelRunner]] = []
        """The rows that run; none until the next step makes them."""
        self.failures = 0
        """Steps in a row that failed."""
        self.scoring = Scoring(catalogue.facts, self._admit)
        """The rows that have written what they will, and whose prompts have yet to be scored."""
        self.step_seconds = 0.0
        """Moving average of the time of one step of one row."""

    @property
    def steps(self) -> int:
        """Steps made so far."""
        return self.batcher.steps

    @property
    def waiting(self) -> Queue:
        """The rows that wait."""
        return self.batcher.waiting

    @property
    def running(self) -> list[Request]:
        """The rows of the next forward, as far as they are chosen."""
        return self.batcher.running

    @property
    def aborted(self) -> set[str]:
        """The rows that end before the next step."""
        return self.batcher.aborted

    def decode(self, ids: Sequence[int]) -> str:
        """Text of token ids, special tokens left out."""
        text: str = self.tokenizer.decode(list(ids), skip_special_tokens=True)
        return text

    def replace_catalogue(self, catalogue: Catalogue) -> None:
        """Admit by another catalogue from now on, of the same model and SAEs; rows that are there keep theirs. Safe
        from any thread."""
        if self.reader is self.tokenizer:
            self.reader = reader(self.tokenizer, catalogue)
        self.catalogue = catalogue

    def admit(self, params: GenerationParams) -> Request:
        """Check params and resolve every name without queueing; safe from any thread."""
        request = self._admit(params, self.catalogue)
        self.scoring.check(request)
        self.batcher.limits.check(footprint(request, self.model.facts))
        return request

    def add(self, requests: list[Request]) -> None:
        """Queue admitted requests, all of them or none; raises QueueFullError."""
        if len(requests) > self.config.max_queue:
            raise RequestError(f"{len(requests)} rows, but the queue holds {self.config.max_queue} at most", "n")
        held = len(self.waiting) + len(self.scoring)
        if len(requests) > self.config.max_queue - held:
            raise QueueFullError(
                f"the queue holds {held} of {self.config.max_queue} rows: no room for {len(requests)}",
                self.retry_after(),
            )
        self.batcher.add([one for one in requests if one.writes])
        for request in requests:
            if not request.writes:
                self.scoring.add(request, empty_result(request))

    def retry_after(self) -> float:
        """Seconds until half of what waits will have run, at the measured rate; at least one."""
        return max(1.0, self.step_seconds * sum(request.steps_left for request in self.batcher.unfinished) / 2)

    def abort(self, request_id: str) -> None:
        """Free a request's row before the next step; unknown ids are ignored."""
        self.batcher.aborted.add(request_id)

    @torch.inference_mode()
    def steer(self, request_id: str, request: Request) -> int | None:
        """Give a request other interventions from its next step on; returns that step, None for one that is gone."""
        for mine in self.batcher.unfinished:
            if mine.id == request_id and request_id not in self.aborted:
                # Before the change: what the pushes did so far is handed back to the row.
                self._close_batches()
                self.batcher.steer(mine, request)
                return mine.step
        return None

    def close(self) -> None:
        """Release the model; requests still running end in `Failed`."""
        self.batcher.clear()
        self.scoring.clear()
        self.batches = []

    @torch.inference_mode()
    def step(self) -> list[Event]:
        """Make one denoising step of the rows that are due: see `Engine.step`.

        A step that runs out of memory is made again with fewer rows. One that fails ends the rows it ran, and the
        engine only if the next ones fail too. What was done before it failed is told in any case.
        """
        events = self._denoise()
        if self.scoring:
            kept = sum(footprint(request, self.model.facts).kept for request in self.running)
            events += self.scoring.step(self.model, self.batcher.limits, kept)
        return events

    def _admit(self, params: GenerationParams, catalogue: Catalogue) -> Request:
        return admit(params, catalogue, self.tokenizer, self.config)

    def _denoise(self) -> list[Event]:
        """The step of the rows that write."""
        events, began = list[Event](), time.perf_counter()
        try:
            try:
                batches = self._schedule(events)
                for batch, runner in batches:
                    # Rows that pass the last step of a block so have no forward: another row's would count as theirs.
                    if not skip_empty_steps(batch, events):
                        self._apply(batch, runner, self._run(batch, runner), events)
                    self._finish(batch, runner, events)
                self._note_step(batches, time.perf_counter() - began)
            except MEMORY_ERRORS as error:
                # What the step held is held by its exception too.
                clear_frames(error.__traceback__)
                self._preempt(events)
        except Exception as error:
            self._fail(error, events)
        return events

    def _schedule(self, events: list[Event]) -> list[tuple[Batch, ModelRunner]]:
        """Choose the rows of the step, and bring the tensors to them."""
        told, aborted = self.batcher.drain_notices()
        events += told
        events += self.scoring.drop(aborted)
        if self.batcher.schedule():
            self._close_batches()
        if self.batcher.rows:
            self.batcher.steps += 1
            self.batches = self.batches or self.batches_of(self.batcher.rows)
        return self.batches

    def _torch_batches(self, rows: Sequence[Request]) -> list[tuple[Batch, ModelRunner]]:
        """Rows that make everything anew at each step, and those that keep a cache."""
        kinds: list[tuple[Callable[[Batch, DiffusionLM], ModelRunner], list[Request]]] = [
            (PackedRunner, [request for request in rows if request.cache is None]),
            (CachedRunner, [request for request in rows if request.cache is not None]),
        ]
        made = [(Batch(mine, self.model.facts, self.device, self.dtype), kind) for kind, mine in kinds if mine]
        return [(batch, kind(batch, self.model)) for batch, kind in made]

    def _close_batches(self) -> None:
        """Hand what outlives the tensors back to the rows; the next step makes them anew."""
        for batch, runner in self.batches:
            runner.close()
            batch.features.close()
        self.batches = []

    def _run(self, batch: Batch, runner: ModelRunner) -> StepResult:
        """Make the forward pass, sample candidates and select those that commit.

        No row has changed yet: where memory runs out, the result is never applied, and the step is made again.

        Where a row would go over its limit on KL the forward is made again with smaller pushes of that row. The other
        rows come out of it the same: their forward is the same one.
        """
        row, position = batch.candidates()
        worth = select_before_sampling(batch, row, position)
        row, position = row[worth], position[worth]
        count = len(row)
        # What may be replaced is drawn like the candidates, behind them.
        standing = batch.replaceable()
        every_row, every_position = torch.cat([row, standing[0]]), torch.cat([position, standing[1]])
        forwards = [request.begin() for request in batch.requests]
        runner.begin()
        hold_to_budgets(batch.requests, forwards, runner)
        while True:
            predictions = runner.run(every_row, every_position)
            drawn = predictions.draw(every_row, every_position)
            chosen, features = select(batch, row, position, drawn[:count], predictions)
            replaced = positions_to_replace(batch, *standing, drawn[count:])
            taken = torch.cat([chosen, replaced])
            nats = predictions.divergence(every_row[taken], every_position[taken])
            if not lowers(batch.requests, forwards, nats, runner):
                break
        row, position, token = every_row[taken], every_position[taken], drawn.token[taken]
        return StepResult(
            row,
            position,
            token,
            alternatives=alternatives_of(batch, predictions, row, position),
            unsteered=predictions.lost(),
            traces=due_traces(batch, predictions),
            read=read(batch, predictions),
            refused=predictions.refused(),
            remasked=[*positions_to_remask(batch, batch.requests), *places_of(standing, replaced)],
            commits=collect_commits(batch, row, position, token, drawn.probability[taken]),
            forwards=forwards,
            features=features,
        )

    def _apply(self, batch: Batch, runner: ModelRunner, found: StepResult, events: list[Event]) -> None:
        """Change the tensors and the rows by what a step came to, and add what there is to tell to `events`."""
        batch.mask(found.remasked)
        batch.write(found.row, found.position, found.token)
        batch.features.remember(found.features)
        # Up to here memory may run out, and the step is made again as if it had not been begun.
        runner.count()
        for request, forward in zip(batch.requests, found.forwards, strict=True):
            request.made.append(forward)
        events += stepped(batch.requests)
        events += keep_traces(batch.requests, found.traces)
        events += take_back(batch.requests, found.remasked)
        events += apply_commits(batch.requests, found.commits, found.alternatives, found.remasked)
        again = react(batch, runner, found.read, events)
        for request, commits in zip(batch.requests, found.commits, strict=True):
            self.batcher.shortened |= cut_behind_end(request, batch.facts.end_ids)
            request.advance(bool(commits))
        account(batch.requests, batch.forward_rows.requests, found.refused, events)
        end(batch.requests, unapplied(batch.forward_rows.requests, found.unsteered), events)
        batch.mask(again)

    def _finish(self, batch: Batch, runner: ModelRunner, events: list[Event]) -> None:
        """End the rows whose text can change no more, and begin the next round of those that refine theirs."""
        ends = self.model.facts.end_ids
        refine(batch, self._judged, ends, self._text, events)
        running = [request for request in batch.requests if not request.finished]
        done = [request for request in running if is_finished(request, ends, self._text)]
        if done:
            runner.flush()
            end(done, missed(done), events)
            done = [request for request in done if not request.finished]
        results = [result(request, ends, self._text) for request in done]
        judge(results, done, self.model, self.reader)
        assess(results, done, self.model)
        ended = list(zip(done, results, strict=True))
        told = [Done(request.id, one) for request, one in ended if not request.params.prompt_logprobs]
        # Only now: a row whose result could not be made has not ended, and fails with its step.
        for request in done:
            request.finished = True
        events += told
        for request, one in ended:
            if request.params.prompt_logprobs:
                self.scoring.add(request, one)
        if not self.running:
            self.batcher.leave()
            self.batches = []

    def _preempt(self, events: list[Event]) -> None:
        """After a step that did not fit into memory: finish what can be, and let fewer rows run."""
        ran, judging = len(self.running), any(request.drafted for request in self.running)
        for batch, runner in self.batches:
            # Of a row that has ended only the telling did not fit, of one with a draft only the judging.
            self._finish(batch, runner, events)
        # Only now: what a row that goes on is to remember may have changed.
        self._close_batches()
        events += self.batcher.preempt(ran, judging)

    def _fail(self, error: Exception, events: list[Event]) -> None:
        """End the rows of a step that failed; raises its error where that happens again and again."""
        self.failures += 1
        if self.failures >= MAX_FAILURES:
            raise error
        logger.error("a step failed; its %d rows end here", len(self.running), exc_info=error)
        events += [Failed(request.id, "the step failed") for request in self.running]
        self.batcher.rows, self.batches = [], []

    def _note_step(self, batches: Sequence[tuple[Batch, ModelRunner]], seconds: float) -> None:
        """Note that the step of these rows went well, and take its time into the average."""
        rows = sum(len(batch.requests) for batch, _ in batches)
        if not rows:
            return
        self.failures = 0
        self.batcher.made_step()
        each = seconds / rows
        self.step_seconds = each if self.step_seconds == 0.0 else 0.95 * self.step_seconds + 0.05 * each

    def _judged(self, requests: Sequence[Request]) -> list[tuple[dict[str, float], bool]]:
        """Judge what rows have written so far, as `judgements` does."""
        texts = [text_so_far(request, self.model.facts.end_ids, self._text).text for request in requests]
        return judgements(texts, requests, self.model, self.reader)

    def _text(self, request: Request, response: Sequence[int], more: bool = False) -> str:
        """Decode the text of a response; more: tokens may still follow."""
        decode = partial(continuation, self.decode, request.prompt_ids)
        return certain(decode, response, self.vocabulary) if more else decode(response)
