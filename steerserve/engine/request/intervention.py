"""The resolved interventions and readings of a row."""

from dataclasses import dataclass, field
from typing import Any

from steerserve.engine.request.controllers import InterventionController
from steerserve.engine.request.kl_budget import InterventionCost
from steerserve.steering.push import Push


@dataclass(frozen=True)
class AttributeReadout:
    """A reading at one layer: an attribute's projection or a feature's activation."""

    name: str
    """The attribute, or the feature as `sae:index`."""
    push: Push
    unit: float
    """By which readings are divided: of an attribute the mean norm of the hidden state there, of a feature 1."""


@dataclass(frozen=True)
class ActiveIntervention:
    """One intervention, resolved: its pushes, and what the plan and the receipt say of it."""

    summary: dict[str, Any]
    pushes: tuple[Push, ...]
    controller: InterventionController | None = None
    """What decides about it while the row runs; None where its schedule alone does."""
    cost: InterventionCost | None = None
    """Its calibrated cost; None where none holds for it."""
    mandatory: bool = False
    """True if it is not the caller's own."""


@dataclass
class Forward:
    """What became of one forward of a row."""

    step: int
    committed: int
    """Response tokens that were committed before it."""
    under: tuple[ActiveIntervention, ...] = ()
    """The interventions that held at it."""
    commits: int = 0
    """Tokens that it committed."""
    kl: float | None = 0.0
    """Nats that these are, by the full distributions, from the unsteered row's; summed. None where the row pushed and
    that was not measured."""
    tries: int = 1
    """Forward passes that it took: more than one where smaller pushes had to be tried for the limit on KL."""
    factor: float = 1.0
    """By how much the limit on KL multiplied the gains of the row's own pushes."""
    tried: tuple[float, float] | None = None
    """The last such factor above 0 that was tried, and the nats that it came to; None where nothing was pushed."""
    rate: float = 0.0
    """Nats that each token is predicted to cost which it commits; 0 without a limit on them."""
    cut: bool = False
    """True if the limit on predicted KL lowered its gains."""
    lowered: list[ActiveIntervention] = field(default_factory=list)
    """Those of the row's own interventions that pushed at it and that a limit on KL made smaller."""
