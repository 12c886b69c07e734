"""An intervention between its names and its gains: resolved, and not yet scheduled."""

from dataclasses import dataclass, field
from typing import Any

from steerserve.engine.api.params import Choice, Intervention
from steerserve.engine.cost import Price
from steerserve.engine.feedback import Loop
from steerserve.engine.governor import Governor
from steerserve.steering.attribute import Attribute
from steerserve.steering.names import NEUTRAL
from steerserve.steering.push import Push


@dataclass(eq=False)
class Draft:
    """One intervention with its names resolved, before its gains are known."""

    one: Intervention
    param: str
    """Its path among the row's fields."""
    attribute: Attribute | None
    pushes: list[Push]
    """With their strengths in hidden units, or as `Push.strength` says."""
    unit: str
    strength: float
    """In `unit`."""
    size: float
    """The same in the unit that pushes add up in: the attribute's own where `unit` is `kl`."""
    scope: str | tuple[int, int]
    """As asked."""
    schedule: Choice
    own: float | None
    """In the attribute's own unit, at every layer; None where there is no such number."""
    price: Price | None
    unpriced: str | None
    """Why there is no price."""
    control: dict[str, Any] = field(default_factory=dict)
    """What the summary says of a control that was put in its place."""
    picked: dict[int, str] = field(default_factory=dict)
    """By layer, the feature whose direction a control took."""
    loop: Loop | None = None
    governor: Governor | None = None
    """What decides about it while the row runs; None where its schedule alone does."""

    @property
    def neutral(self) -> bool:
        """Whether it changes nothing whatever the gains."""
        return self.strength == NEUTRAL.get(self.one.op)
