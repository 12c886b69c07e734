"""The commitment profile: when an attribute forms during denoising, and what scheduling can gain from it."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from schedulers.choice import integer, number, shown


@dataclass(frozen=True)
class CommitmentProfile:
    """The mean feature curve h(p) of unsteered, classifier-confident samples, on K equal slices of progress.

    Source: arXiv 2605.10971, block fractions of the commitment dynamics; sensitivity and cost are the s and c of its
    efficiency theorem. All values are finite; raises ValueError naming the field otherwise.
    """

    curve: tuple[float, ...]
    """[K + 1] h at progress i / K."""
    standard_error: tuple[float, ...] | None = None
    """[K + 1] of the curve, over samples; None where it was not measured."""
    samples: int = 1
    """How many samples the curve is the mean of."""
    sensitivity: tuple[float, ...] | None = None
    """[K] s: change of the final log-odds by a unit push within each slice; None where it was not measured."""
    cost: tuple[float, ...] | None = None
    """[K] c > 0: KL in nats is c a^2 / 2 for a push of strength a within each slice; None where it was not measured."""
    sensitivity_error: tuple[float, ...] | None = None
    """[K] standard error of the sensitivity; None where it was not measured."""
    cost_error: tuple[float, ...] | None = None
    """[K] standard error of the cost; None where it was not measured."""

    def __post_init__(self) -> None:
        curve = _values("curve", self.curve)
        if len(curve) < 2:
            raise ValueError(f"curve must have at least 2 values (K slices have K + 1 borders), not {len(curve)}")
        object.__setattr__(self, "curve", curve)
        slices = len(curve) - 1
        object.__setattr__(self, "samples", integer("samples", self.samples, 1))
        for name, length, low in (
            ("standard_error", slices + 1, 0.0),
            ("sensitivity", slices, -math.inf),
            ("cost", slices, 0.0),
            ("sensitivity_error", slices, 0.0),
            ("cost_error", slices, 0.0),
        ):
            if getattr(self, name) is None:
                continue
            values = _values(name, getattr(self, name), low)
            if len(values) != length:
                raise ValueError(f"{name} must have {length} values for a curve of {slices} slices, not {len(values)}")
            object.__setattr__(self, name, values)
        if self.cost is not None and 0.0 in self.cost:
            raise ValueError(f"cost must be positive: it is 0 in slice {self.cost.index(0.0)}; give zeros a floor")
        if self.sensitivity is not None and math.fsum(self.sensitivity) == 0:
            raise ValueError("sensitivity must not sum to 0: a uniform push would do nothing")

    @property
    def slices(self) -> int:
        """K."""
        return len(self.curve) - 1

    @property
    def forms(self) -> bool:
        """Tell if the curve rises anywhere: without a rise every fraction falls back to 1 / blocks."""
        return bool(self.rises(self.slices).any())

    def rises(self, blocks: int) -> Tensor:
        """max(0, h(e_b) - h(s_b)) [blocks] float64, h being linear between the borders of its own slices."""
        # In units of 1 / (K * blocks) every border is an integer: none falls beside a border of the grid by rounding.
        borders = torch.arange(blocks + 1) * self.slices
        below = (borders // blocks).clamp(max=self.slices - 1)
        curve = torch.tensor(self.curve, dtype=torch.float64)
        at_borders = torch.lerp(curve[below], curve[below + 1], (borders - below * blocks).double() / blocks)
        return at_borders.diff().clamp(min=0)

    def fractions(self, blocks: int) -> Tensor:
        """Block fractions f_b = max(0, h(e_b) - h(s_b)) / sum [blocks] float64; uniform where nothing rises.

        Source: arXiv 2605.10971; the clamp keeps a falling stretch from getting negative weight.
        """
        rises = self.rises(blocks)
        total = rises.sum()
        return torch.where(total > 0, rises / total, torch.full_like(rises, 1 / blocks))

    def cost_on(self, slices: int) -> Tensor | None:
        """The cost [slices] float64 as its mean over each of `slices` equal slices; None where it is not known."""
        if self.cost is None:
            return None
        return coverage(slices, self.slices) @ torch.tensor(self.cost, dtype=torch.float64)

    def efficiency(self) -> float:
        """rho over the profile's own K slices, s and c as measured; s is the fractions and c constant where not.

        With neither measured it is sqrt(K sum f^2). On a fine grid the noise of the curve counts as dispersion and
        raises it: smooth the curve, or average more samples, before comparing it between grids.
        """
        fractions = self.fractions(self.slices)
        return rho(
            self.sensitivity if self.sensitivity is not None else fractions.tolist(),
            self.cost if self.cost is not None else [1.0] * self.slices,
        )

    def to_json(self) -> dict[str, Any]:
        """A dict of JSON values; `from_json` gives back an equal profile."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "CommitmentProfile":
        """The profile of `to_json`'s dict; raises ValueError for unknown keys, missing ones and bad values."""
        if not isinstance(data, Mapping):
            raise ValueError(f"a commitment profile must be an object, not {shown(data)}")
        known = [field.name for field in fields(cls)]
        unknown = sorted(shown(key) for key in data if key not in known)
        if unknown:
            raise ValueError(f"commitment profile has unknown keys {', '.join(unknown)}; allowed: {', '.join(known)}")
        missing = [name for name in ("curve", "samples") if name not in data]
        if missing:
            raise ValueError(f"commitment profile lacks {' and '.join(missing)}")
        return cls(**data)


def rho(sensitivity: Sequence[float], cost: Sequence[float]) -> float:
    """Predicted gain of the best schedule over the best uniform push of the same KL; 1 or more.

    rho^2 = (sum c)(sum s^2 / c) / (sum s)^2 = 1 + CV_c^2(s / c), over the slices; it is 1 exactly where s / c is
    constant. Source: arXiv 2605.10971, theorem 1. Raises ValueError where a cost is not positive or the sensitivity
    sums to 0.
    """
    if len(sensitivity) != len(cost) or not cost:
        raise ValueError(f"sensitivity and cost must be of one length, 1 or more, not {len(sensitivity)}, {len(cost)}")
    if min(cost) <= 0:
        raise ValueError(f"cost must be positive in every slice, not {min(cost)}")
    total = math.fsum(sensitivity)
    if total == 0:
        raise ValueError("sensitivity must not sum to 0: a uniform push would do nothing")
    spread = math.fsum(s * s / c for s, c in zip(sensitivity, cost, strict=True))
    # Never below 1 by Cauchy-Schwarz; rounding may say so all the same.
    return math.sqrt(max(1.0, math.fsum(cost) * spread / total**2))


def coverage(slices: int, blocks: int) -> Tensor:
    """Share of each of `slices` equal slices of progress that lies in each of `blocks` equal blocks [slices, blocks].

    Float64; rows sum to 1; `coverage @ values` is the mean over each slice of what is constant within each block.
    """
    # In units of 1 / (slices * blocks) every border is an integer, so that no share is a rounding error.
    slice_starts = torch.arange(slices)[:, None] * blocks
    block_starts = torch.arange(blocks)[None, :] * slices
    ends = torch.minimum(slice_starts + blocks, block_starts + slices)
    return (ends - torch.maximum(slice_starts, block_starts)).clamp(min=0).double() / blocks


def _values(name: str, values: object, low: float = -math.inf) -> tuple[float, ...]:
    if not isinstance(values, Sequence) or isinstance(values, str):
        raise ValueError(f"{name} must be a list of numbers, not {shown(values)}")
    return tuple(number(f"{name}[{index}]", value, low) for index, value in enumerate(values))
