"""What a row asked for, resolved: its interventions and its readings."""

from dataclasses import dataclass
from typing import Any

from steerserve.engine.cost import Price
from steerserve.engine.governor import Governor
from steerserve.steering.push import Push


@dataclass(frozen=True)
class Readout:
    """What is read at one layer: an attribute's projection or a feature's activation."""

    name: str
    """The attribute, or the feature as `sae:index`."""
    push: Push
    unit: float
    """By which readings are divided: of an attribute the mean norm of the hidden state there, of a feature 1."""


@dataclass(frozen=True)
class Resolved:
    """One intervention, resolved: its pushes, and what the plan and the receipt say of it."""

    summary: dict[str, Any]
    pushes: tuple[Push, ...]
    governor: Governor | None = None
    """What decides about it while the row runs; None where its schedule alone does."""
    price: Price | None = None
    """Its calibrated cost; None where none holds for it."""
    mandatory: bool = False
    """Whether it is not the caller's own."""
