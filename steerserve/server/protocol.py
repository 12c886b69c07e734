"""The bodies of requests that generate: what all of them have, and completions' own."""

from typing import Annotated, Any, Literal, Self

from pydantic import Discriminator, Field, Tag, model_validator

from steerserve.server import fields
from steerserve.server.conditions import Condition, Remask
from steerserve.server.easysteer import EasySteer
from steerserve.server.ember import Ember
from steerserve.server.fields import Choice, Layer, Name, Prompt, Stop, Strength, Strict, Suffix
from steerserve.server.neuronpedia import Neuronpedia

DEFAULT_LENGTH = 64
"""Response positions of a request that does not say."""
MAX_ALTERNATIVES = 20
"""Alternatives to a token whose log-probabilities may be asked for."""

StreamMode = Literal["append", "replace", "events"]


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
    Annotated[Literal["all", "prompt", "response", "masked", "committed"], Tag("<name>")]
    | Annotated[Span, Tag("<object>")],
    Discriminator(
        fields.branch({str: "<name>", dict: "<object>"}),
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
    unit: Literal["residual", "max_act", "raw", "stored", "kl"] | None = None
    scope: Scope | None = None
    schedule: Choice | None = None
    layers: list[Layer] | None = Field(default=None, min_length=1, max_length=256)
    direction: Literal["sae", "diff_means"] = "sae"
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
    """Attributes to read while denoising, every `every` steps."""

    attributes: list[Name] = Field(min_length=1, max_length=64)
    every: int = Field(default=1, ge=1, le=1_000_000)
    positions: bool = False


LANGUAGES = ("interventions", "ember", "neuronpedia", "easysteer")


class Change(Strict):
    """What to push: our interventions or, under its name, what another server takes."""

    interventions: list[Intervention] = Field(default=[], max_length=256)
    ember: Ember | None = None
    neuronpedia: Neuronpedia | None = None
    easysteer: EasySteer | None = None

    @model_validator(mode="after")
    def _one_language(self) -> Self:
        given = [name for name in LANGUAGES if getattr(self, name)]
        if len(given) > 1:
            raise fields.blame(given[1], f"cannot stand beside {given[0]}")
        return self


class Limits(Strict):
    """What the interventions may come to together."""

    max_kl: float | None = Field(default=None, gt=0, le=1e6)
    """Predicted KL from the unsteered model, in nats a token of the response."""
    max_delta: float | None = Field(default=None, gt=0, le=1e6)
    """|delta| / |h| of all pushes at a layer together, at each position."""
    on_exceed: Literal["clip", "refuse"] = "clip"

    @model_validator(mode="after")
    def _limits_something(self) -> Self:
        if self.max_kl is None and self.max_delta is None:
            raise ValueError("must have max_kl, max_delta or both")
        return self


class Steering(Change):
    """What to push, and what to report about it."""

    combine: Literal["independent", "joint"] = "independent"
    limits: Limits | None = None
    baseline: bool = False
    trace: Trace | None = None
    abort_when: Condition | None = None
    """A choice ends after the step at which this holds, with finish_reason `content_filter`."""
    remask_when: Remask | None = None
    """After a step at which its condition holds, tokens of its span are masked again and written anew."""
    control: Literal["random", "sign_flip", "matched_norm"] | None = None
    measure_kl: bool = False
    """Whether to measure the KL from the unsteered model; each steered row then costs two."""


class SteeringPatch(Strict):
    """The body that changes the steering of a running generation."""

    steering: Change

    @model_validator(mode="after")
    def _says_something(self) -> Self:
        if not self.steering.model_fields_set & set(LANGUAGES):
            raise fields.blame("steering.interventions", "is required; [] ends the steering")
        return self


class Diffusion(Strict):
    """How the response is denoised."""

    steps: int | None = Field(default=None, ge=1, le=1_000_000)
    block_length: int | None = Field(default=None, ge=1, le=1_000_000)
    order: Choice | None = None
    transfer: Choice | None = None
    ignore_eos: bool | None = None
    ends_last: bool = False
    """Tokens that end the text or the turn commit last (LLaDA's `confidence_eos_eot_inf`)."""
    cfg_scale: float = Field(default=0.0, ge=0, le=100)
    """Classifier-free guidance by the prompt; each row above 0 costs two."""
    cache: Choice | None = None
    """Keys and values reused within a block, "prefix" or "dual" (Fast-dLLM), or an object with `refresh_every` and
    `gain_tolerance`: approximate."""
    early_exit: bool = False
    """Leave what lies behind the first committed end token unwritten: approximate."""
    stream_mode: StreamMode | None = None


class StreamOptions(Strict):
    """Options of a stream, as OpenAI has them, and vLLM's usage in every chunk."""

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None
    include_obfuscation: Annotated[Any, fields.neutral(False)] = None


class GenerationRequest(Strict):
    """What every request that generates has: OpenAI's fields, and `diffusion` and `steering` beside them."""

    model: str = Field(max_length=256)
    max_tokens: int | None = Field(default=None, ge=1, le=1_000_000)
    max_completion_tokens: int | None = Field(default=None, ge=1, le=1_000_000)
    """The same under its newer name."""
    temperature: float | None = Field(default=None, ge=0, le=2)
    top_p: float | None = Field(default=None, gt=0, le=1)
    top_k: int | None = Field(default=None, ge=-1, le=fields.MAX_TOKEN_ID)
    """Draw from the k likeliest tokens only; 0 or -1: from all."""
    n: int = Field(default=1, ge=1, le=1024)
    seed: int | None = Field(default=None, ge=0, lt=2**63)
    """Left out: drawn by the server and told in the answer."""
    stop: Stop | None = None
    priority: int = Field(default=0, ge=-10, le=10)
    """Whose turn it is when rows wait: lower goes first, as in vLLM; waiting makes up for it."""
    ignore_eos: bool | None = None
    """The same as `diffusion.ignore_eos`, where vLLM's clients put it."""
    stream: bool = False
    stream_options: StreamOptions | None = None
    user: str | None = Field(default=None, max_length=512)
    """Taken, since OpenAI clients send it; it changes nothing."""
    diffusion: Diffusion = Diffusion()
    steering: Steering = Steering()
    # Fields of OpenAI's and vLLM's that cannot be honoured; clients and load generators send them at the values that
    # ask nothing.
    frequency_penalty: Annotated[Any, fields.neutral(0.0)] = None
    presence_penalty: Annotated[Any, fields.neutral(0.0)] = None
    repetition_penalty: Annotated[Any, fields.neutral(1.0)] = None
    logit_bias: Annotated[Any, fields.neutral({})] = None
    min_p: Annotated[Any, fields.neutral(0.0)] = None
    min_tokens: Annotated[Any, fields.neutral(0)] = None
    skip_special_tokens: Annotated[Any, fields.neutral(True)] = None
    use_beam_search: Annotated[Any, fields.neutral(False)] = None

    @property
    def length(self) -> int:
        """Positions of the response."""
        return self.max_tokens or self.max_completion_tokens or DEFAULT_LENGTH

    @property
    def alternatives(self) -> int | None:
        """Alternatives to each token whose log-probabilities are wanted; None: not even the token's own."""
        return None

    @model_validator(mode="after")
    def _names_agree(self) -> Self:
        if None not in (self.max_tokens, self.max_completion_tokens) and self.max_tokens != self.max_completion_tokens:
            raise fields.blame("max_completion_tokens", f"contradicts max_tokens, which is {self.max_tokens}")
        if None not in (self.ignore_eos, self.diffusion.ignore_eos) and self.ignore_eos != self.diffusion.ignore_eos:
            raise fields.blame("ignore_eos", "contradicts diffusion.ignore_eos")
        return self

    @model_validator(mode="after")
    def _stream_settings_need_a_stream(self) -> Self:
        if not self.stream and self.stream_options is not None:
            raise fields.blame("stream_options", 'needs "stream": true')
        if not self.stream and self.diffusion.stream_mode is not None:
            raise fields.blame("diffusion.stream_mode", 'needs "stream": true')
        return self


class CompletionRequest(GenerationRequest):
    """A completion of a text."""

    prompt: Prompt | None = None
    """Left out or null: an unconditional canvas."""
    suffix: Suffix | None = None
    logprobs: int | None = Field(default=None, ge=0, le=MAX_ALTERNATIVES)
    """Asks for the log-probability of each token when it was committed, and of so many alternatives."""
    echo: bool = False
    """The prompt, as the model read it, before the text."""
    best_of: int | None = Field(default=None, ge=1, le=1024)

    @property
    def alternatives(self) -> int | None:
        """See `GenerationRequest.alternatives`."""
        return self.logprobs

    @model_validator(mode="after")
    def _best_of_all(self) -> Self:
        if self.best_of is not None and self.best_of != self.n:
            raise fields.blame("best_of", f"must be n, which is {self.n}: texts are not ranked, got {self.best_of}")
        return self

    @model_validator(mode="after")
    def _events_tell_the_response(self) -> Self:
        if self.echo and self.diffusion.stream_mode == "events":
            raise fields.blame("echo", 'cannot go with diffusion.stream_mode "events", which tells the response only')
        return self
