"""What the workers told of a forward pass, as the engine asks for it."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from steerserve.engine.forward.batch import Batch
from steerserve.engine.forward.states import projections
from steerserve.engine.sampling.sampler import Draw
from steerserve.engine.vllm.reply import Reply, joined
from steerserve.engine.vllm.task import MEASURES, READ, RowTask
from steerserve.saes import SparseAutoencoder
from steerserve.steering.push import Push


class VllmPredictions:
    """Predictions from the replies of the workers."""

    def __init__(self, batch: Batch, tasks: Sequence[RowTask], replies: Sequence[Reply]) -> None:
        """tasks and replies: of each row of the forward [F]."""
        self._batch, self._own = batch, replies[: len(batch.requests)]
        self._readers = [replies[reader] for reader in batch.forward_rows.reader.tolist()]
        """By which each row is read: its own reply, or that of the extra row beside it."""
        self._place = torch.zeros(batch.canvas.shape, dtype=torch.int64)
        """Index [R, W] of each candidate among those of the pass."""
        row, position = joined(self._own)
        self._place[row, position] = torch.arange(len(row))
        captured: dict[int, Tensor] = {}
        shape = (len(replies), batch.canvas.shape[1], batch.facts.hidden_size)
        for i, (task, reply) in enumerate(zip(tasks, replies, strict=True)):
            for layer, states in zip(task.layers, reply.states, strict=True):
                kept = captured.setdefault(layer, torch.zeros(shape))
                kept[i, slice(*task.span)] = states.float()
        self.captured: Mapping[int, Tensor] = captured

    def draw(self, row: Tensor, position: Tensor) -> Draw:
        """Draw a candidate for each position."""
        index = self._place[row, position]
        measures = torch.cat([reply.measures for reply in self._own])[index]
        return Draw(
            token=torch.cat([reply.token for reply in self._own])[index],
            probability=torch.cat([reply.probability for reply in self._own])[index],
            measures=dict(zip(sorted(self._batch.rules.needs & MEASURES), measures.unbind(1), strict=True)),
        )

    def alternatives(self, row: Tensor, position: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """Return the likeliest tokens; rows that asked for fewer have the least likely of theirs repeated."""
        index = self._place[row, position]
        tokens = torch.cat([_widened(reply.tokens, count) for reply in self._own])
        logprobs = torch.cat([_widened(reply.logprobs, count) for reply in self._own])
        return tokens[index], logprobs[index]

    def divergence(self, row: Tensor, position: Tensor) -> list[float]:  # noqa: ARG002
        """Return 0 for every row: those that ask for it are not admitted."""
        return [0.0] * len(self._own)

    def top_features(self, sae: SparseAutoencoder, row: Tensor, position: Tensor) -> Tensor:
        """Return the top features of the states that decide each position."""
        each = list(zip(self._readers, self._batch.requests, strict=True))
        width = next(reply.features.shape[1] for reply, request in each if request.stability is sae)
        found = [
            reply.features[:, :width] if r.stability is sae else reply.position.new_zeros(len(reply.position), width)
            for reply, r in each
        ]
        return torch.cat(found)[self._place[row, position]]

    def projections(self, layer: int, directions: Tensor, row: Tensor, position: Tensor) -> Tensor:  # noqa: ARG002
        """Return the projections that the workers made: they know each row's direction."""
        found = []
        for reply, request in zip(self._readers, self._batch.requests, strict=True):
            mine = request.uptake is not None and request.uptake.push.layer == layer
            found.append(reply.uptake.float() if mine else torch.zeros(len(reply.position)))
        return torch.cat(found)[self._place[row, position]]

    def readings(self) -> dict[int, float]:
        """Return the mean that every `read` push read, by its `id()`."""
        return {
            id(push): value
            for request, reply in zip(self._batch.requests, self._own, strict=True)
            for push, value in zip(request.pushes, reply.readings.tolist(), strict=True)
            if push.op == READ
        }

    def projections_of(self, push: Push) -> Tensor:
        """Return what a `read` push read at each state [W]."""
        row = next(i for i, one in enumerate(self._batch.requests) if any(push is other for other in one.pushes))
        states = self.captured[push.layer][row]
        return projections(states, push.direction.expand_as(states))

    def refused(self) -> dict[int, tuple[int, float, float]]:
        """Return the rows whose pushes went over a bound that refuses."""
        told = [(i, reply.refused.tolist()) for i, reply in enumerate(self._own)]
        return {i: (int(layer), size, most) for i, (layer, size, most) in told if layer >= 0}

    def lost(self) -> dict[int, int]:
        """Return the rows with a push that the forward pass did not come by."""
        told = [(i, int(reply.lost)) for i, reply in enumerate(self._own)]
        return {i: layer for i, layer in told if layer >= 0}


def _widened(table: Tensor, count: int) -> Tensor:
    """table [N, K] with its last column repeated, or zeros where it has none, to be [N, count]."""
    if table.shape[1] == 0:
        return table.new_zeros(len(table), count)
    return torch.cat([table, table[:, -1:].expand(-1, count - table.shape[1])], dim=1)
