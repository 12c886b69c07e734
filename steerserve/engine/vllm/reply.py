"""What comes back of one row: one tensor, so that no more than candidates and sums cross the process border."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from steerserve.engine.vllm.task import RowTask

SUMS = 6
"""Numbers told of each push: positions, steps, sum and largest of |delta| / |h|, positions at which it was clipped, and
at which it was missed."""
REFUSED = 3
"""Numbers told of a row over a bound that refuses: layer, |delta| / |h|, the bound; a layer of -1 where it is not."""


@dataclass(frozen=True)
class Reply:
    """Answer of a worker: N candidates and the pushes of one row."""

    position: Tensor
    """[N] int64, of the canvas."""
    token: Tensor
    """[N] int64."""
    probability: Tensor
    """[N] float64."""
    measures: Tensor
    """[N, needs] float64."""
    uptake: Tensor
    """[N] float64: projections; [0] where none are asked for."""
    features: Tensor
    """[N, K] int64: top features; K is 0 where none are asked for."""
    tokens: Tensor
    """[N, alternatives] int64, likeliest first."""
    logprobs: Tensor
    """[N, alternatives] float64."""
    applied: Tensor
    """[pushes, SUMS] float64."""
    refused: Tensor
    """[REFUSED] float64."""
    lost: Tensor
    """[1] float64: the layer of a push that the forward did not come by, -1 where there is none."""
    readings: Tensor
    """[pushes] float64: mean projection over the scope, of the pushes that read."""
    states: Tensor
    """[layers, span, hidden_size] float64: those asked for, as they arrive."""


def pack(reply: Reply) -> Tensor:
    """One float64 tensor; token ids and positions are whole numbers far below 2^53."""
    columns = [
        reply.position[:, None],
        reply.token[:, None],
        reply.probability[:, None],
        reply.measures,
        reply.uptake[:, None] if len(reply.uptake) == len(reply.position) else reply.measures[:, :0],
        reply.tokens,
        reply.logprobs,
        reply.features,
    ]
    table = torch.cat([column.double() for column in columns], dim=1)
    head = torch.tensor([len(table), table.shape[1]], dtype=torch.float64, device=table.device)
    rest = [reply.refused, reply.lost, reply.applied.flatten(), reply.readings, table.flatten(), reply.states.flatten()]
    return torch.cat([head, *(one.to(table.device).double() for one in rest)])


def unpack(data: Tensor, task: RowTask) -> Reply:
    """The reply to a task that `pack` made."""
    count, width = (int(n) for n in data[:2].tolist())
    pushes, at = len(task.pushes), 2
    parts: list[Tensor] = []
    for size in (REFUSED, 1, pushes * SUMS, pushes, count * width):
        parts.append(data[at : at + size])
        at += size
    refused, lost, applied, readings, table = parts
    places = task.span[1] - task.span[0]
    width_of_state = len(data[at:]) // (len(task.layers) * places) if task.layers and places else 0
    sizes = [1, 1, 1, len(task.needs), 1 if task.uptake else 0, task.alternatives, task.alternatives]
    position, token, probability, measures, uptake, tokens, logprobs, features = torch.split(
        table.reshape(count, width), [*sizes, width - sum(sizes)], dim=1
    )
    return Reply(
        position=position[:, 0].long(),
        token=token[:, 0].long(),
        probability=probability[:, 0],
        measures=measures,
        uptake=uptake.flatten(),
        features=features.long(),
        tokens=tokens.long(),
        logprobs=logprobs,
        applied=applied.reshape(pushes, SUMS),
        refused=refused,
        lost=lost,
        readings=readings,
        states=data[at:].reshape(len(task.layers), places if task.layers else 0, width_of_state),
    )


def joined(replies: Sequence[Reply]) -> tuple[Tensor, Tensor]:
    """Row [N] and canvas position [N] of every candidate, row after row."""
    counts = torch.tensor([len(reply.position) for reply in replies])
    row = torch.repeat_interleave(torch.arange(len(replies)), counts)
    return row, torch.cat([reply.position for reply in replies])
