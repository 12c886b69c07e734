"""Forwards that are recorded once for each shape and replayed: a CUDA graph launches all of its kernels at once.

A replay runs no Python, so what a step steers by is not decided while it runs but read from buffers that stay where
they are: for every steered layer the directions and their weights, which hold gain, strength and scope. What cannot be
said that way (see `GraphedLM.forward`) is left to the plain forward, and nothing is ever left unsteered.
"""

from collections import OrderedDict
from collections.abc import Callable
from typing import Final

import torch
from torch import Tensor
from torch.nn import functional as F

from steerserve.engine.forward.graphs.recorded import MOST_PUSHES, GraphShape, RecordedForward, StaticBuffers
from steerserve.errors import SelfTestError
from steerserve.models import DiffusionLM, Sites
from steerserve.models.attention import taken
from steerserve.models.memory import Memory
from steerserve.steering.plan import SteeringPlan
from steerserve.steering.site import Site

KEPT: Final = 128
"""Recorded forwards that are kept, those used last."""

Recorder = Callable[[Callable[[], None]], Callable[[], None]]
"""Takes work on tensors that stay where they are, and gives what does the same work again when called."""


class GraphedLM(DiffusionLM):
    """A model whose small forwards under a `SteeringPlan` are recorded and replayed; else, and elsewhere, itself."""

    def __init__(self, model: DiffusionLM, recorder: Recorder) -> None:
        super().__init__()
        self.model, self.facts, self.defaults = model, model.facts, model.defaults
        weight = next(model.parameters())
        self._recorder, self._places = recorder, StaticBuffers(model.facts, weight.device, weight.dtype)
        self._recorded: OrderedDict[GraphShape, tuple[RecordedForward, Callable[[], None]]] = OrderedDict()
        self._directed: SteeringPlan | None = None
        """The plan whose directions are in the buffers."""
        self.forwards = self.replays = 0
        """Forwards so far, and those of them that were replayed."""

    def forward(
        self,
        tokens: Tensor,
        lengths: Tensor | None = None,
        sites: Sites | None = None,
        sigma: Tensor | None = None,
        at: Tensor | None = None,
    ) -> Tensor:
        """Final hidden states, from a recording where one fits; raises SelfTestError where a new recording does not
        take its steering.

        Replayed where nothing is differentiated and sites are a plan that keeps no layer's output, whose pushes of the
        step are `add`s without a bound, MOST_PUSHES of a row at a layer or fewer, and where a `GraphShape` fits.
        """
        self.forwards += 1
        if torch.is_grad_enabled() or not isinstance(sites, SteeringPlan):
            return self._plain(tokens, lengths, sites, sigma, at)
        able = {layer: site for layer, site in sites.sites.items() if site.adds and site.code.shape[1] <= MOST_PUSHES}
        active = [layer for layer, site in sites.sites.items() if site.active]
        # All that the plan may push at, not what it pushes now: a gain that comes and goes needs no recording of its
        # own. Where it pushes nothing, the states are to the bit those of rows that are never steered.
        rows, width = tokens.shape
        shape = GraphShape.around(rows, width, tuple(able) if active else (), self.facts.max_length)
        if shape is None or sites.captures or not able.keys() >= set(active):
            return self._plain(tokens, lengths, sites, sigma, at)
        work, replay = self._recording(shape)
        work.fill(tokens, lengths, sigma)
        # A replay that steers writes it again.
        work.changed.zero_()
        weights = self._steer(work, sites, shape.layers, width)
        replay()
        self.replays += 1
        for layer, weight in weights.items():
            site = sites.sites[layer]
            site.pushed = weight, work.norms[layer, site.rows, :width]
            site.record(work.changed[layer, site.rows, :width])
        # A copy: the next forward of the same step may be of the same shape.
        return taken(work.hidden[:rows, :width], at).clone()

    def resume(
        self, tokens: Tensor, memory: Memory, lengths: Tensor | None = None, sites: Sites | None = None
    ) -> Tensor:
        """Final hidden states of some positions, which attend to what is kept of the others; never recorded."""
        return self.model.resume(tokens, memory, lengths, sites)

    def head(self, hidden: Tensor) -> Tensor:
        """Logits [..., vocab_size] of hidden states [..., hidden_size]."""
        return self.model.head(hidden)

    def _plain(
        self, tokens: Tensor, lengths: Tensor | None, sites: Sites | None, sigma: Tensor | None, at: Tensor | None
    ) -> Tensor:
        out: Tensor = self.model(tokens, lengths, sites, sigma, at)
        return out

    def _steer(
        self, work: RecordedForward, plan: SteeringPlan, layers: tuple[int, ...], width: int
    ) -> dict[int, Tensor]:
        """Write the steering of the step into the buffers; the weights of the layers that are pushed."""
        sites: dict[int, Site] = {layer: plan.sites[layer] for layer in layers}
        if sites and plan is not self._directed:
            for layer, site in sites.items():
                work.directions[layer].zero_()
                work.directions[layer, site.rows, : site.code.shape[1]] = site.directions
            self._directed = plan
        weights = {layer: site.weights() for layer, site in sites.items() if site.active}
        for layer, site in sites.items():
            work.weights[layer].zero_()
            if site.active:
                work.weights[layer, site.rows, : site.code.shape[1], :width] = weights[layer]
        return weights

    def _recording(self, shape: GraphShape) -> tuple[RecordedForward, Callable[[], None]]:
        """The forward of a shape, recorded now if it is not yet, or no longer."""
        if shape in self._recorded:
            self._recorded.move_to_end(shape)
            return self._recorded[shape]
        work = RecordedForward(self._places, shape, self.model)
        work.clear()
        replay = self._recorder(work.run)
        self._directed = None
        _check(work, replay, shape)
        self._recorded[shape] = work, replay
        if len(self._recorded) > KEPT:
            self._recorded.popitem(last=False)
        return work, replay


def _check(work: RecordedForward, replay: Callable[[], None], shape: GraphShape) -> None:
    """Raise SelfTestError unless a push at each layer of a recorded forward moves the final states of every row."""
    replay()
    plain = work.hidden.clone()
    generator = torch.Generator().manual_seed(0)
    for layer in shape.layers:
        direction = F.normalize(torch.randn(work.directions.shape[3], generator=generator), dim=0)
        work.directions[layer] = direction.to(work.directions)
        # As long as the states themselves: less could be lost to rounding.
        work.weights[layer] = work.norms[layer, :, None].clamp(min=1.0)
        replay()
        work.weights[layer].zero_()
        if not bool((work.hidden != plain).flatten(1).any(1).all()):
            raise SelfTestError(
                f"a push at layer {layer} did not move the states of a forward recorded for {shape.rows} x "
                f"{shape.width} tokens: its steering is not read"
            )
