"""The torch engine: step-level batching of denoising rows in this process."""

import logging
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import torch
from tokenizers import Tokenizer
from torch import Tensor

from steerserve.config import EngineConfig
from steerserve.engine.admission.admit import admit
from steerserve.engine.admission.catalogue import Catalogue
from steerserve.engine.api.events import Done, Event, Failed, Steered
from steerserve.engine.api.params import GenerationParams
from steerserve.engine.api.text import certain, continuation, vocabulary
from steerserve.engine.batching.memory import Costs, MemoryLimits, footprint, free_bytes
from steerserve.engine.batching.queue import Queue
from steerserve.engine.feedback.limits import account, end
from steerserve.engine.feedback.react import react, read
from steerserve.engine.feedback.refine import refine
from steerserve.engine.feedback.unapplied import missed, unapplied
from steerserve.engine.forward.batch import Batch
from steerserve.engine.forward.cached_batch import CachedBatch
from steerserve.engine.forward.gains import lowers
from steerserve.engine.outputs.result import result, settled, unwritten, writing
from steerserve.engine.outputs.trace import note, readings
from steerserve.engine.outputs.verdicts import judge, judgements, reader
from steerserve.engine.prompt_scoring import Scoring
from steerserve.engine.request.request import Request
from steerserve.engine.sampling.commit import commit, commits, cut_behind_end, revisions, stepped, take_back
from steerserve.engine.sampling.predictions import Seen, States, note_alternatives
from steerserve.engine.sampling.sampler import Draw
from steerserve.engine.sampling.selection import choose, choose_blindly, skip_idle
from steerserve.errors import QueueFullError, RequestError
from steerserve.models import DiffusionLM

logger = logging.getLogger(__name__)
MAX_FAILURES = 3
"""Failing steps in a row after which the engine gives up: by then it is not one batch's fault."""
STEPS_A_ROW = 64
"""Steps that fit into memory for each row more after some that did not."""


