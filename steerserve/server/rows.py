"""From a validated request to the rows an engine runs, and from an engine's complaint back to the request's field."""

import dataclasses
import re
from dataclasses import dataclass
from typing import Any

from steerserve.engine.base import Engine
from steerserve.engine.params import FeatureRef, GenerationParams, Intervention, Scope, TraceParams, VectorRef
from steerserve.errors import RequestError
from steerserve.server import protocol
from steerserve.server.protocol import CompletionRequest


@dataclass(frozen=True)
class Row:
    """One row of a request: what it runs and which part of the answer it is."""

    params: GenerationParams
    choice: int
    """Index of the choice it belongs to; choices count through the prompts, and through n within each."""
    prompt: int
    """Index of its prompt."""
    baseline: bool = False
    """Whether it is the unsteered twin of its choice."""


def rows_of(body: CompletionRequest, seed: int, max_rows: int) -> list[Row]:
    """One row a prompt and sample, in order of choices, each followed by its twin where a baseline is asked for.

    A twin has the seed and the row number of its choice, so both draw the same noise.
    """
    prompts = _prompts(body)
    twins = 2 if body.steering.baseline else 1
    count = len(prompts) * body.n * twins
    if count > max_rows:
        raise RequestError(
            f"{len(prompts)} prompts x n of {body.n}{' x 2 for the baseline' * (twins - 1)} are {count} rows; "
            f"a request may have {max_rows}",
            "n" if body.n > 1 else "prompt",
        )
    common = _params(body, seed)
    rows = []
    for choice in range(len(prompts) * body.n):
        prompt = choice // body.n
        params = dataclasses.replace(common, prompt=prompts[prompt], row=choice)
        rows.append(Row(params, choice, prompt))
        if body.steering.baseline:
            rows.append(Row(dataclasses.replace(params, interventions=(), trace=None), choice, prompt, baseline=True))
    return rows


def admit(engine: Engine, rows: list[Row], body: CompletionRequest) -> list[Any]:
    """Admit every row or none: the first complaint is raised anew with the path the field has in the request."""
    admitted = []
    for row in rows:
        try:
            admitted.append(engine.admit(row.params))
        except RequestError as error:
            raise type(error)(str(error), _request_path(error.param, row, body)) from error
    return admitted


_SECTIONS = {
    "interventions": "steering.",
    "trace": "steering.",
    "steps": "diffusion.",
    "block_length": "diffusion.",
    "order": "diffusion.",
    "transfer": "diffusion.",
}


def _request_path(param: str | None, row: Row, body: CompletionRequest) -> str | None:
    if param is None:
        return None
    head = re.split(r"[.\[]", param, maxsplit=1)[0]
    if head == "prompt" and _has_many_prompts(body):
        return f"prompt[{row.prompt}]{param.removeprefix('prompt')}"
    return _SECTIONS.get(head, "") + param


def _has_many_prompts(body: CompletionRequest) -> bool:
    return isinstance(body.prompt, list) and not isinstance(body.prompt[0], int)


def _prompts(body: CompletionRequest) -> list[str | tuple[int, ...]]:
    if body.prompt is None:
        return [""]
    if isinstance(body.prompt, str):
        return [body.prompt]
    if not _has_many_prompts(body):
        return [_text_or_tokens(body.prompt)]
    return [_text_or_tokens(prompt) for prompt in body.prompt]


def _text_or_tokens(value: Any) -> str | tuple[int, ...]:
    return value if isinstance(value, str) else tuple(value)


def _params(body: CompletionRequest, seed: int) -> GenerationParams:
    diffusion, steering = body.diffusion, body.steering
    stop = body.stop if body.stop is not None else []
    trace = steering.trace
    return GenerationParams(
        suffix=_text_or_tokens(body.suffix) if body.suffix is not None else "",
        max_tokens=body.max_tokens,
        steps=diffusion.steps,
        block_length=diffusion.block_length,
        order=diffusion.order,
        transfer=diffusion.transfer,
        temperature=body.temperature,
        top_p=body.top_p,
        seed=seed,
        ignore_eos=diffusion.ignore_eos,
        stop=(stop,) if isinstance(stop, str) else tuple(stop),
        logprobs=body.logprobs is not None,
        interventions=tuple(_intervention(one) for one in steering.interventions),
        trace=TraceParams(tuple(trace.attributes), trace.every) if trace is not None else None,
    )


def _intervention(one: protocol.Intervention) -> Intervention:
    return Intervention(
        attribute=one.attribute,
        feature=FeatureRef(one.feature.sae, one.feature.index) if one.feature is not None else None,
        vector=VectorRef(one.vector.layer, tuple(one.vector.values)) if one.vector is not None else None,
        strength=one.strength,
        op=one.op,
        unit=one.unit,
        scope=_scope(one.scope),
        schedule=one.schedule,
        layers=tuple(one.layers) if one.layers is not None else None,
        direction=one.direction,
    )


def _scope(scope: Any) -> Scope | None:
    if isinstance(scope, protocol.Span):
        return (scope.positions[0], scope.positions[1])
    named: Scope | None = scope
    return named
