"""Checks of a request's settings, each raising an error that names the field, the value and what is allowed."""

from collections.abc import Sequence
from typing import Final

from tokenizers import Tokenizer

from schedulers import Order, Random, Transfer
from schedulers.choice import build
from steerserve.engine.admission.catalogue import Catalogue
from steerserve.engine.api.params import Choice, GenerationParams, TraceParams
from steerserve.engine.api.scoring import MAX_ROUNDS
from steerserve.engine.request.kv_cache import CACHES, FIRST_ALONE, RowCache
from steerserve.errors import RequestError
from steerserve.models import ModelFacts


def check_refine(params: GenerationParams) -> None:
    """Raise RequestError for a refinement that is out of bounds or has nothing to be judged by."""
    asked = params.refine
    if asked is None:
        return
    if type(asked.rounds) is not int or not 1 <= asked.rounds <= MAX_ROUNDS:
        raise RequestError(
            f"refine: rounds must be a whole number from 1 to {MAX_ROUNDS}, got {asked.rounds!r}", "refine.rounds"
        )
    if asked.span is not None and (type(asked.span) is not int or not 1 <= asked.span <= params.max_tokens):
        raise RequestError(
            f"refine: span must be a whole number from 1 to max_tokens ({params.max_tokens}), got {asked.span!r}",
            "refine.span",
        )
    if not params.verdicts:
        raise RequestError("refine keeps what probes like better: name attributes to judge by", "refine")
    unknown = [name for name in asked.absent if name not in params.verdicts]
    if unknown:
        raise RequestError(f"refine: {unknown[0]!r} is not among the attributes judged by", "refine.absent")
    if params.cache is not None:
        raise RequestError("refine cannot go with a cache, which is of one writing of each block", "refine")


def row_cache(
    choice: Choice | None,
    facts: ModelFacts,
    transfer: Transfer,
    guided: bool,
    traced: bool,
    watched: bool = False,
    held: bool = False,
) -> RowCache | None:
    """The cache a request asks for; raises RequestError where it cannot be had, or not beside what else it asks for:
    guidance, a trace, what is decided by readings after each forward, or limits and measures of the KL."""
    if choice is None:
        return None
    try:
        settings = build("cache", CACHES, choice)
    except ValueError as error:
        raise RequestError(str(error), "cache") from error
    if facts.keys is None:
        raise RequestError(
            f"the {facts.family} family has no cache of keys and values; leave it out or null, which is exact", "cache"
        )
    if settings.first_alone and facts.shift != 1:
        raise RequestError(
            f"first_alone is for a family that decides tokens one position to the left (dream), not {facts.family}",
            "cache",
        )
    if settings.first_alone and not isinstance(transfer, FIRST_ALONE):
        raise RequestError("first_alone goes with the transfers threshold and timesteps only", "cache")
    if guided:
        raise RequestError("a cache cannot go with cfg_scale above 0: leave one of them out", "cache")
    if traced:
        raise RequestError(
            "a trace reads the states of the whole response at the steps it names, of which a cache computes but a "
            "part: leave one of them out",
            "cache",
        )
    if watched:
        raise RequestError(
            "conditions and the feedback schedule read states after every forward, of which a cache computes but a "
            "part: leave one of them out",
            "cache",
        )
    if held:
        raise RequestError(
            "limits and measure_kl hold or measure every forward against the exact one: leave them or the cache out",
            "cache",
        )
    return RowCache(settings)


def check_early_exit(params: GenerationParams, facts: ModelFacts, revises: bool, suffix: int) -> None:
    """Raise RequestError where what lies behind an end token is needed; revises: whether committed tokens may be taken
    back; suffix: tokens after the response."""
    if not isinstance(params.early_exit, bool):
        raise RequestError(f"early_exit must be true or false, got {params.early_exit!r}", "early_exit")
    if not params.early_exit:
        return
    if suffix:
        raise RequestError("early_exit cannot go with a suffix, which stands behind the response", "early_exit")
    if revises:
        raise RequestError(
            "early_exit cannot go with what takes tokens back: an end token might be one of them",
            "early_exit",
        )
    if facts.sigma is not None:
        raise RequestError(
            f"early_exit cannot go with the {facts.family} family, whose noise level is that of the whole canvas",
            "early_exit",
        )


def blocks_of(params: GenerationParams, facts: ModelFacts, prompt: int, suffix: int) -> tuple[int, int]:
    """The length of a row's blocks, and how much of the first one the prompt fills; prompt, suffix: their tokens.

    Raises RequestError for a length that does not fit the response, or the model's own blocks.
    """
    if facts.block is None:
        block = params.max_tokens if params.block_length is None else params.block_length
        _whole("block_length", block, 1, params.max_tokens)
        if params.max_tokens % block:
            raise RequestError(
                f"block_length must divide max_tokens ({params.max_tokens}), got {block}", "block_length"
            )
        return block, 0
    block = facts.block if params.block_length is None else params.block_length
    _whole("block_length", block, 1, facts.block)
    if facts.block % block:
        raise RequestError(
            f"block_length must divide the {facts.block} tokens of a block of this model, got {block}", "block_length"
        )
    if suffix:
        raise RequestError("this model looks at no later block: a suffix would not be seen", "suffix")
    return block, prompt % block