class TorchEngine:
    """See `steerserve.engine.api.base.Engine`."""

    def __init__(self, model: DiffusionLM, tokenizer: Tokenizer, catalogue: Catalogue, config: EngineConfig) -> None:
        self.model, self.tokenizer, self.catalogue, self.config = model, tokenizer, catalogue, config
        self.reader = reader(tokenizer, catalogue)
        """What finished texts are read with to be judged."""
        self.vocabulary = vocabulary(tokenizer)
        parameter = next(model.parameters())
        self.device, self.dtype = parameter.device, parameter.dtype
        self.waiting = Queue(model.facts)
        free = free_bytes(model, self.device) if config.max_batch_bytes is None else config.max_batch_bytes
        self.limits = MemoryLimits(config.max_rows, config.max_batch_tokens, free, Costs.of(model))
        self.rows: list[Request] = []
        """The rows that run."""
        self.batches: list[Batch] = []
        """Them as tensors, those with a cache apart; none until the next step makes them."""
        self.room: float = config.max_rows
        """Rows of one forward: half after one that did not fit into memory, then one more every few steps that do."""
        self.aborted: set[str] = set()
        self.steered: list[Steered] = []
        """Changes of steering since the last step, which have yet to be told."""
        self.shortened = False
        """Whether a canvas lost positions in the last step, so that the batch has to be made anew."""
        self.steps = 0
        """Steps made so far, the clock of the queue."""
        self.failures = 0
        """Steps in a row that failed."""
        self.scoring = Scoring(catalogue, self._admit)
        """The rows that have written what they will, and whose prompts have yet to be scored."""
        self.step_seconds = 0.0
        """Moving average of the time of one step of one row."""

    @property
    def running(self) -> list[Request]:
        """The rows of the next forward, as far as they are chosen."""
        return [request for request in self.rows if not request.finished]

    @property
    def unfinished(self) -> list[Request]:
        """The rows that run and those that wait."""
        return [*self.running, *iter(self.waiting)]

    def decode(self, ids: Sequence[int]) -> str:
        """Text of token ids, special tokens left out."""
        text: str = self.tokenizer.decode(list(ids), skip_special_tokens=True)
        return text

    def admit(self, params: GenerationParams) -> Request:
        """See `Engine.admit`; safe from any thread."""
        request = self._admit(params)
        self.scoring.check(request)
        self.limits.check(footprint(request, self.model.facts))
        return request

    def add(self, requests: list[Request]) -> None:
        """See `Engine.add`."""
        if len(requests) > self.config.max_queue:
            raise RequestError(f"{len(requests)} rows, but the queue holds {self.config.max_queue} at most", "n")
        held = len(self.waiting) + len(self.scoring)
        if len(requests) > self.config.max_queue - held:
            raise QueueFullError(
                f"the queue holds {held} of {self.config.max_queue} rows: no room for {len(requests)}",
                self.retry_after(),
            )
        self.waiting.add([one for one in requests if one.writes], self.steps)
        for request in requests:
            if not request.writes:
                self.scoring.add(request, unwritten(request))

    def retry_after(self) -> float:
        """Seconds until half of what waits will have run, at the measured rate; at least one."""
        return max(1.0, self.step_seconds * sum(request.steps_left for request in self.unfinished) / 2)

    def abort(self, request_id: str) -> None:
        """See `Engine.abort`."""
        self.aborted.add(request_id)

    @torch.inference_mode()
    def steer(self, request_id: str, request: Request) -> int | None:
        """See `Engine.steer`."""
        for mine in self.unfinished:
            if mine.id == request_id and request_id not in self.aborted:
                for batch in self.batches:
                    batch.close()
                # Closed once: a row that has to wait has by then set aside what it was handed.
                self.batches = []
                mine.steer(request)
                self.steered.append(Steered(mine.id, mine.step, tuple(mine.plan["interventions"])))
                return mine.step
        return None

    def close(self) -> None:
        """See `Engine.close`."""
        self.waiting.clear()
        self.scoring.clear()
        self.rows, self.batches = [], []

    @torch.inference_mode()
    def step(self) -> list[Event]:
        """See `Engine.step`. A step that fails ends the rows it ran, not the engine, unless the next ones fail too."""
        events: list[Event] = []
        try:
            if not self._try_step(events):
                # Only now: what a step holds is held by its exception too.
                self._make_room(events)
        except Exception:
            self.failures += 1
            if self.failures >= MAX_FAILURES:
                raise
            logger.exception("a step failed; its %d rows end here", len(self.running))
            events += [Failed(request.id, "the step failed") for request in self.running]
            self.rows, self.batches = [], []
        if self.scoring:
            kept = sum(footprint(request, self.model.facts).kept for request in self.running)
            events += self.scoring.step(self.model, self.limits, kept)
        return events

    def _admit(self, params: GenerationParams) -> Request:
        return admit(params, self.catalogue, self.tokenizer, self.config)

    def _try_step(self, events: list[Event]) -> bool:
        """Whether the step fit into memory; what was done of it is added to `events` in any case."""
        try:
            self._choose_rows(events)
            if self.rows:
                self.steps += 1
                self.batches = self.batches or self._batches()
                for batch in self.batches:
                    self._denoise(batch, events)
                self.failures = 0
                self.room = min(self.room + 1 / STEPS_A_ROW, self.config.max_rows)
        except (torch.OutOfMemoryError, MemoryError):
            return False
        return True

    def _batches(self) -> list[Batch]:
        """The rows as tensors: those that make everything anew at each step, and those that keep a cache."""
        kinds: list[tuple[type[Batch], list[Request]]] = [
            (Batch, [request for request in self.rows if request.cache is None]),
            (CachedBatch, [request for request in self.rows if request.cache is not None]),
        ]
        return [kind(rows, self.model.facts, self.device, self.dtype) for kind, rows in kinds if rows]

    def _make_room(self, events: list[Event]) -> None:
        """After a step that did not fit into memory: half of its rows wait for the others; a row that does not fit
        alone ends here."""
        ran, drafted = len(self.running), any(request.drafted for request in self.running)
        for batch in self.batches:
            batch.forget()
            # Of a row that has ended only the telling did not fit, of one with a draft only the judging.
            self._collect(batch, events)
            # Only now: what a row that goes on is to remember may have changed.
            batch.close()
        rows = self.running
        for request in rows:
            request.forget_attempt()
        if ran == 1 and rows and not drafted:
            logger.error("row %s does not fit into memory by itself", rows[0].id)
            events.append(Failed(rows[0].id, "out of memory"))
        elif rows:
            self.room = max(1, ran // 2)
            logger.warning("%d rows did not fit into memory: %d at a time now", ran, self.room)
            self.waiting.put_back(rows)
        # Last: rows that could not be put back are still there to end with the step.
        self.rows, self.batches = [], []

    def _denoise(self, batch: Batch, events: list[Event]) -> None:
        """Forward with steering, sample, order, commit, emit: what is done is added to `events` at once, so that it has
        been told whatever fails after it."""
        began = time.perf_counter()
        if skip_idle(batch, events):
            # Their blocks' last steps went by without a forward; one that the other rows make would count as theirs.
            self._collect(batch, events)
            return
        row, position = batch.open()
        worth = choose_blindly(batch, row, position)
        row, position = row[worth], position[worth]
        seen, drawn, chosen = self._attempt(batch, row, position)
        row, position, token = row[chosen], position[chosen], drawn.token[chosen]
        note_alternatives(batch, seen, row, position)
        lost = batch.lost()
        traces, values, refused = readings(batch), read(batch), batch.plan.refused()
        taken = revisions(batch, batch.requests)
        found = commits(batch, row, position, token, drawn.probability[chosen])
        batch.mask(taken)
        batch.write(row, position, token)
        batch.remember()
        # Up to here memory may run out, and the step is made again as if it had not been begun.
        batch.count()
        events += stepped(batch.requests)
        events += note(batch.requests, traces)
        events += take_back(batch.requests, taken)
        events += commit(batch.requests, found)
        again = react(batch, values, events)
        for request in batch.requests:
            self.shortened |= cut_behind_end(request, batch.facts.end_ids)
            request.advance()
        account(batch.requests, batch.rows, refused, events)
        end(batch.requests, unapplied(batch.rows, lost), events)
        batch.mask(again)
        self._collect(batch, events)
        cost = (time.perf_counter() - began) / len(batch.requests)
        self.step_seconds = cost if self.step_seconds == 0.0 else 0.95 * self.step_seconds + 0.05 * cost

    def _choose_rows(self, events: list[Event]) -> None:
        """Drop aborted rows, let waiting ones join while there is room, and rebuild the batch if anything changed."""
        aborted, self.aborted = self.aborted, set()
        steered, self.steered = self.steered, []
        events += steered
        gone = [request for request in self.unfinished if request.id in aborted]
        events += [Failed(request.id, "aborted", aborted=True) for request in gone]
        events += self.scoring.drop(aborted)
        for request in gone:
            request.finished = True
        if gone:
            self.waiting.drop(aborted)
        staying, limits = self.running, replace(self.limits, rows=self.room)
        if steered:
            staying = self.waiting.give_way(staying, limits, {event.request_id for event in steered})
        joining = self.waiting.take(staying, limits)
        shortened, self.shortened = self.shortened, False
        changed = bool(joining or steered or shortened or len(staying) < len(self.rows))
        self.rows = staying + joining
        if changed:
            for batch in self.batches:
                batch.close()
            self.batches = []

    def _attempt(self, batch: Batch, row: Tensor, position: Tensor) -> tuple[Seen, Draw, Tensor]:
        """Make the forward pass, draw candidates at (row [N], position [N]) and choose those that commit [N] bool; all
        of it again, with smaller pushes of a row, where that would put it over its limit on KL. The other rows come out
        of it the same: their forward is the same one."""
        seen = self._see(batch, row, position)
        while True:
            drawn = seen.draw(row, position)
            chosen = choose(batch, row, position, drawn)
            if not lowers(batch.requests, seen.divergence(row[chosen], position[chosen]), batch.plan):
                return seen, drawn, chosen
            seen = self._see(batch, row, position, again=True)

    def _see(self, batch: Batch, row: Tensor, position: Tensor, again: bool = False) -> Seen:
        """Make the forward pass of the batch, of which the candidates at (row [N], position [N]) will be asked for;
        again: see `Batch.forward`."""
        return States(batch, self.model, row, position, again)

    def _collect(self, batch: Batch, events: list[Event]) -> None:
        """Finish the rows whose text is settled: no mask or no step left, or an EOS or stop string in the prefix."""
        ends = self.model.facts.end_ids
        refine(batch, self._judged, ends, self._text, events)
        done = [request for request in batch.requests if not request.finished and settled(request, ends, self._text)]
        if done:
            batch.flush()
            end(done, missed(done), events)
            done = [request for request in done if not request.finished]
        results = [result(request, ends, self.catalogue, self._text) for request in done]
        judge(results, done, self.catalogue, self.model, self.reader)
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
            self.rows, self.batches = [], []
            self.room = self.room if self.waiting else self.config.max_rows

    def _judged(self, requests: Sequence[Request]) -> list[tuple[dict[str, float], bool]]:
        """See `judgements`; of what rows have written so far."""
        texts = [writing(request, self.model.facts.end_ids, self._text).text for request in requests]
        return judgements(texts, requests, self.catalogue, self.model, self.reader)

    def _text(self, request: Request, response: Sequence[int], more: bool = False) -> str:
        """See `steerserve.engine.outputs.result.Text`."""
        decode = partial(continuation, self.decode, request.prompt_ids)
        return certain(decode, response, self.vocabulary) if more else decode(response)
