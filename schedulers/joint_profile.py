"""The joint profile: sensitivity and cost of pushing several attributes together over denoising."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from schedulers.choice import number, shown
from schedulers.profile import coverage

SINGULAR = 1e-9
"""Smallest eigenvalue that a slice's cost may have, scaled to a diagonal of ones."""


@dataclass(frozen=True)
class JointProfile:
    """Sensitivities and cost matrices of A attributes on K equal slices of progress.

    Source: ours; with one attribute they are the s and c of arXiv 2605.10971, theorem 1. All values are finite and
    every cost matrix is symmetric and positive definite; raises ValueError naming the field otherwise.
    """

    names: tuple[str, ...]
    """[A] of the attributes, no two alike."""
    sensitivity: tuple[tuple[float, ...], ...]
    """[A][K] change of each attribute's own final log-odds by a unit push of it within each slice."""
    cost: tuple[tuple[tuple[float, ...], ...], ...]
    """[K][A][A] KL in nats is a^T C a / 2 for pushes of strengths a [A] within each slice: C is the Fisher inner
    product of the pushes."""

    def __post_init__(self) -> None:
        names = tuple(_list("names", self.names))
        if not names or not all(isinstance(n, str) and n for n in names) or len(set(names)) < len(names):
            raise ValueError(f"names must be a list of different names, 1 or more, not {shown(self.names)}")
        sensitivity = tuple(
            _row(f"sensitivity[{a}]", row) for a, row in enumerate(_list("sensitivity", self.sensitivity))
        )
        if len(sensitivity) != len(names):
            raise ValueError(f"sensitivity must have a row for each of the {len(names)} names, not {len(sensitivity)}")
        slices = len(sensitivity[0])
        if not slices or any(len(row) != slices for row in sensitivity):
            raise ValueError(
                f"sensitivity must have rows of one length, not {sorted({len(row) for row in sensitivity})}"
            )
        cost = tuple(
            tuple(_row(f"cost[{t}][{a}]", row) for a, row in enumerate(_list(f"cost[{t}]", matrix)))
            for t, matrix in enumerate(_list("cost", self.cost))
        )
        if len(cost) != slices:
            raise ValueError(f"cost must have a matrix for each of the {slices} slices, not {len(cost)}")
        for t, matrix in enumerate(cost):
            if [len(row) for row in matrix] != [len(names)] * len(names):
                raise ValueError(f"cost[{t}] must be {len(names)} by {len(names)}, as there are names")
        object.__setattr__(self, "names", names)
        object.__setattr__(self, "sensitivity", sensitivity)
        object.__setattr__(self, "cost", cost)
        check_cost(torch.tensor(cost, dtype=torch.float64))

    @property
    def slices(self) -> int:
        """K."""
        return len(self.cost)

    def sensitivity_on(self, slices: int) -> Tensor:
        """The sensitivities [A, slices] float64 as their means over each of `slices` equal slices."""
        return torch.tensor(self.sensitivity, dtype=torch.float64) @ coverage(slices, self.slices).T

    def cost_on(self, slices: int) -> Tensor:
        """The cost matrices [slices, A, A] float64 as their means over each of `slices` equal slices."""
        return torch.einsum("tk,kab->tab", coverage(slices, self.slices), torch.tensor(self.cost, dtype=torch.float64))

    def of(self, names: Sequence[str]) -> "JointProfile":
        """The same for some of the attributes, in the order named; raises ValueError for names it does not have."""
        unknown = [shown(name) for name in names if name not in self.names]
        if unknown:
            raise ValueError(f"the joint profile lacks {', '.join(unknown)}; it has {', '.join(self.names)}")
        at = [self.names.index(name) for name in names]
        return JointProfile(
            tuple(names),
            tuple(self.sensitivity[a] for a in at),
            tuple(tuple(tuple(matrix[a][b] for b in at) for a in at) for matrix in self.cost),
        )

    def to_json(self) -> dict[str, Any]:
        """A dict of JSON values; `from_json` gives back an equal profile."""
        return {
            "names": list(self.names),
            "sensitivity": [list(row) for row in self.sensitivity],
            "cost": [[list(row) for row in matrix] for matrix in self.cost],
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "JointProfile":
        """The profile of `to_json`'s dict; raises ValueError for unknown keys, missing ones and bad values."""
        if not isinstance(data, Mapping):
            raise ValueError(f"a joint profile must be an object, not {shown(data)}")
        known = [field.name for field in fields(cls)]
        unknown = sorted(shown(key) for key in data if key not in known)
        if unknown:
            raise ValueError(f"joint profile has unknown keys {', '.join(unknown)}; allowed: {', '.join(known)}")
        missing = [name for name in known if name not in data]
        if missing:
            raise ValueError(f"joint profile lacks {' and '.join(missing)}")
        return cls(**data)


def check_cost(cost: Tensor) -> None:
    """Raise ValueError where one of the matrices [K, A, A] is no cost: not symmetric, or not positive definite."""
    diagonal = cost.diagonal(dim1=1, dim2=2)
    if not bool((diagonal > 0).all()):
        t, a = (diagonal <= 0).nonzero()[0].tolist()
        raise ValueError(f"cost[{t}][{a}][{a}] must be positive, not {float(diagonal[t, a]):g}; give zeros a floor")
    # Scaled, so that attributes whose strengths are in different units are judged alike.
    scale = diagonal.rsqrt()
    scaled = cost * scale[:, :, None] * scale[:, None, :]
    if not bool(((scaled - scaled.mT).abs() <= SINGULAR).all()):
        t = int((scaled - scaled.mT).abs().amax((1, 2)).argmax())
        raise ValueError(f"cost[{t}] must be symmetric")
    smallest = torch.linalg.eigvalsh(scaled)[:, 0]
    if not bool((smallest >= SINGULAR).all()):
        raise ValueError(
            f"cost[{int(smallest.argmin())}] must be positive definite: some of the attributes push the same way "
            f"there; leave one out, or add to the diagonal"
        )


def _row(name: str, values: object) -> tuple[float, ...]:
    return tuple(number(f"{name}[{index}]", value) for index, value in enumerate(_list(name, values)))


def _list(name: str, values: object) -> Sequence[Any]:
    if not isinstance(values, Sequence) or isinstance(values, str):
        raise ValueError(f"{name} must be a list, not {shown(values)}")
    return values
