"""The compiled steering of one batch: a site for each layer that is pushed or read, and what was applied there."""

from collections.abc import Sequence

import torch
from torch import Tensor

from steerserve.steering.push import Push
from steerserve.steering.site import Site


class SteeringPlan:
    """The sites of a batch; callable as the `Sites` of a model's forward."""

    def __init__(
        self,
        rows: Sequence[Sequence[Push]],
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        captures: frozenset[int] = frozenset(),
    ) -> None:
        """rows: the pushes of each row of the batch; captures: layers whose output is kept as it arrives."""
        layers = sorted({push.layer for row in rows for push in row})
        self.sites: dict[int, Site] = {}
        for layer in layers:
            picked = [(i, [push for push in row if push.layer == layer]) for i, row in enumerate(rows)]
            picked = [(i, pushes) for i, pushes in picked if pushes]
            self.sites[layer] = Site([p for _, p in picked], [i for i, _ in picked], torch.device(device), dtype)
        self.places = {
            id(push): (site, r, p)
            for site in self.sites.values()
            for r, row in enumerate(site.pushes)
            for p, push in enumerate(row)
        }
        """Where each push stands, by its `id()`."""
        self.captures = captures
        self.captured: dict[int, Tensor] = {}

    def set_step(self, progress: Tensor, scopes: Tensor, position: Tensor | None = None) -> None:
        """progress [rows] in [0, 1] on the host; scopes [rows, 5, length] bool in the order of SCOPES; position [rows,
        length]: where on their canvases the states of a forward stand that is not of whole ones."""
        self.captured = {}
        for site in self.sites.values():
            site.set_step(progress, scopes, position)

    def touches(self, layer: int) -> bool:
        """Tell if a layer's output is changed or read at the step that was set."""
        return layer in self.captures or (layer in self.sites and self.sites[layer].active)

    def gain(self, push: Push) -> float:
        """A push's gain at the step that was set."""
        site, row, place = self.places[id(push)]
        return float(site.step_gain[row, place])

    def scale(self, push: Push, factor: float) -> None:
        """Multiply that gain, for this step."""
        site, row, place = self.places[id(push)]
        site.scale(row, place, factor)

    def refused(self) -> dict[int, tuple[int, float, float]]:
        """Rows of the last forward whose pushes went over a bound that refuses: layer, |delta| / |h|, the bound.

        Waits for the device only where there is such a bound."""
        found: dict[int, tuple[int, float, float]] = {}
        for layer, site in self.sites.items():
            if site.bounds is not None and site.bounds.refuses and site.active:
                for index, size, most in site.bounds.refused():
                    found.setdefault(int(site.host_rows[index]), (layer, size, most))
        return found

    def lost(self) -> dict[int, int]:
        """The rows that have a push at the step that was set of which its forward did not come by, with the first such
        layer. Does not wait for the device."""
        found: dict[int, int] = {}
        for layer, site in self.sites.items():
            if site.active and site.pushed is None:
                for row in site.host_rows[(site.step_gain != 0).any(1)].tolist():
                    found.setdefault(row, layer)
        return found

    def clear(self) -> None:
        """Forget what the last forward did: the step that was set is made again."""
        for site in self.sites.values():
            site.clear()

    def count(self) -> None:
        """Let the step that was set count as made, with what its last forward did: what is never counted is as if it
        had not been. Needs no memory."""
        for site in self.sites.values():
            site.count()

    def flush(self) -> None:
        """Bring every push's `applied` up to date with what counts; call it before reading them and before dropping the
        plan."""
        for site in self.sites.values():
            site.flush()

    def readings(self) -> dict[int, float]:
        """What every `read` push read in the last forward, its mean over the push's scope, by the push's `id()`: the
        projection of the states as they arrived, of a feature the activation in the states as they were pushed."""
        return {
            id(push): site.mean_latent(r, p) if push.reads_latent else value
            for site in self.sites.values()
            if site.reads
            for r, (row, values) in enumerate(zip(site.pushes, site.reading.tolist(), strict=True))
            for p, (push, value) in enumerate(zip(row, values, strict=False))
            if push.op == "read"
        }

    def projections(self, push: Push) -> Tensor:
        """What a `read` push of this plan read at each state [length] of the last forward; see `readings`."""
        site, row, place = self.places[id(push)]
        if push.reads_latent:
            return site.latents(row, place)
        assert site.projection is not None
        return site.projection[row, place]

    def __call__(self, layer: int, hidden: Tensor) -> Tensor:
        """Steer and read a layer's output [rows, length, hidden_size]; the same object where nothing is to be done."""
        if layer in self.captures:
            self.captured[layer] = hidden
        site = self.sites.get(layer)
        if site is None or not site.active:
            return hidden
        steered = site.apply(hidden)
        site.record(site.changed(hidden, steered))
        return steered
