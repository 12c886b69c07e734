"""The pushes at one layer as `[rows, pushes, ...]` tensors, padded with pushes that do nothing.

A step only writes gains and scopes into them, so its cost depends on how many pushes a row has and not on how many
different configurations are in the batch.
"""

from collections.abc import Sequence
from typing import Final

import torch
from torch import Tensor
from torch.nn import functional as F

from steerserve.steering.bounds import LARGEST_LATENT, Bounds
from steerserve.steering.encoders import ENCODED
from steerserve.steering.operators import CODES, coefficients, combined
from steerserve.steering.push import SCOPES, Push

TILE: Final = 16
"""Elements that sums of a row are made of."""
SUMS: Final = 6
"""Numbers that are added up of each push."""


class Site:
    """The pushes at one layer, stacked over the rows that have any."""

    def __init__(self, pushes: Sequence[Sequence[Push]], rows: Sequence[int], device: torch.device, dtype: torch.dtype):
        width = max(len(row) for row in pushes)
        size = pushes[0][0].direction.shape[0]
        slices = max(len(push.gains) for row in pushes for push in row)
        shape = (len(pushes), width)
        self.pushes = pushes
        self.host_rows = torch.tensor(rows)
        self.rows = self.host_rows.to(device)
        code = torch.full(shape, CODES["read"], dtype=torch.int64)
        strength, scope = torch.zeros(shape), torch.zeros(shape, dtype=torch.int64)
        span = torch.zeros(*shape, 2, dtype=torch.int64)
        directions = torch.zeros(*shape, size)
        self.gain_table = torch.zeros(*shape, slices)
        self.slices = torch.full(shape, 1, dtype=torch.int64)
        self.within = torch.zeros(2, *shape, dtype=torch.float64)
        for r, row in enumerate(pushes):
            for p, push in enumerate(row):
                code[r, p], strength[r, p], directions[r, p] = CODES[push.op], push.strength, push.direction
                self.gain_table[r, p, : len(push.gains)] = push.gains
                self.slices[r, p] = len(push.gains)
                self.within[:, r, p] = torch.tensor(push.within, dtype=torch.float64)
                if isinstance(push.scope, tuple):
                    scope[r, p], span[r, p] = len(SCOPES), torch.tensor(push.scope)
                else:
                    scope[r, p] = SCOPES[push.scope]
        self.overrides = [
            (r, p, push.override)
            for r, row in enumerate(pushes)
            for p, push in enumerate(row)
            if push.override is not None
        ]
        self.code, self.strength, self.scope, self.span = (t.to(device) for t in (code, strength, scope, span))
        self.directions = directions.to(device, dtype)
        wide = self.directions.double()
        self.products = wide @ wide.mT if width > 1 else None
        """<v, v'> of a row's directions [rows, pushes, pushes]."""
        self.reads = any(push.op == "read" for row in pushes for push in row)
        self.encodes = [(r, p, push) for r, row in enumerate(pushes) for p, push in enumerate(row) if push.by_sae]
        """Pushes that read their row's states by an SAE."""
        self.per_value: Tensor | None = None
        """Hidden units of 1 of what each push reads [rows, pushes]; None: 1 everywhere."""
        if self.encodes:
            per_value = torch.ones(shape)
            for r, p, push in self.encodes:
                per_value[r, p] = push.per_value
            self.per_value = per_value.to(device)
        # Where every push is an `add`, the projection on v is not needed and not computed.
        self.projects = any(push.op != "add" for row in pushes for push in row)
        bounds = [[push.bound for push in row] for row in pushes]
        self.bounds = Bounds(bounds, width, device) if any(any(row) for row in bounds) else None
        latent = [[p < len(row) and row[p].sets_latent for p in range(width)] for row in pushes]
        self.sets_latent = torch.tensor(latent, device=device)[:, :, None] if any(map(any, latent)) else None
        """True for the pushes that set a feature's latent [rows, pushes, 1]; None where none does."""
        self.gain = torch.zeros(shape, device=device)
        self.mask = torch.zeros(*shape, 1, dtype=torch.bool, device=device)
        self.masked = torch.zeros(len(pushes), 1, dtype=torch.bool, device=device)
        """States that decide a masked token [rows, length]."""
        self.reading = torch.zeros(shape, device=device)
        self.projection: Tensor | None = None
        """<h, v> [rows, pushes, length] of the last forward, where something is read."""
        self.keeps = any(push.reads_latent for row in pushes for push in row)
        self.steered: Tensor | None = None
        """The states [rows, length, hidden_size] that the last forward went on with, where a latent is read."""
        self.zeros = torch.zeros(shape, device=device)
        self.sums: tuple[Tensor, ...] = (self.zeros,) * SUMS
        """What the pushes did at the steps that count, until they are flushed: positions, steps, sum and largest of
        |delta| / |h|, positions missed and positions clipped, [rows, pushes] each. On the device, so that a step does
        not wait for them; none of them is ever written into."""
        self.pending: tuple[Tensor, ...] | None = None
        """The same with what the last forward did; None until it has come here."""
        self.clipped = self.zeros
        """Positions at which each push was made smaller in the last forward [rows, pushes]."""
        self.pushed: tuple[Tensor, Tensor] | None = None
        """Weights [rows, pushes, length] of the last forward, and norms [rows, length] of the states that they were
        worked out for; None until it has come here."""
        self.active = False
        self.step_gain = torch.zeros(shape)
        """Gains [rows, pushes] of the step that was set, on the host."""
        self.gains: list[Tensor] = []
        """Those of the steps that count, since the last flush."""

    def set_step(self, progress: Tensor, scopes: Tensor, position: Tensor | None = None) -> None:
        """progress [batch] on the host; scopes [batch, named scopes, length] bool and position [batch, length] on the
        device; None: each canvas whole."""
        self.clear()
        progress = progress[self.host_rows][:, None]
        index = (progress * self.slices).long().clamp(max=self.slices - 1)
        inside = (progress >= self.within[0]) & (progress < self.within[1])
        gain = torch.where(inside, self.gain_table.gather(2, index[:, :, None])[:, :, 0], 0.0)
        for r, p, override in self.overrides:
            gain[r, p] = override.turn(gain[r, p])
        self.step_gain = gain
        self.active = self.reads or bool((gain != 0).any())
        if not self.active:
            return
        self.gain = gain.to(self.code.device)
        named = scopes[self.rows]
        self.masked = named[:, SCOPES["masked"]]
        whole = torch.arange(named.shape[2], device=named.device)
        position = whole if position is None else position[self.rows, None]
        spans = (position >= self.span[:, :, :1]) & (position < self.span[:, :, 1:]) & named[:, :1]
        choice = self.scope.clamp(max=len(SCOPES) - 1)[:, :, None].expand(-1, -1, named.shape[2])
        self.mask = torch.where((self.scope == len(SCOPES))[:, :, None], spans, named.gather(1, choice))

    def scale(self, row: int, push: int, factor: float) -> None:
        """Multiply a push's gain of the step that was set."""
        gain = self.step_gain.clone()
        gain[row, push] *= factor
        self.step_gain, self.gain = gain, gain.to(self.code.device)

    def apply(self, hidden: Tensor) -> Tensor:
        """hidden [batch, length, hidden_size] -> the same, steered; rows without a push are left bit for bit."""
        state = hidden if len(self.rows) == len(hidden) else hidden[self.rows]
        shape = (*self.code.shape, state.shape[1])
        projection = self._project(state.float()) if self.projects else torch.zeros(shape, device=hidden.device)
        if self.reads:
            self.projection = projection
            self.reading = self._mean(projection)
        value = projection
        if self.encodes:
            # Not in place: what is read of the row's directions is told.
            value = projection.clone()
            for r, p, push in self.encodes:
                value[r, p] = _read(push, state[r].float(), self.masked[r])
        weight = coefficients(self.code, self.strength, self.gain, value, self.per_value) * self.mask
        norm = state.float().norm(dim=2)
        smaller = torch.zeros_like(self.mask)
        if self.sets_latent is not None:
            most = LARGEST_LATENT * norm[:, None]
            smaller = self.sets_latent & (weight.abs() > most)
            weight = torch.where(smaller, weight.sign() * most, weight)
        if self.bounds is not None:
            weight, bounded = self.bounds.hold(weight, self.directions, state)
            smaller = smaller | bounded
        if self.sets_latent is not None or self.bounds is not None:
            self.clipped = smaller.sum(2)
        self.pushed = weight, norm
        delta = combined(weight.to(hidden.dtype), self.directions)
        steered = delta.add_(hidden) if state is hidden else hidden.index_add(0, self.rows, delta)
        if self.keeps:
            self.steered = steered if state is hidden else steered[self.rows]
        return steered

    def latents(self, row: int, push: int) -> Tensor:
        """The activation [length] of a feature that is read, in the states with which the last forward went on."""
        assert self.steered is not None
        return _read(self.pushes[row][push], self.steered[row].float(), self.masked[row])

    def mean_latent(self, row: int, push: int) -> float:
        """Mean of these over the reading's scope; 0 over no position."""
        values = torch.zeros(*self.code.shape, self.mask.shape[2], device=self.code.device)
        values[row, push] = self.latents(row, push)
        return float(self._mean(values)[row, push])

    @property
    def adds(self) -> bool:
        """Tell if what it pushes does not depend on the state: its pushes are `add`s without a bound."""
        return not self.projects and self.bounds is None

    def weights(self) -> Tensor:
        """Where it `adds`: the weights [rows, pushes, length] of its directions at the step that was set."""
        return (self.gain * self.strength)[:, :, None] * self.mask

    def _mean(self, values: Tensor) -> Tensor:
        """Means [rows, pushes] of values [rows, pushes, length] over the scope of each push."""
        # Padded: in which order a row is added up depends on its length, but not on tiles of zeros behind it.
        scoped = F.pad(values * self.mask, (0, -values.shape[2] % TILE))
        return scoped.sum(2) / self.mask.sum(2).clamp(min=1)

    def _project(self, state: Tensor) -> Tensor:
        """<h, v> of state [rows, length, hidden_size]: [rows, pushes, length].

        Multiplied and summed rather than contracted, for the reason that `combined` is.
        """
        wide = self.directions.float()
        return torch.stack([(state * wide[:, p, None]).sum(2) for p in range(wide.shape[1])], dim=1)

    def changed(self, before: Tensor, after: Tensor) -> Tensor:
        """Which states [rows, length] are others after it than before it, both [batch, length, hidden_size]."""
        if len(self.rows) != len(before):
            before, after = before[self.rows], after[self.rows]
        return (after != before).any(2)

    def record(self, changed: Tensor) -> None:
        """Note what the last forward pushed, where it has changed the state [rows, length], and what it missed where it
        should have; `count` has yet to be called. v is a unit vector, so |delta| is |weight|."""
        if self.pushed is None:
            return
        weight, norm = self.pushed
        size = weight.abs() * changed[:, None]
        ratio = size / norm.clamp(min=1e-12)[:, None, :]
        touched = (size > 0).sum(2)
        missed = (self._due(weight, norm) & ~changed)[:, None] & (weight != 0)
        positions, steps, ratio_sum, ratio_max, all_missed, clipped = self.sums
        self.pending = (
            positions + touched,
            steps + (touched > 0),
            ratio_sum + ratio.sum(2),
            torch.maximum(ratio_max, ratio.amax(2)),
            all_missed + missed.sum(2),
            clipped if self.clipped is self.zeros else clipped + self.clipped,
        )

    def _due(self, weight: Tensor, norm: Tensor) -> Tensor:
        """Where the sum of a row's pushes is so large that adding it changes the state, however that is rounded [rows,
        length]: one coordinate of it at least is as large a share of the state's as it is of the whole state."""
        size = weight.abs().sum(1)
        whole = size
        if self.products is not None:
            wide = weight.to(self.directions.dtype).double()
            pairs = wide[:, :, None] * wide[:, None] * self.products[..., None]
            whole = pairs.sum((1, 2)).clamp(min=0).sqrt()
        # What is left where pushes nearly cancel each other may be rounding too: hence the sum of their sizes.
        return whole > 2 * torch.finfo(self.directions.dtype).eps * (norm + size)

    def clear(self) -> None:
        """Forget what the last forward did, unless it has been counted."""
        self.pushed = self.pending = None

    def count(self) -> None:
        """Let the step that was set count as made, with what its last forward did. Needs no memory."""
        self.sums, self.pending = self.pending or self.sums, None
        self.gains.append(self.step_gain)

    def flush(self) -> None:
        """Move what counts at this site into its pushes, in one transfer."""
        table = torch.stack(self.sums).tolist()
        gains = torch.stack(self.gains, dim=2).tolist() if self.gains else []
        # Up to here memory may run out.
        for r, row in enumerate(self.pushes):
            for p, push in enumerate(row):
                positions, steps, ratio_sum, ratio_max, missed, clipped = (column[r][p] for column in table)
                push.applied.missed += int(missed)
                push.applied.clipped += int(clipped)
                push.applied.positions += int(positions)
                push.applied.steps += int(steps)
                push.applied.ratio_sum += ratio_sum
                push.applied.ratio_max = max(push.applied.ratio_max, ratio_max)
        for row, table_row in zip(self.pushes, gains, strict=False):
            for push, its in zip(row, table_row, strict=False):
                push.applied.gains += its
        self.sums, self.gains = (self.zeros,) * SUMS, []


def _read(push: Push, states: Tensor, masked: Tensor) -> Tensor:
    """What a push of a feature reads [length] of its row's states [length, hidden_size], masked [length] or not."""
    # In parts: the activations of a long canvas under a wide SAE would be the largest thing in memory.
    parts = zip(torch.split(states, ENCODED), torch.split(masked, ENCODED), strict=True)
    return torch.cat([_read_part(push, part, which) for part, which in parts])


def _read_part(push: Push, states: Tensor, masked: Tensor) -> Tensor:
    assert push.sae is not None and push.feature is not None
    if push.op == "boost":
        code = push.sae.encode(states) if push.pair is None else push.pair.encode(states, masked)
        return code.amax(dim=1)
    if push.op == "clamp":
        return push.sae.latent(states, push.feature, push.strength)
    return push.sae.encode(states)[:, push.feature]
