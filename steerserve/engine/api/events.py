"""The event log: everything an engine says about its requests. Every view of a generation is made from it."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, Literal, get_args

FinishReason = Literal["stop", "length", "content_filter"]
FINISH_REASONS: Final[tuple[FinishReason, ...]] = get_args(FinishReason)


@dataclass(frozen=True)
class Stepped:
    """A row has made a step; comes before everything else that the step led to. Only of rows that ask for it
    (`tell_steps`)."""

    request_id: str
    steps: int
    """Steps that it has made, this one among them."""
    forward_passes: int
    """Forward passes made for it."""


@dataclass(frozen=True)
class Committed:
    """Positions of the response (0-based) that became tokens at this step; `logprobs` only where asked for.

    A position is committed again only after a Revised event has named it."""

    request_id: str
    step: int
    positions: tuple[int, ...]
    tokens: tuple[int, ...]
    logprobs: tuple[float, ...] | None = None


@dataclass(frozen=True)
class Revised:
    """Positions of the response whose tokens were taken back at this step: they are masked again, and may be committed
    anew at a later one. Only a request whose plan says that it `revises` has such events."""

    request_id: str
    step: int
    positions: tuple[int, ...]


@dataclass(frozen=True)
class Trace:
    """What was read of the steered row at this step.

    Of an attribute the mean of <h, v> over the response, in residual units, of the state as it arrives at the
    attribute's first layer: before this step's push there, behind those of earlier layers. Of a feature, named
    `sae:index`, its mean activation after the pushes there, over the positions that its SAE is for: masked or committed
    ones of the response, or all of it where the SAE does not say.
    """

    request_id: str
    step: int
    progress: float
    values: dict[str, float]
    positions: dict[str, tuple[float, ...]] | None = None
    """The same of the state that decides each position of the response, whose mean `values` has; only where asked
    for."""


@dataclass(frozen=True)
class Steered:
    """From this step on other interventions hold than before; `interventions` is what the plan says of them."""

    request_id: str
    step: int
    interventions: tuple[dict[str, Any], ...]


WORDLESS: Final = -30.0
"""Log-odds in the verdicts on a text without a single token, which shows nothing."""


@dataclass(frozen=True)
class Scored:
    """A token and its log-probability, with the likeliest tokens at its place and theirs, largest first."""

    token: int
    logprob: float
    top_logprobs: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class Quality:
    """Quality of a finished text; one without the other misleads, since a loss falls where a text repeats itself."""

    loss: float | None
    """The unsteered model's loss on its tokens, between prompt and suffix, in nats per token; None without tokens."""
    distinct_pairs: float
    """Share of its pairs of neighbouring tokens that are different from each other."""


@dataclass(frozen=True)
class Result:
    """A finished row."""

    tokens: tuple[int, ...]
    """Response token ids, cut before the first EOS; a stop string cuts only `text`. A position that is still masked
    at the end, because the model drew its own mask token there, is left out."""
    text: str
    """The response decoded, cut before the first stop string or EOS."""
    finish_reason: FinishReason
    """`content_filter`: its own `abort_when` ended it; the text is then its best draft, or the tokens committed without
    a gap, the others being in the receipt."""
    steps: int
    forward_passes: int
    prompt_tokens: int
    receipt: dict[str, Any] | None
    """What steering was in fact applied, and what was approximate; None for a request that asked for neither."""
    trace: tuple[Trace, ...] = ()
    logprobs: tuple[float, ...] | None = None
    """Log-probability of each of `tokens` when it was committed, for the last time."""
    top_logprobs: tuple[tuple[tuple[int, float], ...], ...] | None = None
    """For each of `tokens` the likeliest tokens of that step with their log-probabilities, largest first; only where
    asked for."""
    end: Scored | None = None
    """The end token that ended it, which is none of `tokens`; only with `logprobs`."""
    prompt: tuple[Scored | None, ...] | None = None
    """The tokens of the prompt, BOS included; None for the first that the caller gave and what stands before it. Only
    where asked for."""
    verdicts: Mapping[str, float] | None = None
    """Log-odds in nats that the text has each attribute, by the attribute's probe; only where asked for."""
    quality: Quality | None = None
    """Only where asked for."""


@dataclass(frozen=True)
class Done:
    """Terminal: the row finished."""

    request_id: str
    result: Result


@dataclass(frozen=True)
class Failed:
    """Terminal: the row was aborted, went over a limit of its own, or its step failed; `message` holds no internals."""

    request_id: str
    message: str
    aborted: bool = False
    limit: str | None = None
    """The field of the request whose limit it went over."""
    unsteered: bool = False
    """True if it ended because a push that was due did not change the states it is for: steering does not take."""


Event = Stepped | Committed | Revised | Trace | Steered | Done | Failed

__all__ = [
    "FINISH_REASONS",
    "WORDLESS",
    "Committed",
    "Done",
    "Event",
    "Failed",
    "Quality",
    "Result",
    "Revised",
    "Scored",
    "Steered",
    "Stepped",
    "Trace",
]
