"""The rows of one forward as tensors: rebuilt when a row joins or leaves, updated in place by each step."""

from collections.abc import Sequence
from dataclasses import replace
from typing import TypeVar

import torch
from torch import Tensor

from schedulers import Random
from steerserve.engine import noise
from steerserve.engine.forward.gains import hold_to_budgets
from steerserve.engine.forward.monitor import Watch
from steerserve.engine.forward.packing import TILE, Packed, step_of_width
from steerserve.engine.forward.progress import now
from steerserve.engine.forward.states import TOP_FEATURES, projections, state_scopes, top_features
from steerserve.engine.request.request import Request
from steerserve.models import DiffusionLM, ModelFacts
from steerserve.saes import SparseAutoencoder
from steerserve.steering.push import Applied

Choice = TypeVar("Choice")


class Batch:
    """R rows on a canvas of width W: the longest row, or a little more."""

    def __init__(
        self, requests: Sequence[Request], facts: ModelFacts, device: torch.device, dtype: torch.dtype
    ) -> None:
        self.requests, self.facts = list(requests), facts
        longest, step = max(len(request.canvas) for request in requests), step_of_width(device, dtype)
        width = min(max(TILE, -(-longest // step) * step), facts.max_length)
        canvas = torch.tensor([request.canvas + [facts.eos_id] * (width - len(request.canvas)) for request in requests])
        self.canvas = canvas.to(device)
        """[R, W] int64."""
        position = torch.arange(width)
        length, start, stop = self._column([(len(r.canvas), r.start, r.stop) for r in requests]).unbind(1)
        inside = position < length[:, None]
        response = (position >= start[:, None]) & (position < stop[:, None])
        self.inside, self.response = inside.to(device), response.to(device)
        self.reach = self._within([r.reach for r in requests])
        """The positions [R, W] bool that are being written: the response, or the stretch of a round."""
        self.prompt = (position < start[:, None]).to(device)
        self.position = position.to(device)
        self.seed, self.sample = self._column([(r.params.seed, r.params.row) for r in requests]).to(device).unbind(1)
        self.temperature = torch.tensor([r.params.temperature for r in requests], device=device)
        self.top_p = torch.tensor([r.params.top_p for r in requests], device=device)
        self.top_k = torch.tensor([r.params.top_k or 0 for r in requests], device=device)
        self.no_eos = torch.tensor([r.barred_ends for r in requests], device=device)
        self.ends_last = torch.tensor([r.params.ends_last for r in requests], device=device)
        self.guidance = torch.tensor([r.params.cfg_scale for r in requests], device=device)
        guided = [i for i, r in enumerate(requests) if r.guided]
        self.guided = torch.tensor(guided, dtype=torch.int64, device=device)
        """Rows [G] that are guided: each has a twin without the prompt, behind the R rows of the forward."""
        self.twin = torch.zeros(len(requests), dtype=torch.int64, device=device)
        """Row of the forward [R] of a guided row's twin."""
        self.twin[self.guided] = len(requests) + torch.arange(len(guided), device=device)
        self.start = start.to(device)
        self.blind = torch.tensor([r.chooses_blindly for r in requests], device=device)
        """Rows [R] bool whose positions can be chosen before anything is drawn."""
        captures = frozenset(r.stability.facts.layer for r in requests if r.stability is not None)
        captures |= frozenset(r.uptake.push.layer for r in requests if r.uptake is not None)
        self.watch = Watch(self.requests, device)
        captures |= self.watch.layers
        # A twin is pushed as its row is: guidance is towards the prompt alone, and no receipt counts it.
        twins = [[replace(push, applied=Applied()) for push in requests[i].pushes if push.op != "read"] for i in guided]
        measured = [i for i, r in enumerate(requests) if r.measured]
        self.measured = torch.tensor(measured, dtype=torch.int64, device=device)
        """Rows [M] beside which a twin without their own pushes runs, behind those that are guided."""
        self.shadow = torch.zeros(len(requests), dtype=torch.int64, device=device)
        """Row of the forward [R] of a measured row's twin; 0 for the others."""
        self.shadow[self.measured] = len(requests) + len(guided) + torch.arange(len(measured), device=device)
        twins += [[replace(push, applied=Applied()) for push in requests[i].imposed] for i in measured]
        bare = [i for i, r in enumerate(requests) if r.bare]
        self.unsteered = torch.tensor(measured + bare, dtype=torch.int64, device=device)
        """Rows [U] of the twins behind the guided ones: first those to measure by, then those without any push, which
        are there to be read."""
        first = len(requests) + len(guided) + len(measured)
        apart = {i: first + n for n, i in enumerate(bare)}
        shared = {i: first - len(measured) + n for n, i in enumerate(measured) if requests[i].read_apart}
        self.reader = torch.tensor([(shared | apart).get(i, i) for i in range(len(requests))], device=device)
        """Row of the forward [R] that each row is read by: itself, or the twin without pushes."""
        twins += [[] for _ in bare]
        self.rows = [*requests, *(requests[i] for i in guided + measured + bare)]
        """Of each row of the forward [R + G + U], the request it stands for."""
        lengths = [len(r.canvas) for r in self.rows]
        self.plan = Packed([*(r.pushes for r in requests), *twins], lengths, width, device, dtype, captures)
        self.orders = self._members([r.order for r in requests])
        """Every order of the batch, and its rows [R] bool."""
        self.transfers = self._members([r.transfer for r in requests])
        self.orderless = torch.tensor([isinstance(r.order, Random) for r in requests], device=device)
        self.now = now(requests, device)
        """Where the rows stand, as of the last `look`."""
        self.saes: dict[SparseAutoencoder, Tensor] = {}
        """Rows [R] bool that compare features of each SAE between steps."""
        for r in requests:
            if r.stability is not None and r.stability not in self.saes:
                self.saes[r.stability] = torch.tensor(
                    [other.stability is r.stability for other in requests], device=device
                )
        self.found: list[tuple[Tensor, Tensor, Tensor]] = []
        """Top features [N, K] at (row [N], canvas position [N]) of this step, which `remember` has yet to keep."""
        if self.saes:
            self.features = torch.full((len(requests), width, TOP_FEATURES), -1, dtype=torch.int64, device=device)
            for i, r in enumerate(requests):
                if r.features is not None:
                    self.features[i, : len(r.canvas)] = r.features

    def begin_round(self, row: int, first: int, last: int) -> None:
        """Take note of the canvas positions [first, last) that a row begins to write anew."""
        self.reach[row] = self._within([(first, last)])[0]
        self.watch.rearm(row)

    def look(self) -> None:
        """Take note of how far the rows have come: before a step, and whenever some of them went on."""
        self.now = now(self.requests, self.canvas.device)

    def members(self, rows: Sequence[bool]) -> Tensor:
        """Rows of the batch as a tensor [R] bool."""
        return torch.tensor(rows, device=self.canvas.device)

    def _members(self, chosen: Sequence[Choice]) -> list[tuple[Choice, Tensor]]:
        return [(one, self.members([other == one for other in chosen])) for one in dict.fromkeys(chosen)]

    def _within(self, spans: Sequence[tuple[int, int]]) -> Tensor:
        """Canvas positions [S, W] bool within each of S spans."""
        first, last = self._column(spans).to(self.canvas.device)[:, :, None].unbind(1)
        position = torch.arange(self.canvas.shape[1], device=self.canvas.device)
        return (position >= first) & (position < last)

    @staticmethod
    def _column(rows: Sequence[tuple[int, ...]]) -> Tensor:
        return torch.tensor(rows, dtype=torch.int64)

    def open(self) -> tuple[Tensor, Tensor]:
        """The positions that may commit at this step, as (row [N], canvas position [N])."""
        masked = (self.canvas == self.facts.mask_id) & self.response
        last = torch.where(self.now.alone, self.now.first + 1, self.now.last)
        row, position = (masked & (self.position < last[:, None])).nonzero().unbind(1)
        return row, position

    def held(self) -> tuple[Tensor, Tensor]:
        """The committed positions of the current blocks, as (row [N], canvas position [N])."""
        inside = (self.position >= self.now.first[:, None]) & (self.position < self.now.last[:, None])
        row, position = (inside & (self.canvas != self.facts.mask_id)).nonzero().unbind(1)
        return row, position

    def forward(
        self, model: DiffusionLM, candidates: tuple[Tensor, Tensor] | None = None, again: bool = False
    ) -> Tensor:
        """Final states [R + G + U, W, hidden_size] of this step, steered; where candidates, (row [N], canvas position
        [N]), are given, those of the states that decide them, and of others or 0. again: whether the step was made
        before, of which nothing then counts, and some of its gains have been lowered since."""
        scopes, canvas, sigma, progress = self.scopes(), self.canvas, self._sigma(), self.now.progress
        asked = None if candidates is None else self._asked(*candidates)
        if len(self.guided):
            given = self.inside[self.guided] & ~self.response[self.guided]
            canvas = torch.cat([canvas, canvas[self.guided].masked_fill(given, self.facts.mask_id)])
            scopes = torch.cat([scopes, scopes[self.guided]])
            progress = torch.cat([progress, progress[self.guided.cpu()]])
            sigma = None if sigma is None else torch.cat([sigma, sigma[self.guided]])
        if len(self.unsteered):
            canvas = torch.cat([canvas, self.canvas[self.unsteered]])
            scopes = torch.cat([scopes, scopes[self.unsteered]])
            progress = torch.cat([progress, progress[self.unsteered.cpu()]])
            sigma = None if sigma is None else torch.cat([sigma, sigma[self.unsteered]])
        if again:
            self.plan.rewind()
            self.found = []
        else:
            self.plan.set_step(progress, scopes)
            for request in self.requests:
                # Before the forward, for the budgets to be held by: see `Request.forget_attempt`.
                request.begin()
            hold_to_budgets(self.requests, self.plan)
        return self.plan.forward(model, canvas, sigma, asked)

    def count(self) -> None:
        """Count the forward that was made, once what it led to is settled: until then it may have to be made again."""
        for request in self.requests:
            request.forwards += 1
        self.settle()

    def write(self, row: Tensor, position: Tensor, token: Tensor) -> None:
        """Put token [N] at (row [N], canvas position [N])."""
        self.canvas[row, position] = token

    def mask(self, places: Sequence[tuple[int, int]]) -> None:
        """Mask places, each a row and a canvas position, again."""
        if not places:
            return
        row, position = torch.tensor(places, device=self.canvas.device).unbind(1)
        self.canvas[row, position] = self.facts.mask_id
        if self.saes:
            # What an order remembers of a position is of the last time it was masked, not of the last step.
            self.features[row, position] = -1

    def remember(self) -> None:
        """Keep the features found at this step for the next one."""
        for row, position, ids in self.found:
            self.features[row, position, : ids.shape[1]] = ids
        self.found = []

    def scopes(self) -> Tensor:
        """The states [R, 5, W] bool that each named scope holds at this step."""
        masked = (self.canvas == self.facts.mask_id) & self.response
        return state_scopes(self.inside, self.prompt, self.response, masked, self.facts.shift)

    def _asked(self, row: Tensor, position: Tensor) -> Tensor | None:
        """The states [R + G + U, W] bool that decide these candidates; None where counting them costs more than is
        saved: on a device that would have to be waited for."""
        if self.canvas.device.type != "cpu":
            return None
        asked = torch.zeros_like(self.inside)
        asked[row, self.state(position)] = True
        return torch.cat([asked, asked[self.guided], asked[self.unsteered]])

    def state(self, position: Tensor) -> Tensor:
        """Where the states [N] stand that decide canvas positions [N]."""
        return (position - self.facts.shift).clamp(min=0)

    @property
    def needs(self) -> frozenset[str]:
        """What the orders and transfers of its rows need to know of candidates."""
        return frozenset[str]().union(*(r.order.needs | r.transfer.needs for r in self.requests))

    def top_features(self, sae: SparseAutoencoder, row: Tensor, position: Tensor) -> Tensor:
        """Top features [N, K] of the states that decide the candidates at (row [N], canvas position [N]), without the
        rows' pushes."""
        states = self.plan.captured[sae.facts.layer][self.reader[row], self.state(position)]
        return top_features(sae, states.float())

    def projections(self, layer: int, directions: Tensor, row: Tensor, position: Tensor) -> Tensor:
        """<h, v> [N] of these states at a layer, without the rows' pushes, v being directions [R, hidden_size] of each
        row."""
        return projections(self.plan.captured[layer][self.reader[row], self.state(position)], directions[row])

    def times(self) -> Tensor:
        """Time t [R] float64, 1 at the start and 0 at the end: the transfer's own, else the masked share."""
        found = self.now.share
        for transfer, mine in self.transfers:
            own = transfer.time(self.now.block_step, self.now.block_steps)
            if own is not None:
                found = torch.where(mine, own, found)
        return found

    def _sigma(self) -> Tensor | None:
        """Noise level [R] of this step, of a model that is told it."""
        return None if self.facts.sigma is None else self.facts.sigma.total(self.times().float())

    def keys(self, row: Tensor, position: Tensor, stream: int) -> Tensor:
        """Noise keys [N] of canvas positions; the noise counts positions from the start of the response."""
        counters = (self.seed[row], self.sample[row], self.now.step[row], position - self.start[row])
        return noise.keys(*counters, stream)

    def lost(self) -> dict[int, int]:
        """The rows of the forward whose pushes it did not come by: see `SteeringPlan.lost`."""
        return self.plan.lost()

    def settle(self) -> None:
        """See `SteeringPlan.settle`."""
        self.plan.settle()

    def forget(self) -> None:
        """See `SteeringPlan.forget`."""
        self.plan.forget()

    def flush(self) -> None:
        """Bring what the pushes of the rows did up to date."""
        self.plan.flush()

    def close(self) -> None:
        """Hand what outlives the batch back to its requests."""
        self.flush()
        if self.saes:
            for i, request in enumerate(self.requests):
                request.features = self.features[i, : len(request.canvas)].clone()
