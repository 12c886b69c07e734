"""The rows of one step whose forward pass runs elsewhere: what is asked of the workers, and what they told."""

import hashlib
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from steerserve.engine.forward.batch import Batch
from steerserve.engine.forward.gains import hold_to_budgets
from steerserve.engine.forward.packing import Packed
from steerserve.engine.forward.states import projections
from steerserve.engine.request.request import Request
from steerserve.engine.sampling.sampler import Draw
from steerserve.engine.vllm.reply import Reply, joined, unpack
from steerserve.engine.vllm.task import MEASURES, READ, PushTask, RowTask, to_parameters
from steerserve.engine.vllm.workers import Workers
from steerserve.models import ModelFacts
from steerserve.saes import SparseAutoencoder
from steerserve.steering.push import Push


class FarPlan(Packed):
    """The plan of a batch whose sites are in other processes: only what was read there is kept here."""

    def __init__(self, width: int) -> None:
        super().__init__([], [], width, torch.device("cpu"), torch.float32)
        self.values: dict[int, float] = {}
        self.rows: dict[int, int] = {}
        """Row of each push, by its `id()`."""
        self.gains: dict[int, float] = {}
        """Gain of each push at the step that is made, by its `id()`."""
        self.over: dict[int, tuple[int, float, float]] = {}
        self.gone: dict[int, int] = {}

    def readings(self) -> dict[int, float]:
        """See `Packed.readings`."""
        return self.values

    def gain(self, push: Push) -> float:
        """See `Packed.gain`."""
        return self.gains[id(push)]

    def scale(self, push: Push, factor: float) -> None:
        """See `Packed.scale`."""
        self.gains[id(push)] *= factor

    def refused(self) -> dict[int, tuple[int, float, float]]:
        """See `Packed.refused`."""
        return self.over

    def lost(self) -> dict[int, int]:
        """See `Packed.lost`."""
        return self.gone

    def projections(self, push: Push) -> Tensor:
        """See `Packed.projections`."""
        states = self.captured[push.layer][self.rows[id(push)]]
        return projections(states, push.direction.expand_as(states))


