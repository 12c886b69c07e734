"""What a caller may ask of an engine, as plain frozen data; `Engine.admit` checks it and resolves its names."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from steerserve.steering.names import Combine, Control, Direction, OnExceed, Operator, ScopeName, Unit

Choice = str | Mapping[str, Any]
"""A name, or `{"type": name, ...options}`."""

Scope = ScopeName | tuple[int, int]
"""A named set of positions, or a half-open span of response positions."""


@dataclass(frozen=True)
class FeatureRef:
    """One feature of a loaded SAE."""

    sae: str
    index: int


@dataclass(frozen=True)
class VectorRef:
    """A raw direction: at one layer's output and normalised when it is admitted, or a loaded one, by its name."""

    layer: int | None = None
    values: tuple[float, ...] | None = None
    name: str | None = None


@dataclass(frozen=True)
class Intervention:
    """One push: exactly one of attribute, feature and vector; None takes the default of what is named."""

    attribute: str | None = None
    feature: FeatureRef | None = None
    vector: VectorRef | None = None
    strength: float | None = None
    op: Operator = "add"
    unit: Unit | None = None
    scope: Scope | None = None
    schedule: Choice | None = None
    layers: tuple[int, ...] | None = None
    direction: Direction = "sae"
    """Which of an attribute's two directions: from SAE features, or the difference of class means (the control)."""
    when: Mapping[str, Any] | None = None
    """Condition (`steerserve.engine.api.conditions`) under which it pushes: judged after each forward, for the next."""
    sha256: str | None = None
    """The SHA-256 that the attribute must have, or the first digits of it; None: whichever is loaded."""
    negate: bool = False
    """Push at minus the attribute's own strength; not with a strength of its own, which has a sign."""
    mandatory: bool = False
    """True if it is not the caller's own: then no limit, control or joint allocation of the row reaches it."""


@dataclass(frozen=True)
class Limits:
    """What a row's own interventions may come to together."""

    max_kl: float | None = None
    """Measured KL from the row without its own interventions, in nats a response token; costs that row beside it."""
    max_predicted_kl: float | None = None
    """The same as calibrated costs predict it, to second order: a forecast, which costs nothing."""
    max_delta: float | None = None
    """|delta| / |h| of the sum of the pushes at a layer, at every position."""
    on_exceed: OnExceed = "clip"


@dataclass(frozen=True)
class TraceParams:
    """What to read while denoising, every `every` steps."""

    attributes: tuple[str, ...] = ()
    every: int = 1
    positions: bool = False
    """Read each position of the response as well as their mean."""
    features: tuple[FeatureRef, ...] = ()
    """Features whose activations are read after the pushes at the layer of their SAE."""


@dataclass(frozen=True)
class Refine:
    """Write stretches of the finished text anew, and keep what the probes of `verdicts` like better."""

    rounds: int = 16
    """Stretches that are tried, one after the other."""
    span: int | None = None
    """Positions of a stretch; None: a third of the response."""
    absent: tuple[str, ...] = ()
    """Those of `verdicts` that the text is wanted not to have."""


@dataclass(frozen=True)
class GenerationParams:
    """One row: one prompt, one sample. Sampler settings left at None are the model's own defaults."""

    prompt: str | tuple[int, ...] = ""
    suffix: str | tuple[int, ...] = ""
    max_tokens: int = 64
    """Length of the response region in tokens: on a full-canvas model a canvas size, not a stop rule. 0, only
    with `prompt_logprobs`: nothing is written."""
    steps: int | None = None
    """Denoising steps; None: one per response token. Under a transfer that they do not bind (`threshold`,
    `entropy_bound`) blocks go on until they are full."""
    block_length: int | None = None
    """Semi-autoregressive blocks of this many tokens; None: the whole response is one block."""
    order: Choice | None = None
    transfer: Choice | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    """Draw from the k likeliest tokens only; 0 or -1: from all; None: the model's own."""
    cfg_scale: float = 0.0
    """Classifier-free guidance by the prompt: logits are u + (cfg_scale + 1)(l - u), u those of the canvas with prompt
    and suffix masked (LLaDA, arXiv 2502.09992, appendix A.2). 0: none, at the cost of one row."""
    cache: Choice | None = None
    """Which keys and values are reused within a block: prefix, dual (Fast-dLLM, arXiv 2505.22618); None: none, which
    is exact."""
    early_exit: bool = False
    """Leave what lies behind the first committed end token unwritten, though gaps remain before it: approximate."""
    seed: int = 0
    row: int = 0
    """Which sample of the seed: two rows of one seed draw different noise, a row and its baseline the same."""
    priority: int = 0
    """Whose turn it is when rows wait: -10, first, to 10, last (lower goes first, as in vLLM)."""
    stop: tuple[str, ...] = ()
    ignore_eos: bool | None = None
    """Never draw a token that ends the text or the turn, so that the response fills its canvas."""
    logits_eos_inf: bool = False
    """Never draw the end of text, but the other tokens that end it (LLaDA's option of that name)."""
    ends_last: bool = False
    """Candidates that end the text or the turn have confidence 0 and so commit last (LLaDA's `confidence_eos_eot_inf`;
    above temperature 0 its code does so of the end of turn alone)."""
    logprobs: bool = False
    """Record each committed token's log-probability at its commitment."""
    top_logprobs: int = 0
    """With `logprobs`: how many of the likeliest tokens to record beside each committed one."""
    prompt_logprobs: bool = False
    """Give the log-probability of each token of the prompt but the first, masked one at a time, with
    `top_logprobs` alternatives; a forward pass a token."""
    tell_steps: bool = False
    """Emit a Stepped event for each of its steps."""
    interventions: tuple[Intervention, ...] = field(default=())
    trace: TraceParams | None = None
    abort_when: Mapping[str, Any] | None = None
    """Condition that ends the row after the step at which it holds: with its best draft where it is being refined, else
    with what is committed, behind the first gap in the receipt only."""
    remask_when: Mapping[str, Any] | None = None
    """`{"condition": ..., "span": ..., "times": ...}`: after a step at which it holds, tokens are masked again."""
    refine: Refine | None = None
    """How often the finished text is tried to be bettered; None: not at all."""
    combine: Combine = "independent"
    """`joint`: one allocation over the attributes pushed decides their gains, instead of a schedule each."""
    limits: Limits | None = None
    control: Control | None = None
    """What is pushed in place of what is named, to tell a direction's effect from that of any push of its size."""
    measure_kl: bool = False
    """Measure the KL from the row without its own interventions, at the cost of one row more."""
    verdicts: tuple[str, ...] = ()
    """Attributes whose probes say of the finished text whether it has them, at the cost of one forward pass more."""
    quality: bool = False
    """Tell the unsteered model's loss on the finished text, at the cost of 8 forward passes more, and how little it
    repeats itself."""


PRIORITIES = (-10, 10)
"""The earliest and the latest priority of a row, as vLLM counts: lower goes first."""


SLICES: Final = 64
"""Slices of progress on which schedules are compiled."""
