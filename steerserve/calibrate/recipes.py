"""Settings of a calibration, of a measured profile and of probes, each default written once."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal


@dataclass(frozen=True)
class CalibrationRecipe:
    """How many texts, samples and trials, and how they are written."""

    tasks: Path | None = None
    """JSON file of attributes to calibrate: a list of {"name", "file", "field", "target", "contrast"};
    none: those of the bundled model."""
    layers: tuple[int, ...] = ()
    """Layers whose SAEs are used; none: every layer that has one for masked positions."""
    sae_k: int | None = None
    """Which SAEs of a sweep over k, the active features per token; none: there is one a layer."""
    texts: int = 400
    """Texts of each class that features are found on."""
    crop: int = 128
    """Longest stretch of a text in tokens."""
    mask_ratios: tuple[float, ...] = (0.3, 0.5, 0.7)
    """Share of masked tokens in each noised copy of a text."""
    candidates: int = 300
    """Features with the largest |d| that are tested for significance."""
    p_value: float = 0.01
    """Significance, after correction for the number of candidates."""
    kept: int = 50
    """Significant features kept on each side."""
    steering: int = 20
    """Features that make up a direction."""
    weights: Literal["equal", "d", "diff_means"] = "diff_means"
    """Weight of each of them: all the same, Cohen's d, or the difference of mean activations."""
    judge_texts: int = 12_000
    """Texts of each class that a classifier is trained on, at most."""
    samples: int = 128
    """Unsteered texts for the commitment curves."""
    sample_tokens: int = 63
    """Their length; with the BOS token a multiple of 16 wastes no padding."""
    sample_steps: int = 63
    """Denoising steps of each of them."""
    slices: int = 64
    """Slices of progress in a curve."""
    confidence: float = 0.8
    """Probability from which a sample counts as showing an attribute."""
    min_confident: int = 8
    """Where fewer samples are that sure, this many of the likeliest are taken."""
    strengths: tuple[float, ...] = (0.15, 0.3, 0.45, 0.65, 0.9, 1.3, 1.9)
    """Strengths that are tried, weakest first, as fractions of the mean residual norm."""
    enough: float = 0.9
    """Share of texts from which a weaker push is preferred to a larger share."""
    search_texts: int = 24
    """Texts of each trial while layers and strength are searched."""
    confirm_texts: int = 48
    """Fresh texts of each of the trials that are run again to choose between them."""
    trial_tokens: int = 47
    """Length of a trial's texts."""
    trial_steps: int = 24
    """Denoising steps of a trial's texts."""
    quality_masks: int = 6
    """Mask ratios over which a text's loss is averaged."""
    loss_within: float = 1.10
    """Largest loss of steered texts under the unsteered model, as a ratio to that of unsteered texts."""
    distinct_within: float = 0.90
    """Smallest share of distinct word pairs in steered texts, as a ratio to that of unsteered texts."""
    sites_kl: float | None = None
    """Choose the layers by the share that each set reaches at this measured KL, in nats a response token, and only then
    their strength; none: by the search for the strength, over all sets."""
    schedule: str | Mapping[str, Any] = "commitment"
    """Strength schedule of the attributes."""
    order: str | Mapping[str, Any] | None = None
    """Order in which positions commit in samples and trials; none: the model's own."""
    transfer: str | Mapping[str, Any] | None = None
    """How many commit at a step of samples and trials; none: the model's own."""
    temperature: float | None = None
    """Temperature of samples and trials; none: the model's own. At 0 (LLaDA's own) the order or transfer must draw."""
    rows: int = 64
    """Rows of one forward while generating."""
    batch_tokens: int = 4608
    """Tokens of one forward while reading texts."""
    seed: int = 0
    """What everything random is drawn from."""

    def __post_init__(self) -> None:
        for name, default in type(self).__dataclass_fields__.items():
            if isinstance(default.default, int) and name != "seed" and getattr(self, name) < 1:
                raise ValueError(f"{name} must be 1 or more, got {getattr(self, name)}")
        check_seed(self.seed)
        if not self.mask_ratios or not all(0 < ratio <= 1 for ratio in self.mask_ratios):
            raise ValueError(f"mask_ratios must be shares above 0 and at most 1, got {self.mask_ratios}")
        if not self.strengths or self.strengths[0] <= 0 or list(self.strengths) != sorted(set(self.strengths)):
            raise ValueError(f"strengths must be positive and rise, got {self.strengths}")
        if not self.steering <= self.kept:
            raise ValueError(f"steering must be at most kept ({self.kept}), got {self.steering}")
        if self.sites_kl is not None and not 0 < self.sites_kl < math.inf:
            raise ValueError(f"sites_kl must be a number of nats above 0, got {self.sites_kl}")
        if not 0 < self.confidence < 1:
            raise ValueError(f"confidence must be between 0 and 1, got {self.confidence}")
        if not 0 < self.p_value < 1:
            raise ValueError(f"p_value must be between 0 and 1, got {self.p_value}")
        if self.weights not in ("equal", "d", "diff_means"):
            raise ValueError(f"weights must be 'equal', 'd' or 'diff_means', got {self.weights!r}")

    def to_json(self) -> dict[str, Any]:
        """JSON values of everything that changes a result; the tasks are recorded by themselves."""
        raw = asdict(self)
        for name in ("tasks", "rows"):
            raw.pop(name)
        if self.sites_kl is None:
            # Not asked for, it changes nothing of what was made before it could be.
            raw.pop("sites_kl")
        return {name: list(value) if isinstance(value, tuple) else value for name, value in raw.items()}


@dataclass(frozen=True)
class ProfileRecipe:
    """How many runs and canvases the sensitivity and the cost of pushes are measured on."""

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


@dataclass(frozen=True)
class ProbeRecipe:
    """How many texts probes are trained on."""

    probe_texts: int = 2000
    """Texts of each class that probes are trained and measured on, at most."""
    seed: int = 0
    """What texts are drawn from."""

    def __post_init__(self) -> None:
        if self.probe_texts < 1:
            raise ValueError(f"probe_texts must be 1 or more, got {self.probe_texts}")
        check_seed(self.seed)


def check_seed(seed: int) -> None:
    """Raise ValueError for a seed that not everything can be drawn from: scikit-learn's are the narrowest."""
    if not 0 <= seed < 2**32:
        raise ValueError(f"seed must be 0 to {2**32 - 1}, got {seed}")
