"""The bodies of requests that generate: what all of them have, and completions' own."""

from typing import Annotated, Any, Literal, Self

from pydantic import Field, WithJsonSchema, model_validator

from steerserve.config import MAX_TEMPERATURE
from steerserve.server.protocol import fields
from steerserve.server.protocol.fields import Choice, Prompt, Stop, Strict, Suffix
from steerserve.server.protocol.steering import Steering, text_or_object
from steerserve.server.protocol.sweep import Sweep

DEFAULT_LENGTH = 64
"""Response positions of a request that does not say."""
MAX_ALTERNATIVES = 20
"""Alternatives to a token whose log-probabilities may be asked for."""

StreamMode = Literal["append", "replace", "events"]


class Diffusion(Strict):
    """How the response is denoised."""

    steps: int | None = Field(default=None, ge=1, le=1_000_000)
    block_length: int | None = Field(default=None, ge=1, le=1_000_000)
    order: Choice | None = None
    transfer: Choice | None = None
    ignore_eos: bool | None = None
    """Never draw a token that ends the text or the turn."""
    logits_eos_inf: bool = False
    """Never draw the end of text, but the other tokens that end it (LLaDA's)."""
    ends_last: bool = False
    """Tokens that end the text or the turn commit last (LLaDA's `confidence_eos_eot_inf`)."""
    cfg_scale: float = Field(default=0.0, ge=0, le=100)
    """Classifier-free guidance by the prompt; each row above 0 costs two."""
    cache: Choice | None = None
    """Keys and values reused within a block, "prefix" or "dual" (Fast-dLLM), or an object with `refresh_every`,
    `gain_tolerance` and `first_alone`: approximate."""
    early_exit: bool = False
    """Leave what lies behind the first committed end token unwritten: approximate."""
    stream_mode: StreamMode | None = None


class StreamOptions(Strict):
    """Options of a stream, as OpenAI has them, and vLLM's usage in every chunk."""

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None
    include_obfuscation: Annotated[Any, fields.neutral(False)] = None


TEMPERATURE = {"type": "number", "minimum": 0, "maximum": MAX_TEMPERATURE}


class GenerationRequest(Strict):
    """What every request that generates has: OpenAI's fields, and `diffusion` and `steering` beside them."""

    model: str = Field(max_length=256)
    max_tokens: int | None = Field(default=None, ge=0, le=1_000_000)
    """Positions of the response; 0, only with `echo` and `logprobs`: the prompt alone is answered. Of more than fits on
    the canvas a request without `diffusion` and `ignore_eos` gets what does, and its choices say so in `notes`; with
    either it is refused."""
    max_completion_tokens: int | None = Field(default=None, ge=0, le=1_000_000)
    """The same under its newer name."""
    temperature: Annotated[float, WithJsonSchema(TEMPERATURE)] | None = None
    """0: the likeliest token."""
    top_p: float | None = Field(default=None, gt=0, le=1)
    top_k: int | None = Field(default=None, ge=-1, le=fields.MAX_TOKEN_ID)
    """Draw from the k likeliest tokens only; 0 or -1: from all."""
    n: int = Field(default=1, ge=1, le=1024)
    best_of: int | None = Field(default=None, ge=1, le=1024)
    """Candidates made for each prompt, of which the n best, as `steering.rank` says, are answered; left out: n."""
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
    steering: Annotated[Steering, text_or_object(Steering)] = Steering()
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
        named = self.max_completion_tokens if self.max_tokens is None else self.max_tokens
        return DEFAULT_LENGTH if named is None else named

    @property
    def alternatives(self) -> int | None:
        """Alternatives to each token whose log-probabilities are wanted; None: not even the token's own."""
        return None

    @property
    def scores_prompt(self) -> bool:
        """Tell if log-probabilities of the prompt's tokens are wanted."""
        return False

    @model_validator(mode="after")
    def _temperature_in_range(self) -> Self:
        # In the words that a model's own generation config is refused with.
        if self.temperature is not None and not 0 <= self.temperature <= MAX_TEMPERATURE:
            raise fields.blame("temperature", f"must be 0 to {MAX_TEMPERATURE:g}, got {self.temperature!r}")
        return self

    @model_validator(mode="after")
    def _names_agree(self) -> Self:
        if None not in (self.max_tokens, self.max_completion_tokens) and self.max_tokens != self.max_completion_tokens:
            raise fields.blame("max_completion_tokens", f"contradicts max_tokens, which is {self.max_tokens}")
        if None not in (self.ignore_eos, self.diffusion.ignore_eos) and self.ignore_eos != self.diffusion.ignore_eos:
            raise fields.blame("ignore_eos", "contradicts diffusion.ignore_eos")
        return self

    @model_validator(mode="after")
    def _something_to_write(self) -> Self:
        for name in ("max_tokens", "max_completion_tokens"):
            if getattr(self, name) == 0 and not self.scores_prompt:
                raise fields.blame(name, "must be greater than or equal to 1, or 0 with echo and logprobs, got 0")
        return self

    @model_validator(mode="after")
    def _stream_settings_need_a_stream(self) -> Self:
        if not self.stream and self.stream_options is not None:
            raise fields.blame("stream_options", 'needs "stream": true')
        if not self.stream and self.diffusion.stream_mode is not None:
            raise fields.blame("diffusion.stream_mode", 'needs "stream": true')
        return self

    @model_validator(mode="after")
    def _candidates_to_choose_from(self) -> Self:
        if self.best_of is not None and self.best_of < self.n:
            raise fields.blame("best_of", f"must be at least n, which is {self.n}, got {self.best_of}")
        if self.best_of is not None and self.best_of > self.n and self.stream:
            raise fields.blame(
                "best_of",
                f"must be n, which is {self.n}, in a stream, got {self.best_of}: which texts are the best is known "
                f"only once all have ended",
            )
        return self


class CompletionRequest(GenerationRequest):
    """A completion of a text."""

    prompt: Prompt | None = None
    """Left out or null: an unconditional canvas."""
    suffix: Suffix | None = None
    logprobs: int | None = Field(default=None, ge=0, le=MAX_ALTERNATIVES)
    """Asks for the log-probability of each token when it was committed, and of so many alternatives."""
    echo: bool = False
    """The prompt, as the model read it, before the text. With `logprobs` each of its tokens but the first has its
    log-probability: each in turn is masked and told by the rest of the prompt, under the pushes of the request, at the
    cost of a forward pass each."""
    sweep: Sweep | None = None
    """A grid of texts, over strengths, schedules or attributes of one intervention."""

    @property
    def alternatives(self) -> int | None:
        """Number of alternatives wanted for each token; None for no log-probabilities."""
        return self.logprobs

    @property
    def scores_prompt(self) -> bool:
        """Tell if log-probabilities of the prompt's tokens are wanted."""
        return self.echo and self.logprobs is not None

    @model_validator(mode="after")
    def _events_tell_the_response(self) -> Self:
        if self.echo and self.diffusion.stream_mode == "events":
            raise fields.blame("echo", 'cannot go with diffusion.stream_mode "events", which tells the response only')
        return self
