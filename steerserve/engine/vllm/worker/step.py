"""One step in a worker: the rows of vLLM's flat batch, steered at the sites, and what is told of them."""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from steerserve.engine import noise
from steerserve.engine.forward.packing import TILE
from steerserve.engine.forward.states import projections, state_scopes, top_features
from steerserve.engine.sampling.sampler import Settings, alternatives, draw
from steerserve.engine.vllm.reply import SUMS, Reply, pack
from steerserve.engine.vllm.task import READ, PushTask, RowTask
from steerserve.models import DiffusionLM, ModelFacts
from steerserve.saes import SparseAutoencoder
from steerserve.saes.pair import SaePair
from steerserve.steering.bounds import Bound
from steerserve.steering.operators import READS_PAIR
from steerserve.steering.plan import SteeringPlan
from steerserve.steering.push import Push

NOT_REFUSED = (-1.0, 0.0, 0.0)


class WorkerStep:
    """R rows of a step, lying one after the other in a flat batch of T tokens; callable as `Sites` of flat states."""

    def __init__(
        self,
        tasks: Sequence[RowTask],
        starts: Sequence[int],
        tokens: Tensor,
        facts: ModelFacts,
        dtype: torch.dtype,
        directions: Mapping[str, Tensor],
        saes: Mapping[str, SparseAutoencoder],
        pair: Callable[[SparseAutoencoder], SaePair | None],
    ) -> None:
        """starts [R + 1]: where each row begins in tokens [T], and where the last one ends; pair: that of an SAE."""
        self.tasks, self.facts, self.saes = tasks, facts, saes
        device = tokens.device
        self.host_starts = list(starts)
        self.starts = torch.tensor(self.host_starts, device=device)
        lengths = self.starts[1:] - self.starts[:-1]
        row = torch.repeat_interleave(torch.arange(len(tasks), device=device), lengths)
        position = torch.arange(starts[-1], device=device) - self.starts[row]
        self.row, self.position = self._candidates(tokens[: starts[-1]], row, position)
        """Row and canvas position of each candidate [N]."""
        self.state = self.starts[self.row] + (self.position - facts.shift).clamp(min=0)
        """Where the states stand, in the flat batch, that decide the candidates [N]."""
        self.directions = directions
        self.kept: dict[int, Tensor] = {}
        """States of the candidates [N, hidden_size] by layer, as they arrive there."""
        self.keeps = {saes[one.compare].facts.layer for one in tasks if one.compare is not None}
        self.keeps |= {one.uptake[0] for one in tasks if one.uptake is not None}
        self.told: dict[int, dict[int, Tensor]] = {i: {} for i, one in enumerate(tasks) if one.layers}
        """States [span, hidden_size] of rows that ask for them, by row and layer."""
        self.steered = [i for i, one in enumerate(tasks) if one.pushes]
        self.pushes = [[self._push(push, pair) for push in tasks[i].pushes] for i in self.steered]
        self.plan = SteeringPlan(self.pushes, device, dtype)
        if self.steered:
            self._lay_out(tokens, lengths)

    def __call__(self, layer: int, hidden: Tensor) -> Tensor:
        """hidden [T, hidden_size] at a layer's output -> the same, steered; other rows are left bit for bit."""
        if layer in self.keeps:
            self.kept[layer] = hidden[self.state]
        for i, states in self.told.items():
            if layer in self.tasks[i].layers:
                first, last = (self.host_starts[i] + place for place in self.tasks[i].span)
                states[layer] = hidden[first:last].clone()
        site = self.plan.sites.get(layer)
        if site is None or not site.active:
            return hidden
        steered = self.plan(layer, hidden[self.index])
        return hidden.index_copy(0, self.index[self.inside], steered[self.inside])

    def replies(self, model: DiffusionLM, hidden: Tensor) -> list[Tensor]:
        """What is told of each row; hidden [T, hidden_size] is the final states, model has facts and the head."""
        settings, states = self._settings(), hidden[self.state]
        needs = self.tasks[0].needs
        drawn = draw(model, states, settings, frozenset(needs))
        measured = [drawn.measures[name] for name in needs]
        measures = torch.stack(measured, dim=1) if measured else drawn.probability.new_zeros(len(drawn.token), 0)
        most = max(task.alternatives for task in self.tasks)
        likeliest = alternatives(model, states, settings, most) if most else None
        # First: the sums are taken out of the plan, and with them what was due.
        lost = {self.steered[row]: layer for row, layer in self.plan.lost().items()}
        applied, readings = self._sums()
        over = {self.steered[row]: told for row, told in self.plan.refused().items()}
        told = []
        for i, task in enumerate(self.tasks):
            mine = (self.row == i).nonzero()[:, 0]
            none = measures[mine, :0]
            told.append(
                Reply(
                    position=self.position[mine],
                    token=drawn.token[mine],
                    probability=drawn.probability[mine],
                    measures=measures[mine],
                    uptake=self._uptake(task, mine) if task.uptake else none[:, :0].flatten(),
                    features=none if task.compare is None else self._features(self.saes[task.compare], mine),
                    tokens=none if likeliest is None else likeliest[0][mine, : task.alternatives],
                    logprobs=none if likeliest is None else likeliest[1][mine, : task.alternatives],
                    applied=torch.tensor(applied.get(i, []), dtype=torch.float64).reshape(-1, SUMS),
                    lost=torch.tensor([float(lost.get(i, -1))], dtype=torch.float64),
                    refused=torch.tensor(over.get(i, NOT_REFUSED), dtype=torch.float64),
                    readings=torch.tensor(readings.get(i, []), dtype=torch.float64),
                    states=torch.stack([self.told[i][layer] for layer in task.layers]) if task.layers else none,
                )
            )
        return [pack(reply) for reply in told]

    def _candidates(self, tokens: Tensor, row: Tensor, position: Tensor) -> tuple[Tensor, Tensor]:
        """Masked positions that may commit, in order; tokens, row and position [T]."""
        first, last = torch.tensor([task.open for task in self.tasks], device=tokens.device).unbind(1)
        wanted = (tokens == self.facts.mask_id) & (position >= first[row]) & (position < last[row])
        chosen = [(i, task.only) for i, task in enumerate(self.tasks) if task.only is not None]
        if chosen:
            begins = self.host_starts
            allowed = torch.ones_like(wanted)
            for i, only in chosen:
                allowed[begins[i] : begins[i + 1]] = False
                allowed[[begins[i] + p for p in only]] = True
            wanted = wanted & allowed
        index = wanted.nonzero()[:, 0]
        return row[index], position[index]

    def _push(self, task: PushTask, pair: Callable[[SparseAutoencoder], SaePair | None]) -> Push:
        sae = self.saes[task.sae] if task.sae is not None else None
        return Push(
            layer=task.layer,
            direction=self.directions[task.direction],
            op=task.op,
            strength=task.strength,
            gains=torch.tensor([task.gain]),
            scope=task.scope,
            bound=None if task.bound is None else Bound(*task.bound),
            sae=sae,
            feature=task.feature,
            pair=pair(sae) if sae is not None and task.op in READS_PAIR else None,
        )

    def _lay_out(self, tokens: Tensor, lengths: Tensor) -> None:
        """Set where the steered rows stand, padded side by side, and the scopes of their states."""
        device = tokens.device
        chosen = torch.tensor(self.steered, device=device)
        length = lengths[chosen]
        longest = max(self.host_starts[i + 1] - self.host_starts[i] for i in self.steered)
        width = -(-longest // TILE) * TILE
        position = torch.arange(width, device=device)
        self.inside = position < length[:, None]
        """[S, W] bool: what is not padding."""
        self.index = self.starts[chosen][:, None] + torch.minimum(position, length[:, None] - 1)
        """[S, W]: where each position of the steered rows stands in the flat batch."""
        start, stop = torch.tensor([self.tasks[i].response for i in self.steered], device=device)[:, :, None].unbind(1)
        response = (position >= start) & (position < stop)
        masked = (tokens[self.index] == self.facts.mask_id) & response
        scopes = state_scopes(self.inside, position < start, response, masked, self.facts.shift)
        self.plan.set_step(torch.zeros(len(chosen), dtype=torch.float64), scopes)

    def _settings(self) -> Settings:
        tasks, row, device = self.tasks, self.row, self.row.device
        seed, sample, step = torch.tensor([task.noise for task in tasks], device=device).unbind(1)
        start = torch.tensor([task.response[0] for task in tasks], device=device)
        key = noise.keys(seed[row], sample[row], step[row], self.position - start[row], noise.TOKEN)
        temperature = torch.tensor([task.temperature for task in tasks], device=device)[row]
        return Settings(
            temperature=temperature,
            top_p=torch.tensor([task.top_p for task in tasks], device=device)[row],
            top_k=torch.tensor([task.top_k for task in tasks], device=device)[row],
            no_eos=torch.tensor([task.no_eos for task in tasks], device=device)[row],
            ends_last=torch.tensor([task.ends_last for task in tasks], device=device)[row],
            guidance=torch.zeros_like(temperature),
            key=key,
        )

    def _features(self, sae: SparseAutoencoder, mine: Tensor) -> Tensor:
        return top_features(sae, self.kept[sae.facts.layer][mine].float())

    def _uptake(self, task: RowTask, mine: Tensor) -> Tensor:
        assert task.uptake is not None
        layer, digest = task.uptake
        return projections(self.kept[layer][mine], self.directions[digest].to(mine.device))

    def _sums(self) -> tuple[dict[int, list[list[float]]], dict[int, list[float]]]:
        """What each steered row's pushes did, and what its readings read, by row."""
        self.plan.count()
        self.plan.flush()
        values = self.plan.readings()
        applied, readings = {}, {}
        for i, pushes in zip(self.steered, self.pushes, strict=True):
            done = [push.applied for push in pushes]
            applied[i] = [
                [one.positions, one.steps, one.ratio_sum, one.ratio_max, one.clipped, one.missed] for one in done
            ]
            readings[i] = [values[id(push)] if push.op == READ else 0.0 for push in pushes]
        return applied, readings
