"""Gauges: what a forward tells of a row's response, as one number a row.

A gauge reads the hidden state as it arrives at a layer, without any push: of the row itself where nothing was pushed
before, else of a row beside it that is never pushed (`Request.read_apart`). What is read at a position is read from the
state that decides its token.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from steerserve.engine.request.readouts import Gauge
from steerserve.saes import SparseAutoencoder
from steerserve.steering.encoders import ENCODED

UNITS_IN_ONE = 2.0**24
"""Readings are added up as whole numbers of this fineness: an integer sum is the same in any order, and so on a canvas
of any width."""
LARGEST = 1e6
"""Activations are cut off here, so that the sum of any canvas fits."""


class Meter:
    """G gauges, each of a row of the batch, read in one go."""

    def __init__(self, gauges: Sequence[tuple[int, Gauge]], device: torch.device) -> None:
        """gauges: each with its row of the batch."""
        self.gauges = [one for _, one in gauges]
        self.rows = torch.tensor([row for row, _ in gauges], dtype=torch.int64, device=device)
        self.scale = torch.tensor([one.scale for one in self.gauges], dtype=torch.float64, device=device)
        self.largest = torch.tensor([one.over == "max" for one in self.gauges], device=device)
        probed = sorted({probe.layer for one in self.gauges for probe in one.probes})
        self.linear = [self._stacked(layer, device) for layer in probed]
        self.wholes = [(g, *one.whole) for g, one in enumerate(self.gauges) if one.whole is not None]

    @property
    def layers(self) -> frozenset[int]:
        """The layers that must be captured."""
        return frozenset[int]().union(*(one.layers for one in self.gauges))

    def read(
        self, captured: Mapping[int, Tensor], response: Tensor, states: Tensor, reader: Tensor | None = None
    ) -> Tensor:
        """The numbers [G] float64, on the device.

        captured: the output of each layer as it arrived [at least R, W, hidden_size]; response [R, W] bool; states [W]:
        where the state stands that decides a position; reader [R]: the row of `captured` that each row is read by;
        None: itself.
        """
        rows = self.rows if reader is None else reader[self.rows]
        values = torch.zeros(len(self.rows), len(states), dtype=torch.float64, device=self.rows.device)
        for layer, index, weight, origin, bias, threshold in self.linear:
            state = captured[layer][rows[index]].float() - origin[:, None]
            for f in range(weight.shape[1]):
                # Multiplied and summed, not contracted: a row must read the same beside any others.
                pre = (state * weight[:, f, None]).sum(2) + bias[:, f, None]
                part = torch.where(pre > threshold[:, f, None], pre, 0.0)
                values = values.index_add(0, index, part.double())
        for g, sae, feature in self.wholes:
            values[g] = _encoded(sae, captured[sae.facts.layer][rows[g : g + 1]][0], feature).double()
        values = values.index_select(1, states).clamp(-LARGEST, LARGEST).nan_to_num()
        inside = response[self.rows]
        whole = (values.masked_fill(~inside, 0.0) * UNITS_IN_ONE).round().long().sum(1)
        mean = whole.double() / UNITS_IN_ONE / inside.sum(1)
        most = values.masked_fill(~inside, -torch.inf).amax(1)
        return torch.where(self.largest, most, mean) / self.scale

    def _stacked(self, layer: int, device: torch.device) -> tuple[int, Tensor, Tensor, Tensor, Tensor, Tensor]:
        """The probes at one layer, padded with numbers that are always 0: whose they are [P], weight
        [P, F, hidden_size], origin [P, hidden_size], bias and threshold [P, F]."""
        found = [(g, probe) for g, one in enumerate(self.gauges) for probe in one.probes if probe.layer == layer]
        width, size = max(len(probe.weight) for _, probe in found), len(found[0][1].origin)
        weight, origin = torch.zeros(len(found), width, size), torch.zeros(len(found), size)
        bias, threshold = torch.zeros(len(found), width), torch.zeros(len(found), width)
        for p, (_, probe) in enumerate(found):
            count = len(probe.weight)
            weight[p, :count], origin[p] = probe.weight, probe.origin
            bias[p, :count], threshold[p, :count] = probe.bias, probe.threshold
        index = torch.tensor([g for g, _ in found], dtype=torch.int64)
        return (
            layer,
            index.to(device),
            weight.to(device),
            origin.to(device),
            bias.to(device),
            threshold.to(device),
        )


def _encoded(sae: SparseAutoencoder, hidden: Tensor, feature: int) -> Tensor:
    """Activation of one feature [W] at states [W, hidden_size], in parts that are always of one size: the last bits of
    a product depend on how many rows it has."""
    parts = []
    for part in torch.split(hidden.float(), ENCODED):
        padded = torch.cat([part, part.new_zeros(ENCODED - len(part), part.shape[1])])
        parts.append(sae.encode(padded)[: len(part), feature])
    return torch.cat(parts)