class VllmBatch(Batch):
    """A `Batch` whose forwards are made by vLLM's workers; it also holds what they told of the last one (`Seen`)."""

    def __init__(self, requests: Sequence[Request], facts: ModelFacts, workers: Workers, known: set[str]) -> None:
        """known: digests of the directions that the workers keep; kept up to date."""
        super().__init__(requests, facts, torch.device("cpu"), torch.float32)
        self.plan = self.far = FarPlan(self.canvas.shape[1])
        self.workers, self.known = workers, known
        self.vectors: dict[str, Tensor] = {}
        """Directions by digest."""
        self.digests = {
            id(push): self._digest(push.direction)
            for request in requests
            for push in [*request.pushes, *([request.uptake.push] if request.uptake else [])]
        }
        self.replies: list[Reply] = []
        """Of each row."""
        self.readers: list[Reply] = []
        """That by which each row is read: its own, or the one of its twin without pushes."""
        self.place = torch.zeros(self.canvas.shape, dtype=torch.int64)
        """Index [R, W] of each candidate among those of the last step."""

    def ask(self, row: Tensor, position: Tensor) -> None:
        """Make the forward pass, with candidates at (row [N], canvas position [N])."""
        for request in self.requests:
            request.begin()
        tasks = self.tasks(row, position)
        needed = set[str]().union(*(task.directions() for task in tasks))
        new, forget = needed - self.known, sorted(self.known - needed)
        rows = []
        for one, task in zip(self.rows, tasks, strict=True):
            sent = {digest: self.vectors[digest] for digest in task.directions() & new}
            rows.append((one.canvas, to_parameters(task, sent, forget)))
        data = self.workers.run(rows)
        self.known.clear()
        self.known.update(needed)
        replies = [unpack(one, task) for one, task in zip(data, tasks, strict=True)]
        self.replies = replies[: len(self.requests)]
        self.readers = [replies[reader] for reader in self.reader.tolist()]
        told = joined(self.replies)
        if not (torch.equal(told[0], row) and torch.equal(told[1], position)):
            raise RuntimeError("the workers drew candidates for other positions than they were asked for")
        self.place[row, position] = torch.arange(len(row))
        self._note_pushes(tasks[: len(self.requests)])
        self._note_states(tasks, replies)

    def tasks(self, row: Tensor, position: Tensor) -> list[RowTask]:
        """What is asked of the workers at this step, row by row, those of the twins behind the others."""
        self.far.gains = {id(push): _gain(push, one.progress) for one in self.requests for push in one.pushes}
        hold_to_budgets(self.requests, self.far)
        own = [self._task(i, row, position) for i in range(len(self.requests))]
        twins = [replace(own[i], pushes=(), alternatives=0) for i in self.unsteered.tolist()]
        return [*(self._without_readings(i, task) for i, task in enumerate(own)), *twins]

    def draw(self, row: Tensor, position: Tensor) -> Draw:
        """See `Seen.draw`."""
        index = self.place[row, position]
        measures = torch.cat([reply.measures for reply in self.replies])[index]
        return Draw(
            token=torch.cat([reply.token for reply in self.replies])[index],
            probability=torch.cat([reply.probability for reply in self.replies])[index],
            measures=dict(zip(self._needs(), measures.unbind(1), strict=True)),
        )

    def alternatives(self, row: Tensor, position: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """See `Seen.alternatives`; rows that asked for fewer have the least likely of theirs repeated."""
        index = self.place[row, position]
        tokens = torch.cat([_widened(reply.tokens, count) for reply in self.replies])
        logprobs = torch.cat([_widened(reply.logprobs, count) for reply in self.replies])
        return tokens[index], logprobs[index]

    def divergence(self, row: Tensor, position: Tensor) -> list[float]:  # noqa: ARG002
        """See `Seen.divergence`: rows that ask for it are not admitted."""
        return [0.0] * len(self.requests)

    def top_features(self, sae: SparseAutoencoder, row: Tensor, position: Tensor) -> Tensor:
        """See `Batch.top_features`."""
        mine = [reply.features for reply, r in zip(self.readers, self.requests, strict=True) if r.stability is sae]
        width = mine[0].shape[1]
        found = [
            reply.features[:, :width] if r.stability is sae else reply.position.new_zeros(len(reply.position), width)
            for reply, r in zip(self.readers, self.requests, strict=True)
        ]
        return torch.cat(found)[self.place[row, position]]

    def projections(self, layer: int, directions: Tensor, row: Tensor, position: Tensor) -> Tensor:  # noqa: ARG002
        """See `Batch.projections`; each row's direction is known to the workers."""
        found = []
        for reply, request in zip(self.readers, self.requests, strict=True):
            mine = request.uptake is not None and request.uptake.push.layer == layer
            found.append(reply.uptake.float() if mine else torch.zeros(len(reply.position)))
        return torch.cat(found)[self.place[row, position]]

    def _needs(self) -> list[str]:
        return sorted(self.needs & MEASURES)

    def _digest(self, direction: Tensor) -> str:
        wide = direction.detach().cpu().float().contiguous()
        digest = hashlib.sha256(wide.numpy().tobytes()).hexdigest()
        self.vectors[digest] = wide
        return digest

    def _task(self, index: int, row: Tensor, position: Tensor) -> RowTask:
        request = self.requests[index]
        params = request.params
        only = tuple(position[row == index].tolist()) if request.chooses_blindly else None
        uptake = request.uptake
        layers = tuple(sorted(self._traced(request).union(*(one.layers for one in request.gauges.values()))))
        return RowTask(
            response=(request.start, request.stop),
            open=(0, 0) if request.over else request.block_span,
            only=only,
            noise=(params.seed, params.row, request.step),
            temperature=0.0 if request.takes_likeliest else float(params.temperature or 0.0),
            top_p=1.0 if params.top_p is None else params.top_p,
            top_k=params.top_k or 0,
            no_eos=request.barred_ends,
            ends_last=params.ends_last,
            needs=tuple(self._needs()),
            alternatives=min(params.top_logprobs, self.facts.vocab_size) if params.logprobs else 0,
            compare=None if request.stability is None else request.stability.facts.id,
            uptake=None if uptake is None else (uptake.push.layer, self.digests[id(uptake.push)]),
            pushes=tuple(self._push(push, request) for push in request.pushes),
            layers=layers,
            span=(max(0, request.start - self.facts.shift), request.stop) if layers else (0, 0),
        )

    def _without_readings(self, index: int, task: RowTask) -> RowTask:
        """A row's task, less what is read by its twin."""
        if int(self.reader[index]) == index:
            return task
        layers = tuple(sorted(self._traced(self.requests[index])))
        return replace(task, compare=None, uptake=None, layers=layers, span=task.span if layers else (0, 0))

    @staticmethod
    def _traced(request: Request) -> frozenset[int]:
        """The layers at which a trace reads a row position by position at this step."""
        trace = request.params.trace
        if trace is None or not trace.positions or request.step % trace.every:
            return frozenset()
        return frozenset(one.push.layer for one in request.readouts)

    def _push(self, push: Push, request: Request) -> PushTask:
        trace = request.params.trace
        # To read a feature costs an encoding, a projection next to nothing.
        idle = push.reads_latent and trace is not None and request.step % trace.every != 0
        return PushTask(
            layer=push.layer,
            direction=self.digests[id(push)],
            op=push.op,
            strength=push.strength,
            gain=self.far.gains[id(push)],
            scope=push.scope,
            sae=push.sae.facts.id if isinstance(push.sae, SparseAutoencoder) and not idle else None,
            feature=push.feature,
            bound=None if push.bound is None else (push.bound.ratio, push.bound.refuse),
        )

    def _note_pushes(self, tasks: Sequence[RowTask]) -> None:
        """Add what each push did to what it has done so far, for the receipt."""
        self.far.values = {}
        told_over = [(i, reply.refused.tolist()) for i, reply in enumerate(self.replies)]
        told_lost = [(i, int(reply.lost)) for i, reply in enumerate(self.replies)]
        self.far.gone = {i: layer for i, layer in told_lost if layer >= 0}
        self.far.over = {i: (int(layer), size, most) for i, (layer, size, most) in told_over if layer >= 0}
        for request, task, reply in zip(self.requests, tasks, self.replies, strict=True):
            for push, told, sums, value in zip(
                request.pushes, task.pushes, reply.applied.tolist(), reply.readings.tolist(), strict=True
            ):
                positions, steps, ratio_sum, ratio_max, clipped, missed = sums
                push.applied.missed += int(missed)
                push.applied.clipped += int(clipped)
                push.applied.positions += int(positions)
                push.applied.steps += int(steps)
                push.applied.ratio_sum += ratio_sum
                push.applied.ratio_max = max(push.applied.ratio_max, ratio_max)
                push.applied.gains.append(told.gain)
                if push.op == READ:
                    self.far.values[id(push)] = value

    def _note_states(self, tasks: Sequence[RowTask], replies: Sequence[Reply]) -> None:
        """Put the states that were told where a forward pass in this process would have left them."""
        self.far.captured = {}
        self.far.rows = {id(push): i for i, request in enumerate(self.requests) for push in request.pushes}
        shape = (len(self.rows), self.canvas.shape[1], self.facts.hidden_size)
        for i, (task, reply) in enumerate(zip(tasks, replies, strict=True)):
            for layer, states in zip(task.layers, reply.states, strict=True):
                kept = self.far.captured.setdefault(layer, torch.zeros(shape))
                kept[i, slice(*task.span)] = states.float()


def _gain(push: Push, progress: float) -> float:
    """What a push's table, and whatever governs it, say at a progress."""
    gain = push.gain_at(progress)
    return float(gain if push.dial is None else push.dial.turn(gain))


def _widened(table: Tensor, count: int) -> Tensor:
    """table [N, K] with its last column repeated, or zeros where it has none, to be [N, count]."""
    if table.shape[1] == 0:
        return table.new_zeros(len(table), count)
    return torch.cat([table, table[:, -1:].expand(-1, count - table.shape[1])], dim=1)
