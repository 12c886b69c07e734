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
    kl: float | None = 0.0
    """Nats that these are, by the full distributions, from the unsteered row's; summed. None where the row pushed and
    that was not measured."""
    tries: int = 1
    """Forward passes that it took: more than one where smaller pushes had to be tried for the limit on KL."""
    factor: float = 1.0
    """By how much the limit on KL multiplied the gains of the row's own pushes."""
    tried: tuple[float, float] | None = None
    """The last such factor above 0 that was tried, and the nats that it came to; None where nothing was pushed."""
