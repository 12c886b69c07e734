"""The runner whose forward passes vLLM's workers make: what is asked of them for each row, and what lasts of it."""

import hashlib
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from steerserve.engine.forward.batch import Batch
from steerserve.engine.request.request import Request
from steerserve.engine.runners.runner import ModelRunner
from steerserve.engine.vllm.predictions import VllmPredictions
from steerserve.engine.vllm.reply import Reply, joined, unpack
from steerserve.engine.vllm.task import MEASURES, PushTask, RowTask, to_parameters
from steerserve.engine.vllm.workers import Workers
from steerserve.models import ModelFacts
from steerserve.saes import SparseAutoencoder
from steerserve.steering.push import Push


class VllmRunner:
    """A `ModelRunner` whose passes are made in other processes."""

    def __init__(self, batch: Batch, workers: Workers, known: set[str]) -> None:
        """known: digests of the directions that the workers keep; kept up to date."""
        self._batch, self._workers, self._known = batch, workers, known
        self.vectors: dict[str, Tensor] = {}
        """Directions by digest."""
        self._digests = {
            id(push): self._digest(push.direction)
            for request in batch.requests
            for push in [*request.pushes, *([request.uptake.push] if request.uptake else [])]
        }
        self._gains: dict[int, float] = {}
        """Gain of each push at the step that is made, by its `id()`."""
        self._last: list[tuple[RowTask, Reply]] = []
        """What was asked of each row in the last pass, and what was told."""

    def begin(self) -> None:
        """Set the gains of a step of the batch as it is."""
        requests = self._batch.requests
        self._gains = {id(push): _gain(push, one.progress) for one in requests for push in one.pushes}

    def gain(self, push: Push) -> float:
        """Return the gain of a push at the step that was begun."""
        return self._gains[id(push)]

    def scale(self, push: Push, factor: float) -> None:
        """Multiply the gain of a push, for this step."""
        self._gains[id(push)] *= factor

    def run(self, row: Tensor, position: Tensor) -> VllmPredictions:
        """Make the forward pass, with candidates at (row [N], canvas position [N])."""
        tasks, count = self.tasks(row, position), len(self._batch.requests)
        needed = set[str]().union(*(task.directions() for task in tasks))
        new, forget = needed - self._known, sorted(self._known - needed)
        rows = []
        for one, task in zip(self._batch.forward_rows.requests, tasks, strict=True):
            sent = {digest: self.vectors[digest] for digest in task.directions() & new}
            rows.append((one.canvas, to_parameters(task, sent, forget)))
        data = self._workers.run(rows)
        self._known.clear()
        self._known.update(needed)
        replies = [unpack(one, task) for one, task in zip(data, tasks, strict=True)]
        told = joined(replies[:count])
        if not (torch.equal(told[0], row) and torch.equal(told[1], position)):
            raise RuntimeError("the workers drew candidates for other positions than they were asked for")
        self._last = list(zip(tasks, replies, strict=True))[:count]
        return VllmPredictions(self._batch, tasks, replies)

    def count(self) -> None:
        """Let the step count: add what each push did to what it has done so far, for the receipt."""
        for request, (task, reply) in zip(self._batch.requests, self._last, strict=True):
            for push, told, sums in zip(request.pushes, task.pushes, reply.applied.tolist(), strict=True):
                positions, steps, ratio_sum, ratio_max, clipped, missed = sums
                push.applied.missed += int(missed)
                push.applied.clipped += int(clipped)
                push.applied.positions += int(positions)
                push.applied.steps += int(steps)
                push.applied.ratio_sum += ratio_sum
                push.applied.ratio_max = max(push.applied.ratio_max, ratio_max)
                push.applied.gains.append(told.gain)

    def flush(self) -> None:
        """Do nothing: every reply says what the pushes did."""

    def close(self) -> None:
        """Do nothing: nothing is kept here."""

    def tasks(self, row: Tensor, position: Tensor) -> list[RowTask]:
        """What is asked of the workers at the step that was begun, row by row, the extra ones behind the others."""
        own = [self._task(i, row, position) for i in range(len(self._batch.requests))]
        extra = [replace(own[one.source], pushes=(), alternatives=0) for one in self._batch.forward_rows.extra]
        return [*(self._without_readings(i, task) for i, task in enumerate(own)), *extra]

    def _digest(self, direction: Tensor) -> str:
        wide = direction.detach().cpu().float().contiguous()
        digest = hashlib.sha256(wide.numpy().tobytes()).hexdigest()
        self.vectors[digest] = wide
        return digest

    def _task(self, index: int, row: Tensor, position: Tensor) -> RowTask:
        request, facts = self._batch.requests[index], self._batch.facts
        params = request.params
        only = tuple(position[row == index].tolist()) if request.chooses_blindly else None
        uptake = request.uptake
        layers = tuple(sorted(_traced(request).union(*(one.layers for one in request.gauges.values()))))
        return RowTask(
            response=(request.start, request.stop),
            open=(0, 0) if request.is_done else request.block_span,
            only=only,
            noise=(params.seed, params.row, request.step),
            temperature=0.0 if request.takes_likeliest else float(params.temperature or 0.0),
            top_p=1.0 if params.top_p is None else params.top_p,
            top_k=params.top_k or 0,
            no_eos=request.barred_ends,
            ends_last=params.ends_last,
            needs=tuple(sorted(self._batch.rules.needs & MEASURES)),
            alternatives=min(params.top_logprobs, facts.vocab_size) if params.logprobs else 0,
            compare=None if request.stability is None else request.stability.facts.id,
            uptake=None if uptake is None else (uptake.push.layer, self._digests[id(uptake.push)]),
            pushes=tuple(self._push(push, request) for push in request.pushes),
            layers=layers,
            span=(max(0, request.start - facts.shift), request.stop) if layers else (0, 0),
        )

    def _without_readings(self, index: int, task: RowTask) -> RowTask:
        """A row's task, less what is read by the extra row beside it."""
        if int(self._batch.forward_rows.reader[index]) == index:
            return task
        layers = tuple(sorted(_traced(self._batch.requests[index])))
        return replace(task, compare=None, uptake=None, layers=layers, span=task.span if layers else (0, 0))

    def _push(self, push: Push, request: Request) -> PushTask:
        trace = request.params.trace
        # To read a feature costs an encoding, a projection next to nothing.
        idle = push.reads_latent and trace is not None and request.step % trace.every != 0
        return PushTask(
            layer=push.layer,
            direction=self._digests[id(push)],
            op=push.op,
            strength=push.strength,
            gain=self._gains[id(push)],
            scope=push.scope,
            sae=push.sae.facts.id if isinstance(push.sae, SparseAutoencoder) and not idle else None,
            feature=push.feature,
            bound=None if push.bound is None else (push.bound.ratio, push.bound.refuse),
        )


def vllm_batches(
    requests: Sequence[Request], facts: ModelFacts, workers: Workers, known: set[str]
) -> list[tuple[Batch, ModelRunner]]:
    """All rows in one batch, whose tensors are on this side's CPU."""
    batch = Batch(requests, facts, torch.device("cpu"), torch.float32)
    return [(batch, VllmRunner(batch, workers, known))]


def _traced(request: Request) -> frozenset[int]:
    """The layers at which a trace reads a row position by position at this step."""
    trace = request.params.trace
    if trace is None or not trace.positions or request.step % trace.every:
        return frozenset()
    return frozenset(one.push.layer for one in request.readouts)


def _gain(push: Push, progress: float) -> float:
    """What a push's table, and whatever governs it, say at a progress."""
    gain = push.gain_at(progress)
    return float(gain if push.override is None else push.override.turn(gain))
