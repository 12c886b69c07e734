"""Readouts of a row: one number each from hidden states after a forward, named at admission."""

from dataclasses import dataclass

from torch import Tensor

from steerserve.saes import SparseAutoencoder


@dataclass(frozen=True, eq=False)
class LinearReadout:
    """Numbers read at one layer, `<h - origin, weight_f> + bias_f` for each f, of which the sum is taken."""

    layer: int
    weight: Tensor
    """[F, hidden_size]."""
    origin: Tensor
    """[hidden_size]."""
    bias: Tensor
    """[F]."""
    threshold: Tensor
    """[F]: what is not above it counts as 0; minus infinity keeps all."""


@dataclass(frozen=True, eq=False)
class Readout:
    """The sum of its probes at each position, or a feature of an SAE whose activation needs the whole code."""

    probes: tuple[LinearReadout, ...]
    over: str
    """`mean` or `max`, over the positions of the response."""
    scale: float
    """By which it is divided."""
    whole: tuple[SparseAutoencoder, int] | None = None

    @property
    def layers(self) -> frozenset[int]:
        """The layers it reads."""
        found = frozenset(probe.layer for probe in self.probes)
        return found if self.whole is None else found | {self.whole[0].facts.layer}
