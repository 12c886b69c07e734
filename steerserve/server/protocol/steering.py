"""What a body may say about steering: what to push, how far, and what to tell of it."""

from typing import Annotated, Any, Self

from pydantic import BeforeValidator, Discriminator, Field, PrivateAttr, Tag, ValidationError, model_validator

from steerserve.engine.api.scoring import MAX_ROUNDS
from steerserve.server.protocol import expression, fields
from steerserve.server.protocol.conditions import Condition, Remask
from steerserve.server.protocol.dialects.easysteer import EasySteer
from steerserve.server.protocol.dialects.ember import Ember
from steerserve.server.protocol.dialects.neuronpedia import Neuronpedia
from steerserve.server.protocol.expression import MAX_CHARACTERS
from steerserve.server.protocol.fields import Choice, Layer, Name, Strength, Strict
from steerserve.server.protocol.receipts import Form
from steerserve.steering.names import (
    SCOPE_NAMES,
    Combine,
    Control,
    Direction,
    OnExceed,
    Operator,
    ScopeName,
    Unit,
)


class Feature(Strict):
    """One feature of a loaded SAE."""

    sae: Name
    index: int = Field(ge=0, le=fields.MAX_TOKEN_ID)


class Vector(Strict):
    """A raw direction at one layer's output, or one that the server has loaded, by its name."""

    name: Name | None = None
    layer: Layer | None = None
    values: list[float] | None = Field(default=None, fail_fast=True, min_length=1, max_length=65536)

    @model_validator(mode="after")
    def _named_or_given(self) -> Self:
        if (self.name is None) == (self.layer is None and self.values is None):
            raise ValueError("must have either a name, or a layer and values")
        if self.name is None and (self.layer is None or self.values is None):
            raise ValueError(f"must have a layer and values; it lacks {'layer' if self.layer is None else 'values'}")
        return self


class Span(Strict):
    """A half-open span of response positions, `[start, stop)`."""

    positions: list[Annotated[int, Field(ge=0, le=fields.MAX_TOKEN_ID)]] = Field(min_length=2, max_length=2)

    @model_validator(mode="after")
    def _not_empty(self) -> Self:
        if self.positions[0] >= self.positions[1]:
            raise ValueError("positions must be [start, stop] with start < stop")
        return self


Scope = Annotated[
    Annotated[ScopeName, Tag("<name>")] | Annotated[Span, Tag("<object>")],
    Discriminator(
        fields.branch({str: "<name>", dict: "<object>"}),
        custom_error_type="scope",
        custom_error_message=f'must be {", ".join(SCOPE_NAMES)} or {{"positions": [start, stop]}}',
    ),
]


class Intervention(Strict):
    """One push: exactly one of attribute, feature and vector; what is left out takes the attribute's own default."""

    attribute: Name | None = None
    feature: Feature | None = None
    vector: Vector | None = None
    strength: Strength | None = None
    op: Operator = "add"
    unit: Unit | None = None
    scope: Scope | None = None
    schedule: Choice | None = None
    layers: list[Layer] | None = Field(default=None, min_length=1, max_length=256)
    direction: Direction = "sae"
    negate: bool = False
    """Push at minus the attribute's own strength, where none is given."""
    when: Condition | None = None
    """It pushes only while this holds, judged after each forward for the next."""

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        named = [name for name in ("attribute", "feature", "vector") if getattr(self, name) is not None]
        if len(named) != 1:
            raise ValueError(
                f"must name exactly one of attribute, feature, vector; it names {' and '.join(named) or 'none'}"
            )
        return self


class Trace(Strict):
    """What to read while denoising, every `every` steps: attributes before the pushes at their layers, features after
    the pushes at theirs."""

    attributes: list[Name] = Field(default=[], max_length=64)
    features: list[Feature] = Field(default=[], max_length=64)
    every: int = Field(default=1, ge=1, le=1_000_000)
    positions: bool = False

    @model_validator(mode="after")
    def _reads_something(self) -> Self:
        if not self.attributes and not self.features:
            raise fields.blame("attributes", "must hold at least 1 item, or features at least 1")
        return self


MAX_PUSHES = 256
"""Interventions of a request."""
LANGUAGES = ("interventions", "ember", "neuronpedia", "easysteer")


