"""The contract of an order: the rule that ranks masked positions for commitment."""

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor


@dataclass(frozen=True, eq=False)
class Candidates:
    """The masked positions that may commit now, one entry each, in (row, position) order; every field [N], float32
    or float64."""

    probability: Tensor | None = None
    """Probability of the candidate token under the model's distribution."""
    margin: Tensor | None = None
    """Probability of the likeliest token minus that of the second."""
    entropy: Tensor | None = None
    """Shannon entropy of the distribution, nats, >= 0."""
    filtered_probability: Tensor | None = None
    """As `probability`, but of the distribution drawn from, after temperature, top-p and top-k."""
    filtered_margin: Tensor | None = None
    filtered_entropy: Tensor | None = None
    uniform: Tensor | None = None
    """A draw from [0, 1); less 1 - h where the transfer gives the position a hazard h, so that it is 0 or more where
    the position's own draw says that it commits."""
    stability: Tensor | None = None
    """`feature_stability` of the position, 0 to 1; 0 at a row's first step."""
    uptake: Tensor | None = None
    """`uptake` of the target attribute at the position, 0 to 1."""

    def require(self, name: str) -> Tensor:
        """The field of that name; raises ValueError where it was not computed."""
        values = getattr(self, name)
        if not isinstance(values, Tensor):
            raise ValueError(f"this order needs the candidates' {name}, which was not computed")
        return values


class Order(Protocol):
    """Gives each candidate a score. A frozen, hashable config."""

    @property
    def needs(self) -> frozenset[str]:
        """Names of the fields of Candidates that `score` reads."""
        ...

    def score(self, candidates: Candidates) -> Tensor:
        """Scores [N]; the higher commits first."""
        ...
