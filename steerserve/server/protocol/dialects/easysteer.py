"""EasySteer's steering specification (its API v2), translated into interventions.

A `source` is not read: its file's name without folder and suffix names a vector that this server has loaded. Its
positions are those of decode steps; here they are the positions of the response.
"""

import re
from typing import Annotated, Any, Final, Literal, Self

from pydantic import Field, model_validator

from steerserve.engine.api.params import Intervention, Scope, VectorRef
from steerserve.server.protocol import fields
from steerserve.server.protocol.fields import Layer, Strength, Strict

_FILE: Final = re.compile(r"(?:.*/)?(?P<name>[^/]+?)(?:\.[^./]+)?")


class EasySteerApply(Strict):
    """Tokens that a vector applies to: the union of what is named."""

    prompt: Literal["all"] | None = None
    generation: Literal["all"] | None = None
    generation_window: list[Annotated[int, Field(ge=0, le=fields.MAX_TOKEN_ID)]] | None = Field(
        default=None, min_length=2, max_length=2
    )
    """Half-open, as ours."""

    @model_validator(mode="after")
    def _selects(self) -> Self:
        window = self.generation_window
        if window is not None and window[0] >= window[1]:
            raise fields.blame("generation_window", "must be [start, stop] with start < stop")
        if not self.scopes:
            raise ValueError("must name prompt, generation or generation_window; it names none")
        return self

    @property
    def scopes(self) -> list[Scope]:
        """Our scopes that make up the union, none of which overlaps another."""
        if self.prompt and self.generation:
            return ["all"]
        scopes: list[Scope] = ["prompt"] if self.prompt else []
        if self.generation:
            return [*scopes, "response"]
        if self.generation_window is not None:
            scopes.append((self.generation_window[0], self.generation_window[1]))
        return scopes


class EasySteerVector(Strict):
    """One vector."""

    source: str = Field(min_length=1, max_length=1000)
    algorithm: Literal["direct"] = "direct"
    scale: Strength = 1.0
    layers: list[Layer] | None = Field(default=None, min_length=1, max_length=256)
    normalize: bool = False
    """Use the vector at norm 1 and not at the norm it is stored at."""
    apply: EasySteerApply
    params: Annotated[Any, fields.neutral({})] = None
    name: str | None = Field(default=None, max_length=200)
    """A label, which means nothing."""

    @model_validator(mode="after")
    def _names_a_file(self) -> Self:
        if not _FILE.fullmatch(self.source):
            raise fields.blame("source", "must end with a file's name")
        return self

    @property
    def vector(self) -> str:
        """Name of the loaded vector."""
        found = _FILE.fullmatch(self.source)
        return found["name"] if found else ""


class EasySteer(Strict):
    """The specification."""

    vectors: list[EasySteerVector] = Field(min_length=1, max_length=256)
    conflict: Literal["priority", "sequential", "error"] = "priority"
    debug: Annotated[Any, fields.neutral(False)] = None

    @model_validator(mode="after")
    def _adds_up(self) -> Self:
        if len(self.vectors) > 1 and self.conflict != "sequential":
            raise fields.blame(
                "conflict", f'must be "sequential" for several vectors, since pushes add up here; got "{self.conflict}"'
            )
        return self

    def translate(self) -> list[tuple[Intervention, str]]:
        """Our interventions, each with the field it comes from."""
        return [
            (
                Intervention(
                    vector=VectorRef(name=one.vector),
                    strength=one.scale,
                    unit="raw" if one.normalize else "stored",
                    scope=scope,
                    schedule="uniform",
                    layers=tuple(one.layers) if one.layers is not None else None,
                ),
                f"vectors[{i}]",
            )
            for i, one in enumerate(self.vectors)
            for scope in one.apply.scopes
        ]
