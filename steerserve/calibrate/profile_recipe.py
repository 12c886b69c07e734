"""The settings of a measured profile, each default written once."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from steerserve.calibrate.recipe import check_seed


@dataclass(frozen=True)
class ProfileRecipe:
    """How many runs and canvases what pushes do and cost is measured on."""

    runs: int = 64
    """Texts of each pulse, and of the unsteered runs that all pulses are compared with."""
    run_tokens: int = 63
    """Their length; with the BOS token a multiple of 16 wastes no padding."""
    run_steps: int = 63
    """Denoising steps of each of them; as many as tokens, so that the narrowest pulse has a step of its own."""
    edges: tuple[int, ...] = (0, 1, 2, 4, 8, 16, 24, 32, 44, 64)
    """Borders of the pulses, in slices of the attributes' profiles, from 0 to all."""
    pulse: float = 1.0
    """Strength of a pulse, as a multiple of the attribute's own; large ones saturate, small ones drown in noise."""
    antithetic: bool = False
    """Push each pulse both ways and take half the difference: no curvature, at twice the runs."""
    canvases: int = 4
    """Canvases of each slice that the cost is measured on."""
    positions: int = 16
    """Masked positions of each of them, at most."""
    judge_texts: int = 12_000
    """Texts of each class that a classifier is trained on, at most."""
    order: str | Mapping[str, Any] | None = None
    """Order in which positions commit; none: the model's own."""
    transfer: str | Mapping[str, Any] | None = None
    """How many commit at a step; none: the model's own."""
    temperature: float | None = None
    """Temperature; none: the model's own."""
    rows: int = 64
    """Rows of one forward while generating."""
    seed: int = 0
    """What everything random is drawn from."""

    def __post_init__(self) -> None:
        for name in ("runs", "run_tokens", "run_steps", "canvases", "positions", "judge_texts", "rows"):
            low = 2 if name in ("runs", "canvases") else 1
            if getattr(self, name) < low:
                raise ValueError(f"{name} must be {low} or more, got {getattr(self, name)}")
        check_seed(self.seed)
        if len(self.edges) < 2 or self.edges[0] != 0 or list(self.edges) != sorted(set(self.edges)):
            raise ValueError(f"edges must be slices that rise from 0, got {self.edges}")
        if not self.pulse > 0:
            raise ValueError(f"pulse must be above 0, got {self.pulse}")

    @property
    def windows(self) -> tuple[tuple[int, int], ...]:
        """(first slice, last slice + 1) of each pulse."""
        return tuple(zip(self.edges, self.edges[1:], strict=False))

    @property
    def texts(self) -> int:
        """Texts written for one attribute: its pulses and the uniform push, without the unsteered runs."""
        return (len(self.windows) + 1) * self.runs * (2 if self.antithetic else 1)

    def to_json(self) -> dict[str, Any]:
        """JSON values of everything that changes a result."""
        raw = asdict(self)
        del raw["rows"]
        return {name: list(value) if isinstance(value, tuple) else value for name, value in raw.items()}