def check_method(facts: ModelFacts, order: Order, transfer: Transfer, blocks: int) -> None:
    """Raise RequestError for an order or transfer that the family's way of predicting does not allow."""
    of_ratios = "mass" in transfer.needs
    if of_ratios and facts.parameterisation != "score":
        raise RequestError(
            f"this transfer needs a model that predicts ratios (SEDD); the {facts.family} family predicts tokens: "
            f"use any but analytic and euler",
            "transfer",
        )
    if facts.parameterisation == "score":
        if not of_ratios:
            raise RequestError(
                f"the {facts.family} family predicts the rate at which each position unmasks, so only the transfers "
                f"analytic and euler can tell how many do",
                "transfer",
            )
        if not isinstance(order, Random):
            raise RequestError(
                f"the {facts.family} family predicts the rate at which each position unmasks, which leaves no choice "
                f"of order: only 'random' is allowed",
                "order",
            )
    if facts.sigma is not None and blocks > 1:
        raise RequestError(
            "this model is told the noise level of its whole canvas: block_length must be max_tokens or left out",
            "block_length",
        )


def _check_guidance(params: GenerationParams, facts: ModelFacts, given: int) -> None:
    """Raise RequestError for guidance that is out of bounds or has nothing to be guided by; given: tokens of text."""
    scale = params.cfg_scale
    if isinstance(scale, bool) or not isinstance(scale, int | float) or not 0 <= scale <= 100:
        raise RequestError(f"cfg_scale must be 0 to 100, got {scale!r}", "cfg_scale")
    if scale > 0 and facts.parameterisation == "score":
        raise RequestError(f"cfg_scale is for models that predict tokens; {facts.family} predicts ratios", "cfg_scale")
    if scale > 0 and given == 0:
        raise RequestError("cfg_scale guides by the prompt: give a prompt or a suffix", "cfg_scale")


def _ids(given: str | Sequence[int], param: str, tokenizer: Tokenizer, catalogue: Catalogue) -> list[int]:
    """Token ids of a text, or ids as given; a mask is refused, since it would be denoised as part of the response."""
    facts = catalogue.facts
    if isinstance(given, str):
        if not given.isprintable() and any("\ud800" <= character <= "\udfff" for character in given):
            raise RequestError(f"{param} is not valid Unicode: it holds a lone surrogate", param)
        ids: list[int] = tokenizer.encode(given, add_special_tokens=False).ids
    else:
        ids = list(given)
        for token in ids:
            if isinstance(token, bool) or not isinstance(token, int) or not 0 <= token < facts.vocab_size:
                raise RequestError(f"token ids must be 0 to {facts.vocab_size - 1}, got {token}", param)
    if facts.mask_id in ids:
        raise RequestError(f"{param} holds the mask token (id {facts.mask_id}); leave out what is to be written", param)
    return ids


def _whole(name: str, value: int, low: int, high: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise RequestError(f"{name} must be a whole number from {low} to {high}, got {value!r}", name)


MAX_READINGS: Final = 1 << 20
"""Numbers read by position that a row may keep until its answer: about 32 MB."""


def check_readings(trace: TraceParams | None, positions: int, steps: int) -> None:
    """Raise RequestError for a trace by position, of so many positions and at most so many steps, that is too large."""
    if trace is None or not trace.positions:
        return
    read = len(set(trace.attributes)) + len(set(trace.features))
    count = read * positions * -(-steps // trace.every)
    if count > MAX_READINGS:
        raise RequestError(
            f"a trace of each position is {count} numbers, attributes and features x max_tokens x steps read: at most "
            f"{MAX_READINGS} are kept; take a larger trace.every",
            "trace.positions",
        )


ALONE: Final = {
    "limits": "which are of the response",
    "cache": "which is of one writing of each block",
    "cfg_scale": "which is by the prompt",
}
"""What cannot go with the scores of a prompt, and why."""


UNWRITTEN: Final = ("trace", "abort_when", "remask_when", "refine", "verdicts", "quality", "limits", "measure_kl")
"""What only a response can have."""


def scored_places(prompt: Sequence[int], facts: ModelFacts) -> range:
    """The places of a prompt that are scored: all but the first token that the caller gave, and the BOS before it. That
    the first has none is what clients expect, since models that read from left to right have nothing to tell it by."""
    return range(1 + (facts.bos_id is not None), len(prompt))


def check_scoring(params: GenerationParams, given: int, max_steps: int) -> None:
    """Raise RequestError for a row that writes nothing and yet asks for something of its response, and for scores that
    cannot be had; given: tokens of the prompt."""
    if params.max_tokens == 0:
        for name in UNWRITTEN:
            if getattr(params, name):
                raise RequestError(f"{name} needs a response, and max_tokens is 0", name)
    if not params.prompt_logprobs:
        return
    for name, reason in ALONE.items():
        if getattr(params, name):
            raise RequestError(f"the prompt's log-probabilities cannot go with {name}, {reason}", name)
    if given - 1 > max_steps:
        raise RequestError(
            f"a prompt of {given} tokens takes {given - 1} forward passes for its log-probabilities; at most "
            f"{max_steps} are made",
            "prompt",
        )
