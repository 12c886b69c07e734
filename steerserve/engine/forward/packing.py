"""Rows of unlike lengths in one step: which of them share a forward, and the forwards themselves.

A forward is as wide as the longest of its rows, and what it spends on the padding of the others is lost. Where the rows
of a step differ much in length, several narrower forwards cost less than one wide one.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from steerserve.engine.forward.part_plans import PartPlans
from steerserve.models import DiffusionLM
from steerserve.steering.plan import SteeringPlan
from steerserve.steering.push import Push

TILE: Final = 16
"""Tokens of the narrowest forward: matrix products of fewer rows take other kernels on CPUs, whose last bits differ."""
OVERHEAD: Final = {"cpu": 16, "cuda": 512}
"""What one more forward costs beside its tokens, in tokens, by kind of device: estimates. The bundled model's forwards
on one thread of a CPU cost about 35 tokens beside their own (4 fits over canvases of 16 to 96: 31 to 42)."""


def step_of_width(device: torch.device, dtype: torch.dtype) -> int:
    """What the width of a canvas is rounded up to.

    Float32 matrix products on a CPU give a row the same bits beside any number of others, and functions that go by
    pairs of vectors do where there are whole ones; elsewhere a row is only compared with itself at a multiple of TILE.
    """
    return 4 if device.type == "cpu" and dtype == torch.float32 else TILE


def share(widths: Sequence[int], overhead: int) -> list[list[int]]:
    """The groups of rows that cost the least together, where a group costs its rows times the widest of them, and
    `overhead`; rows of a group in their order, narrow groups first."""
    order = sorted(range(len(widths)), key=lambda row: widths[row])
    ends = [i + 1 for i in range(len(order)) if i + 1 == len(order) or widths[order[i]] < widths[order[i + 1]]]
    # best[i]: least cost of the first i rows by width, and where their last group begins.
    best: dict[int, tuple[int, int]] = {0: (0, 0)}
    for end in ends:
        widest = widths[order[end - 1]]
        best[end] = min((best[first][0] + (end - first) * widest + overhead, first) for first in best)
    groups: list[list[int]] = []
    end = len(order)
    while end:
        first = best[end][1]
        groups.append(sorted(order[first:end]))
        end = first
    return groups[::-1]


def positions(asked: Tensor) -> Tensor | None:
    """Where asked [rows, width] bool is True, and elsewhere to make up a multiple of TILE for every row: [rows, K], no
    position twice; None where that would be all of them."""
    count = -(-max(1, int(asked.sum(1).max())) // TILE) * TILE
    if count >= asked.shape[1]:
        return None
    return asked.sort(dim=1, descending=True, stable=True).indices[:, :count]


@dataclass(frozen=True)
class Part:
    """The rows of one forward."""

    rows: Tensor | None
    """[P] int64, which of the rows they are; None: all of them, in order."""
    width: int
    lengths: Tensor | None
    """[P] int64; None where every row is as long as the forward is wide."""
    plan: SteeringPlan


class PackedForward:
    """F rows on a canvas of width W, split into forwards, and their steering."""

    def __init__(
        self,
        pushes: Sequence[Sequence[Push]],
        lengths: Sequence[int],
        width: int,
        device: torch.device,
        dtype: torch.dtype,
        captures: frozenset[int] = frozenset(),
    ) -> None:
        """pushes and lengths of each row; width: W; captures: layers whose output is kept as it arrives."""
        step = step_of_width(device, dtype)
        widths = [min(max(TILE, -(-length // step) * step), width) for length in lengths]
        self.width = width
        self.parts: list[Part] = []
        plans: dict[tuple[int, ...], SteeringPlan] = {}
        for rows in share(widths, OVERHEAD.get(device.type, OVERHEAD["cuda"])):
            widest, own = max(widths[row] for row in rows), [lengths[row] for row in rows]
            plan = plans[tuple(rows)] = SteeringPlan([pushes[row] for row in rows], device, dtype, captures)
            self.parts.append(
                Part(
                    rows=None if len(rows) == len(lengths) else torch.tensor(rows, device=device),
                    width=widest,
                    lengths=None if min(own) == widest else torch.tensor(own, device=device),
                    plan=plan,
                )
            )
        self.plans = PartPlans(plans, width)
        self.captured: dict[int, Tensor] = {}
        """What the layers of `captures` gave in the last forward, before the push there: [F, W, hidden_size]."""

    def set_step(self, progress: Tensor, scopes: Tensor) -> None:
        """Set the step that the next pass makes: progress [F] on the host and scopes [F, 5, W] bool."""
        for part in self.parts:
            if part.rows is None:
                part.plan.set_step(progress, scopes[:, :, : part.width])
            else:
                part.plan.set_step(progress[part.rows.to(progress.device)], scopes[part.rows, :, : part.width])

    def forward(self, model: DiffusionLM, canvas: Tensor, sigma: Tensor | None, asked: Tensor | None = None) -> Tensor:
        """Final states [F, W, hidden_size] of canvas [F, W], steered by the step that was set; 0 behind the end of a
        row's forward. sigma [F]; asked [F, W] bool: the states that will be read, the others may be 0; None: all."""
        self.plans.clear()
        states = []
        for part in self.parts:
            rows, width = slice(None) if part.rows is None else part.rows, part.width
            own_sigma = None if sigma is None else sigma[rows]
            at = None
            if asked is not None and not part.plan.touches(model.facts.num_layers - 1):
                at = positions(asked[rows, :width])
            found = model(canvas[rows, :width], part.lengths, part.plan, own_sigma, at)
            if at is not None:
                whole = found.new_zeros(len(found), width, found.shape[2])
                found = whole.scatter_(1, at[:, :, None].expand_as(found), found)
            states.append(found)
        layers = list(self.parts[0].plan.captured)
        self.captured = {
            layer: self._whole([part.plan.captured[layer] for part in self.parts], len(canvas)) for layer in layers
        }
        return self._whole(states, len(canvas))

    def _whole(self, states: Sequence[Tensor], count: int) -> Tensor:
        """The parts' states in one tensor [count, W, hidden_size]."""
        if self.parts[0].rows is None and states[0].shape[1] == self.width:
            return states[0]
        whole = states[0].new_zeros(count, self.width, states[0].shape[2])
        for part, own in zip(self.parts, states, strict=True):
            if part.rows is None:
                whole[:, : part.width] = own
            else:
                whole[part.rows, : part.width] = own
        return whole
