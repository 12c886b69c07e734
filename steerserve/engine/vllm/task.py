"""What the workers are asked to do with one row at one step, as it travels in the row's pooling parameters."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Final

import torch
from torch import Tensor

from steerserve.numerics import aligned

TASK, DIRECTIONS, FORGET = "steerserve_row", "steerserve_directions", "steerserve_forget"
"""Keys of the pooling parameters: the task as JSON, directions not sent before, digests no row needs any more."""
READ: Final = "read"
MEASURES: Final = frozenset(
    ("probability", "margin", "entropy", "mass", "filtered_probability", "filtered_margin", "filtered_entropy")
)
"""What of a candidate is measured where it is drawn; the rest of what orders need is found beside it."""


@dataclass(frozen=True)
class PushTask:
    """One push or reading at this step; see `steerserve.steering.push.Push`."""

    layer: int
    direction: str
    """Digest of the unit vector, which the worker was sent with this step or an earlier one."""
    op: str
    strength: float
    gain: float
    scope: str | tuple[int, int]
    sae: str | None = None
    feature: int | None = None
    bound: tuple[float, bool] | None = None
    """Ratio of a `Bound`, and true where a larger change is reported instead of made smaller."""


@dataclass(frozen=True)
class RowTask:
    """Positions are of the canvas."""

    response: tuple[int, int]
    open: tuple[int, int]
    """Where masked positions may commit, half-open: candidates are drawn for these."""
    only: tuple[int, ...] | None
    """The positions that do, of a row that chooses them without looking at candidates; None: any of them."""
    noise: tuple[int, int, int]
    """Seed, row and step of the draws."""
    temperature: float
    top_p: float
    top_k: int
    no_eos: int
    """How many of the model's end tokens are not drawn."""
    ends_last: bool
    needs: tuple[str, ...]
    """What is measured of every candidate, in the order of the reply."""
    alternatives: int
    """Likeliest tokens told of each candidate."""
    compare: str | None
    """SAE whose top features are told of each candidate."""
    uptake: tuple[int, str] | None
    """Layer and digest of a direction on which each candidate's state is projected."""
    pushes: tuple[PushTask, ...]
    layers: tuple[int, ...] = ()
    """Layers whose states are told, as they arrive there: of rows that are read position by position."""
    span: tuple[int, int] = (0, 0)
    """First and last + 1 position whose states are told."""

    @classmethod
    def reading(cls, layer: int, length: int) -> "RowTask":
        """Draw nothing, change nothing, and tell the states of a canvas of so many tokens at a layer."""
        return cls(
            response=(0, length),
            open=(0, 0),
            only=None,
            noise=(0, 0, 0),
            temperature=0.0,
            top_p=1.0,
            top_k=0,
            no_eos=0,
            ends_last=False,
            needs=(),
            alternatives=0,
            compare=None,
            uptake=None,
            pushes=(),
            layers=(layer,),
            span=(0, length),
        )

    def directions(self) -> set[str]:
        """Digests of every direction the row needs."""
        return {push.direction for push in self.pushes} | ({self.uptake[1]} if self.uptake else set())


def to_parameters(task: RowTask, directions: Mapping[str, Tensor], forget: Iterable[str]) -> dict[str, Any]:
    """The task with what has to be known for it: directions [hidden_size] by digest, and digests to forget."""
    return {
        TASK: json.dumps(asdict(task)).encode(),
        DIRECTIONS: {name: one.float().contiguous().numpy().tobytes() for name, one in directions.items()},
        FORGET: list(forget),
    }


def from_parameters(given: Mapping[str, Any]) -> tuple[RowTask, dict[str, Tensor], list[str]]:
    """What `to_parameters` made: the task, directions by digest, digests to forget."""
    raw = json.loads(given[TASK])
    pushes = tuple(
        PushTask(**push | {"scope": _scope(push["scope"]), "bound": _bound(push["bound"])}) for push in raw["pushes"]
    )
    fixed = {name: tuple(raw[name]) for name in ("response", "open", "noise", "needs", "layers", "span")}
    optional = {name: None if raw[name] is None else tuple(raw[name]) for name in ("only", "uptake")}
    directions = {
        name: aligned(torch.frombuffer(bytearray(data), dtype=torch.float32))
        for name, data in given[DIRECTIONS].items()
    }
    return RowTask(**raw | fixed | optional | {"pushes": pushes}), directions, list(given[FORGET])


def _scope(raw: str | list[int]) -> str | tuple[int, int]:
    return raw if isinstance(raw, str) else (raw[0], raw[1])


def _bound(raw: list[Any] | None) -> tuple[float, bool] | None:
    return None if raw is None else (raw[0], raw[1])
