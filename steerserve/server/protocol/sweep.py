"""What a request may vary over a grid of texts."""

from typing import Annotated, Final, Self

from pydantic import Field, model_validator

from steerserve.server.protocol.fields import Choice, Name, Strength, Strict

MAX_VALUES: Final = 64
"""Values of one axis."""
AXES: Final = {"attributes": "attribute", "schedules": "schedule", "strengths": "strength"}
"""The axes, the slowest first, each with the field of the intervention that it sets."""


class Sweep(Strict):
    """A grid: one text for each combination of the values, all with the noise of one seed, and one without steering."""

    intervention: int = Field(default=0, ge=0, le=255)
    """Which of the interventions varies, counted from 0."""
    attributes: Annotated[list[Name], Field(min_length=1, max_length=MAX_VALUES)] | None = None
    schedules: Annotated[list[Choice], Field(min_length=1, max_length=MAX_VALUES)] | None = None
    strengths: Annotated[list[Strength], Field(min_length=1, max_length=MAX_VALUES)] | None = None

    @model_validator(mode="after")
    def _varies_something(self) -> Self:
        if not self.axes:
            raise ValueError(f"must have at least one of {', '.join(AXES)}")
        return self

    @property
    def axes(self) -> list[str]:
        """The axes that it has, the slowest first."""
        return [name for name in AXES if getattr(self, name) is not None]
