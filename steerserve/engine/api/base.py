"""The seam: the one contract between everything above (server, command line, calibration) and an engine."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from steerserve.engine.api.events import Event, Failed
from steerserve.engine.api.params import GenerationParams


class Admitted(Protocol):
    """A checked request, ready to be added; its state belongs to it alone."""

    @property
    def id(self) -> str:
        """Unique within the engine; the `request_id` of its events."""
        ...

    @property
    def prompt_ids(self) -> tuple[int, ...]:
        """Canvas tokens before the response, BOS included; text is decoded behind them."""
        ...

    @property
    def suffix_ids(self) -> tuple[int, ...]:
        """Canvas tokens behind the response."""
        ...

    @property
    def plan(self) -> dict[str, Any]:
        """What would be applied: see `Engine.admit`."""
        ...


class Engine(Protocol):
    """Runs denoising loops of many requests at once. Any thread may call `admit`; all else is one thread's."""

    def admit(self, params: GenerationParams) -> Any:
        """Check everything and resolve every name, without queueing: raises RequestError or NotFoundError with the
        field to blame. The `plan` of the result is JSON: canvas and steps, and for each intervention the operator,
        site(s), unit, schedule (grid and gains), strength per step, rho where it has a profile, and notes. Its `order`
        names the attribute it reads, where it reads one, and keeps it whatever is pushed later. Where it `revises`,
        committed tokens may be taken back within the stretch (of `revised_within` positions; stretches follow one
        another) that is being written, and no other."""
        ...

    def add(self, requests: list[Any]) -> None:
        """Queue admitted requests, all of them or none; raises QueueFullError with the seconds after which to retry."""
        ...

    def abort(self, request_id: str) -> None:
        """Free a request's row before the next step; it ends in `Failed(aborted=True)`. Unknown ids are ignored."""
        ...

    def steer(self, request_id: str, request: Any) -> int | None:
        """Give a waiting or running request the interventions of another one, which was admitted and never added.

        They hold from its next step on, whose number is returned; None where it has ended or is not known. The receipt
        keeps what the earlier ones did; a Steered event tells when the others took their place."""
        ...

    def step(self) -> list[Event]:
        """One denoising step of the rows that are due; empty when nothing runs."""
        ...

    def close(self) -> None:
        """Release the model; requests still running end in `Failed`."""
        ...


@dataclass(frozen=True)
class FeatureQuery:
    """A text whose features are asked for: of one SAE, or of the pair of SAEs of one layer."""

    text: str | tuple[int, ...]
    """A mask token in it is a masked position."""
    sae: str | None = None
    layer: int | None = None
    mask_ratio: float = 0.0
    """Share of the text's tokens that are masked, at random."""
    seed: int = 0
    k: int = 8
    """Features a token, the most active ones."""


@dataclass(frozen=True)
class EffectQuery:
    """A text with masks, at which the effect of a steering is asked for."""

    text: str | tuple[int, ...]
    """A mask token in it is a masked position."""
    mask_ratio: float = 0.0
    """Share of the text's tokens that are masked besides, at random."""
    seed: int = 0
    k: int = 8
    """Tokens told of those whose log-probability rises most, and of those whose falls most."""


class Effects(Protocol):
    """What an engine can tell of the effect of a steering. Any thread may call `prepare`."""

    def prepare(self, query: EffectQuery) -> tuple[Any, GenerationParams]:
        """Check a text, without a steering; and the row, without one, whose response it is. Raises RequestError."""
        ...

    def measure(self, prepared: Any, steered: Any, plain: Any) -> dict[str, Any] | Failed:
        """How the log-probabilities at the masked positions change, as JSON: one forward of both admitted rows, in the
        engine's own thread. Failed where the steering does not take. Raises RequestError for a steering that one
        forward cannot show."""
        ...


class Features(Protocol):
    """What an engine can tell of the features of its SAEs. Any thread may call all but `read` and `moments`."""

    def listed(self, sae: str | None, query: str, offset: int, limit: int) -> tuple[list[dict[str, Any]], int]:
        """So many features from `offset` on, and how many there are: all of them in order of SAE and index, or those
        that hold a word of the query, the best first, after those whose index it is. Each is JSON: its SAE, index,
        label and statistics. Raises NotFoundError for an SAE that is not loaded."""
        ...

    def described(self, sae: str, index: int) -> dict[str, Any]:
        """All that is known of one feature, as JSON: what `listed` tells, what it has to do with the attributes, and
        where its SAE was labelled its contexts, tokens, curve and neighbours. Raises NotFoundError."""
        ...

    def prepare(self, reading: FeatureQuery) -> Any:
        """Check a reading and resolve its names; raises RequestError or NotFoundError with the field to blame."""
        ...

    def read(self, prepared: Any) -> list[dict[str, Any]]:
        """What each token activates, in order, as JSON: one forward of the model, in the engine's own thread."""
        ...

    def moments(self, prepared: Any) -> Any:
        """What each SAE's features do on a text, for `contrast`: one forward of the model, in the engine's own
        thread."""
        ...

    def contrast(
        self, texts_a: Sequence[Any], texts_b: Sequence[Any], k: int
    ) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
        """The k features that are most more active in texts_a than in texts_b, both given as `moments` of each text,
        and the k the other way round, as JSON, by Cohen's d over tokens."""
        ...
