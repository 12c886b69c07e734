"""The request bodies, as `POST /v1/completions` and `POST /v1/steering/preview` take them."""

from typing import Annotated, Any, Literal, Self

from pydantic import Discriminator, Field, Tag, model_validator

from steerserve.server import fields
from steerserve.server.fields import Choice, Layer, Name, Prompt, Stop, Strength, Strict, Suffix

StreamMode = Literal["append", "replace", "events"]


class Feature(Strict):
    """One feature of a loaded SAE."""

    sae: Name
    index: int = Field(ge=0, le=fields.MAX_TOKEN_ID)


class Vector(Strict):
    """A raw direction at one layer's output."""

    layer: Layer
    values: list[float] = Field(fail_fast=True, min_length=1, max_length=65536)


class Span(Strict):
    """A half-open span of response positions, `[start, stop)`."""

    positions: list[Annotated[int, Field(ge=0, le=fields.MAX_TOKEN_ID)]] = Field(min_length=2, max_length=2)

    @model_validator(mode="after")
    def _not_empty(self) -> Self:
        if self.positions[0] >= self.positions[1]:
            raise ValueError("positions must be [start, stop] with start < stop")
        return self


Scope = Annotated[
    Annotated[Literal["all", "prompt", "response", "masked", "committed"], Tag("<name>")]
    | Annotated[Span, Tag("<object>")],
    Discriminator(
        lambda value: {str: "<name>", dict: "<object>"}.get(type(value)),
        custom_error_type="scope",
        custom_error_message='must be all, prompt, response, masked, committed or {"positions": [start, stop]}',
    ),
]


class Intervention(Strict):
    """One push: exactly one of attribute, feature and vector; what is left out takes the attribute's own default."""

    attribute: Name | None = None
    feature: Feature | None = None
    vector: Vector | None = None
    strength: Strength | None = None
    op: Literal["add", "boost", "multiply", "clamp", "project_out", "cap"] = "add"
    unit: Literal["residual", "max_act", "raw", "kl"] | None = None
    scope: Scope | None = None
    schedule: Choice | None = None
    layers: list[Layer] | None = Field(default=None, min_length=1, max_length=256)
    direction: Literal["sae", "diff_means"] = "sae"

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        named = [name for name in ("attribute", "feature", "vector") if getattr(self, name) is not None]
        if len(named) != 1:
            raise ValueError(
                f"must name exactly one of attribute, feature, vector; it names {' and '.join(named) or 'none'}"
            )
        return self


class Trace(Strict):
    """Attributes to read while denoising, every `every` steps."""

    attributes: list[Name] = Field(min_length=1, max_length=64)
    every: int = Field(default=1, ge=1, le=1_000_000)


class Steering(Strict):
    """What to push, and what to report about it."""

    interventions: list[Intervention] = Field(default=[], max_length=256)
    combine: Literal["independent"] = "independent"
    limits: Annotated[Any, fields.neutral()] = None
    baseline: bool = False
    trace: Trace | None = None
    control: Annotated[Any, fields.neutral()] = None


class Diffusion(Strict):
    """How the response is denoised."""

    steps: int | None = Field(default=None, ge=1, le=1_000_000)
    block_length: int | None = Field(default=None, ge=1, le=1_000_000)
    order: Choice | None = None
    transfer: Choice | None = None
    ignore_eos: bool | None = None
    cfg_scale: Annotated[Any, fields.neutral(0.0)] = 0.0
    stream_mode: StreamMode | None = None


class StreamOptions(Strict):
    """Options of a stream, as OpenAI has them."""

    include_usage: bool | None = None
    include_obfuscation: Annotated[Any, fields.neutral(False)] = None


class CompletionRequest(Strict):
    """A completion: OpenAI's fields, and `diffusion` and `steering` beside them."""

    model: str = Field(max_length=256)
    prompt: Prompt | None = None
    """Left out or null: an unconditional canvas."""
    suffix: Suffix | None = None
    max_tokens: int = Field(default=64, ge=1, le=1_000_000)
    temperature: float | None = Field(default=None, ge=0, le=2)
    top_p: float | None = Field(default=None, gt=0, le=1)
    n: int = Field(default=1, ge=1, le=1024)
    seed: int | None = Field(default=None, ge=0, lt=2**63)
    """Left out: drawn by the server and told in the answer."""
    stop: Stop | None = None
    logprobs: Annotated[Any, fields.neutral(0)] = None
    """0 asks for the log-probability of each token when it was committed; alternatives are not recorded."""
    stream: bool = False
    stream_options: StreamOptions | None = None
    user: str | None = Field(default=None, max_length=512)
    """Taken, since OpenAI clients send it; it changes nothing."""
    diffusion: Diffusion = Diffusion()
    steering: Steering = Steering()
    # Fields of OpenAI's that cannot be honoured; clients and load generators send them at the values that ask nothing.
    best_of: Annotated[Any, fields.neutral(1)] = None
    echo: Annotated[Any, fields.neutral(False)] = None
    frequency_penalty: Annotated[Any, fields.neutral(0.0)] = None
    presence_penalty: Annotated[Any, fields.neutral(0.0)] = None
    logit_bias: Annotated[Any, fields.neutral({})] = None

    @model_validator(mode="after")
    def _stream_settings_need_a_stream(self) -> Self:
        if not self.stream and self.stream_options is not None:
            raise fields.blame("stream_options", 'needs "stream": true')
        if not self.stream and self.diffusion.stream_mode is not None:
            raise fields.blame("diffusion.stream_mode", 'needs "stream": true')
        return self
