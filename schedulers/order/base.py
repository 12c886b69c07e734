"""The contract of an order: the rule that ranks masked positions for commitment."""

from dataclasses import dataclass
from typing import ClassVar, Protocol

from torch import Tensor


@dataclass(frozen=True, eq=False)
class Candidates:
    """The masked positions that may commit now, one entry each, in (row, position) order; every field [N] float32."""

    probability: Tensor | None = None
    """Of the candidate token, under the model's distribution."""
    margin: Tensor | None = None
    """Probability of the likeliest token minus that of the second."""
    entropy: Tensor | None = None
    """Shannon entropy of the distribution, nats, >= 0."""
    uniform: Tensor | None = None
    """A draw from [0, 1)."""
    stability: Tensor | None = None
    """`feature_stability` of the position, 0 to 1; 0 at a row's first step."""

    def require(self, name: str) -> Tensor:
        """The field of that name; raises ValueError where it was not computed."""
        values = getattr(self, name)
        if not isinstance(values, Tensor):
            raise ValueError(f"this order needs the candidates' {name}, which was not computed")
        return values


class Order(Protocol):
    """Gives each candidate a score. A frozen, hashable config."""

    needs: ClassVar[frozenset[str]]
    """Names of the fields of Candidates that `score` reads."""

    def score(self, candidates: Candidates) -> Tensor:
        """Scores [N]; the higher commits first."""
        ...
