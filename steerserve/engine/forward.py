"""What a row keeps of each forward that it makes."""

from dataclasses import dataclass

from steerserve.engine.resolved import Resolved


@dataclass
class Forward:
    """What became of one forward of a row."""

    step: int
    committed: int
    """Response tokens that were committed before it."""
    under: tuple[Resolved, ...] = ()
    """The interventions that held at it."""
    commits: int = 0
    """Tokens that it committed."""
    kl: float = 0.0
    """Nats that these are, by the full distributions, from the unsteered row's; summed."""
