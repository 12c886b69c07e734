"""From a validated request to the rows an engine runs, and from an engine's complaint back to the request's field."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from steerserve.engine.api.params import FeatureRef, GenerationParams, Limits, Refine, TraceParams
from steerserve.engine.api.variants import baseline_of
from steerserve.errors import RequestError, TooLongError
from steerserve.server.protocol.generation import CompletionRequest, GenerationRequest
from steerserve.server.protocol.steering import Change, Trace
from steerserve.server.rows.criteria import explained, ranking_of
from steerserve.server.rows.interventions import path_of, place_of, pushes
from steerserve.server.rows.ranking import Ranking

Prompt = str | tuple[int, ...]
Admit = Callable[[GenerationParams], Any]
"""Admits one row, as `Engine.admit` does."""


@dataclass(frozen=True)
class Row:
    """One row of a request: what it runs and which part of the answer it is."""

    params: GenerationParams
    choice: int
    """Index of the choice it belongs to; choices count through the prompts, and through n within each. Where more are
    made than are answered, the number of the candidate, which counts through best_of in the same way."""
    prompt: int
    """Index of its prompt."""
    baseline: bool = False
    """True if it is the unsteered twin of its choice."""
    asked: int | None = None
    """The max_tokens that was asked for, where less of it fits on the canvas and `params` has what does."""

    @property
    def notes(self) -> list[str]:
        """Notes on what was done otherwise than asked."""
        if self.asked is None:
            return []
        return [f"max_tokens is {self.params.max_tokens}, not {self.asked}: more does not fit on the canvas"]


def rows_of(body: GenerationRequest, seed: int, max_rows: int, prompts: Sequence[Prompt] | None = None) -> list[Row]:
    """One row a prompt and sample, in order of choices, each followed by its twin where a baseline is asked for.

    A twin differs from its choice in the push alone: it has its seed and its row number, so both draw the same noise,
    and its order, which reads the attribute that its choice's reads. prompts: those of a request that has none of its
    own.
    """
    prompts = prompts_of(body) if prompts is None else prompts
    ranking = ranking_of(body)
    name, made = ("best_of", ranking.best_of) if ranking.chooses else ("n", body.n)
    twins = 2 if body.steering.baseline else 1
    count = len(prompts) * made * twins
    if count > max_rows:
        raise RequestError(
            f"{len(prompts)} prompts x {name} of {made}{' x 2 for the baseline' * (twins - 1)} are {count} rows; "
            f"a request may have {max_rows}",
            name if made > 1 else "prompt",
        )
    common = _params(body, seed, ranking)
    if body.steering.baseline and not common.max_tokens:
        raise RequestError("steering.baseline needs a response, and max_tokens is 0", "steering.baseline")
    rows = []
    for choice in range(len(prompts) * made):
        prompt = choice // made
        # One row tells for all of its prompt, but in a stream, where each choice is told as soon as it has ended, and
        # where rows have nothing else to tell.
        scored = common.prompt_logprobs and (body.stream or choice % made == 0 or not common.max_tokens)
        params = replace(common, prompt=prompts[prompt], row=choice, prompt_logprobs=scored)
        rows.append(Row(params, choice, prompt))
        if body.steering.baseline:
            # Of a twin no log-probabilities are told.
            rows.append(Row(replace(baseline_of(params), prompt_logprobs=False), choice, prompt, baseline=True))
    return rows


def admit_fitting(admit_one: Admit, rows: Sequence[Row], body: GenerationRequest) -> tuple[list[Row], list[Any]]:
    """Admit every row or none, a row whose response is too long for the canvas with as much of it as fits.

    Clients send a max_tokens of their own that nobody chose. Who chose `diffusion` or `ignore_eos` counts on the
    length, and is told by the error.
    """
    cut = not body.ignore_eos and "diffusion" not in body.model_fields_set
    fitting, admitted = [], []
    for row in rows:
        try:
            [one] = admit(admit_one, [row], body)
        except TooLongError as error:
            if not cut:
                raise
            params = replace(row.params, max_tokens=error.fits)
            row = replace(row, params=params, asked=row.params.max_tokens)
            [one] = admit(admit_one, [row], body)
        fitting.append(row)
        admitted.append(one)
    return fitting, admitted


def admit(admit_one: Admit, rows: Sequence[Row], body: GenerationRequest | Change) -> list[Any]:
    """Admit every row or none: the first complaint is raised anew with the path the field has in the request. Where
    attributes are read again meanwhile, all are admitted again, so that they have the same."""
    while True:
        admitted = _admit_each(admit_one, rows, body)
        if len({one.plan.get("revision") for one in admitted}) <= 1:
            return admitted


def _admit_each(admit_one: Admit, rows: Sequence[Row], body: GenerationRequest | Change) -> list[Any]:
    admitted = []
    for row in rows:
        try:
            admitted.append(admit_one(row.params))
        except RequestError as error:
            if error.param is not None and error.param.startswith("verdicts"):
                raise explained(error, body) from error
            place = place_of(error.param, body.steering if isinstance(body, GenerationRequest) else body)
            if place is not None:
                error.args = (f"{place}: {error}",)
            error.param = _request_path(error.param, row, body)
            raise
    return admitted


_SECTIONS = {
    "trace": "steering.",
    "abort_when": "steering.",
    "remask_when": "steering.",
    "refine": "steering.",
    "combine": "steering.",
    "limits": "steering.",
    "control": "steering.",
    "measure_kl": "steering.",
    "quality": "steering.",
    "steps": "diffusion.",
    "block_length": "diffusion.",
    "order": "diffusion.",
    "transfer": "diffusion.",
    "ends_last": "diffusion.",
    "logits_eos_inf": "diffusion.",
    "cfg_scale": "diffusion.",
    "cache": "diffusion.",
    "early_exit": "diffusion.",
}


def _request_path(param: str | None, row: Row, body: GenerationRequest | Change) -> str | None:
    if param is None:
        return None
    head = re.split(r"[.\[]", param, maxsplit=1)[0]
    if head == "prompt_logprobs":
        return "echo"
    if head == "interventions":
        return path_of(param, body.steering if isinstance(body, GenerationRequest) else body)
    if head == "prompt" and not isinstance(body, CompletionRequest):
        return "messages"
    if head == "prompt" and _has_many_prompts(body):
        return f"prompt[{row.prompt}]{param.removeprefix('prompt')}"
    if head == "max_tokens" and isinstance(body, GenerationRequest) and body.max_tokens is None:
        return "max_completion_tokens" if body.max_completion_tokens is not None else "max_tokens"
    return _SECTIONS.get(head, "") + param


def _has_many_prompts(body: Any) -> bool:
    return isinstance(body.prompt, list) and not isinstance(body.prompt[0], int)


def prompts_of(body: Any) -> list[Prompt]:
    """The prompts of a completion."""
    if body.prompt is None:
        return [""]
    if isinstance(body.prompt, str):
        return [body.prompt]
    if not _has_many_prompts(body):
        return [_text_or_tokens(body.prompt)]
    return [_text_or_tokens(prompt) for prompt in body.prompt]


def _text_or_tokens(value: Any) -> Prompt:
    return value if isinstance(value, str) else tuple(value)


def _params(body: GenerationRequest, seed: int, ranking: Ranking) -> GenerationParams:
    diffusion = body.diffusion
    stop = body.stop if body.stop is not None else []
    trace, limits = body.steering.trace, body.steering.limits
    suffix = body.suffix if isinstance(body, CompletionRequest) and body.suffix is not None else ""
    return GenerationParams(
        suffix=_text_or_tokens(suffix),
        max_tokens=body.length,
        steps=diffusion.steps,
        block_length=diffusion.block_length,
        order=diffusion.order,
        transfer=diffusion.transfer,
        temperature=body.temperature,
        top_p=body.top_p,
        top_k=body.top_k,
        cfg_scale=diffusion.cfg_scale,
        cache=diffusion.cache,
        early_exit=diffusion.early_exit,
        ends_last=diffusion.ends_last,
        logits_eos_inf=diffusion.logits_eos_inf,
        priority=body.priority,
        seed=seed,
        ignore_eos=body.ignore_eos if diffusion.ignore_eos is None else diffusion.ignore_eos,
        stop=(stop,) if isinstance(stop, str) else tuple(stop),
        logprobs=body.alternatives is not None or ranking.by_logprobs,
        top_logprobs=body.alternatives or 0,
        prompt_logprobs=body.scores_prompt,
        tell_steps=body.stream_options is not None and bool(body.stream_options.continuous_usage_stats),
        interventions=tuple(one for one, _ in pushes(body.steering)),
        combine=body.steering.combine,
        limits=Limits(**limits.model_dump()) if limits is not None else None,
        control=body.steering.control,
        measure_kl=body.steering.measure_kl,
        trace=None if trace is None else _trace(trace),
        abort_when=body.steering.abort_when,
        remask_when=body.steering.remask_when,
        refine=_refine(body, ranking),
        verdicts=tuple(wish.attribute for wish in ranking.wishes or ()),
        quality=bool(body.steering.quality),
    )


def _trace(asked: Trace) -> TraceParams:
    features = tuple(FeatureRef(one.sae, one.index) for one in asked.features)
    return TraceParams(tuple(asked.attributes), asked.every, asked.positions, features)


def _refine(body: GenerationRequest, ranking: Ranking) -> Refine | None:
    asked = body.steering.refine
    if asked is None:
        return None
    if body.steering.rank == []:
        raise RequestError(
            "steering.rank: must name at least one attribute for steering.refine to go by, got []", "steering.rank"
        )
    if not ranking.wishes:
        raise RequestError(
            "steering.refine keeps what probes like better: push an attribute by name, or name some in steering.rank",
            "steering.refine",
        )
    absent = tuple(wish.attribute for wish in ranking.wishes if wish.absent)
    return Refine(asked.rounds, asked.span, absent)
