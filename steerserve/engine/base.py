"""The seam: the one contract between everything above (server, command line, calibration) and an engine."""

from typing import Any, Protocol

from steerserve.engine.events import Event
from steerserve.engine.params import GenerationParams


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
    def plan(self) -> dict[str, Any]:
        """What would be applied: see `Engine.admit`."""
        ...


class Engine(Protocol):
    """Runs denoising loops of many requests at once. Any thread may call `admit`; all else is one thread's."""

    def admit(self, params: GenerationParams) -> Any:
        """Check everything and resolve every name, without queueing: raises RequestError or NotFoundError with the
        field to blame. The `plan` of the result is JSON: canvas and steps, and for each intervention the operator,
        site(s), unit, schedule (grid and gains), strength per step, rho where it has a profile, and notes."""
        ...

    def add(self, requests: list[Any]) -> None:
        """Queue admitted requests, all of them or none; raises QueueFullError with the seconds after which to retry."""
        ...

    def abort(self, request_id: str) -> None:
        """Free a request's row before the next step; it ends in `Failed(aborted=True)`. Unknown ids are ignored."""
        ...

    def step(self) -> list[Event]:
        """One denoising step of the rows that are due; empty when nothing runs."""
        ...

    def close(self) -> None:
        """Release the model; requests still running end in `Failed`."""
        ...