class Change(Strict):
    """What to push: our interventions or, under its name, what another server takes."""

    interventions: list[Intervention] = Field(default=[], max_length=MAX_PUSHES)
    ember: Ember | None = None
    neuronpedia: Neuronpedia | None = None
    easysteer: EasySteer | None = None
    _places: tuple[int, ...] = PrivateAttr(default=())

    @classmethod
    def of_text(cls, text: str) -> Self:
        """The interventions of a text; raises ValueError with the character that is wrong."""
        found = expression.parse(text)
        if len(found) > MAX_PUSHES:
            raise ValueError(f"must have {MAX_PUSHES} pushes at most; it has {len(found)}")
        steering = cls(interventions=[_checked(one) for one in found])
        steering._places = tuple(one.start for one in found)
        return steering

    def without_places(self) -> Self:
        """The same as an object, of which other parts may be blamed than those of a text."""
        self._places = ()
        return self

    @property
    def places(self) -> tuple[int, ...]:
        """Where in the text each intervention begins, if they were given as a text."""
        return self._places

    @model_validator(mode="after")
    def _one_language(self) -> Self:
        given = [name for name in LANGUAGES if getattr(self, name)]
        if len(given) > 1:
            raise fields.blame(given[1], f"cannot stand beside {given[0]}")
        return self


def _checked(written: expression.Written) -> Intervention:
    try:
        return Intervention.model_validate(written.fields)
    except ValidationError as error:
        detail = error.errors(include_url=False)[0]
    path = [str(part) for part in detail["loc"] if part not in fields.TAGS]
    place = written.places.get(path[0] if path else "", written.start)
    message = detail["msg"].removeprefix("Value error, ")
    raise ValueError(f"{expression.at(place)}: {': '.join(['.'.join(path), message] if path else [message])}")


def text_or_object(shape: type[Change]) -> BeforeValidator:
    """Has a field of this shape take the text form of its interventions as well."""

    def read(value: Any) -> Any:
        return shape.of_text(value) if isinstance(value, str) else value

    return BeforeValidator(read, json_schema_input_type=Annotated[str, Field(max_length=MAX_CHARACTERS)] | shape)


class Limits(Strict):
    """What the interventions may come to together."""

    max_kl: float | None = Field(default=None, gt=0, le=1e6)
    """Measured KL from the unsteered model, in nats a token of the response, held by a row without the interventions
    that runs beside each steered one."""
    max_predicted_kl: float | None = Field(default=None, gt=0, le=1e6)
    """The same as calibrated costs predict it: a forecast, for attributes that have them."""
    max_delta: float | None = Field(default=None, gt=0, le=1e6)
    """|delta| / |h| of all pushes at a layer together, at each position."""
    on_exceed: OnExceed = "clip"

    @model_validator(mode="after")
    def _limits_something(self) -> Self:
        if self.max_kl is None and self.max_predicted_kl is None and self.max_delta is None:
            raise ValueError("must have at least one of max_kl, max_predicted_kl and max_delta")
        return self


class Refine(Strict):
    """How the finished text is bettered: stretch by stretch, each kept where its probes like the text better."""

    rounds: int = Field(default=16, ge=1, le=MAX_ROUNDS)
    """Stretches that are written anew, one after the other."""
    span: int | None = Field(default=None, ge=1, le=fields.MAX_TOKEN_ID)
    """Positions of a stretch; left out: a third of the response."""


class Steering(Change):
    """What to push, and what to report about it."""

    combine: Combine = "independent"
    limits: Limits | None = None
    baseline: bool = False
    trace: Trace | None = None
    abort_when: Condition | None = None
    """A choice ends after the step at which this holds, with finish_reason `content_filter`."""
    remask_when: Remask | None = None
    """After a step at which its condition holds, tokens of its span are masked again and written anew."""
    refine: Refine | None = None
    """After the first draft: rounds in which a stretch is written anew, and kept where the text then is likelier, by
    the probes, to have what `rank` names."""
    control: Control | None = None
    measure_kl: bool = False
    """Measure the KL from the unsteered model; each steered row then costs two."""
    quality: bool | None = None
    """Tell the unsteered model's loss on each text and how little it repeats itself, at the cost of 8 forward passes a
    text; left out: in a sweep alone."""
    receipt: Form = "short"
    """How much the receipts tell: `short` leaves out hashes and what grows with the steps, `full` nothing."""
    rank: list[Name] | None = Field(default=None, max_length=64)
    """Attributes whose probes judge the finished texts, by which the candidates of `best_of` are ranked and `refine`
    goes: texts that have them first or, behind a minus sign, texts that do not. Left out: with `best_of` above n and
    with `refine`, those that the interventions push. None of them ([], or nothing pushed by name): by the mean
    log-probability of the tokens."""


class SteeringPatch(Strict):
    """The body that changes the steering of a running generation."""

    steering: Annotated[Change, text_or_object(Change)]

    @model_validator(mode="after")
    def _says_something(self) -> Self:
        if not self.steering.model_fields_set & set(LANGUAGES):
            raise fields.blame("steering.interventions", "is required; [] ends the steering")
        return self
