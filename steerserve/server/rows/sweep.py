"""The rows of a sweep: one a cell of its grid, as a request of its own would have it, and one without steering."""

import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

from steerserve.engine.api.events import Result
from steerserve.engine.api.variants import baseline_of
from steerserve.errors import RequestError
from steerserve.server.protocol.generation import CompletionRequest
from steerserve.server.protocol.steering import Intervention, Steering
from steerserve.server.protocol.sweep import AXES, Sweep
from steerserve.server.rows.rows import Admit, Row, admit_fitting, rows_of

_VARIED: Final = re.compile(r"steering\.interventions\[(\d+)\]\.(attribute|schedule|strength)(.*)", re.DOTALL)


@dataclass(frozen=True)
class Cell:
    """One combination of values."""

    places: Mapping[str, int]
    """By axis, which of its values it has."""
    told: Mapping[str, Any]
    """The fields of the intervention that it sets."""
    body: CompletionRequest
    """The request that asks for this cell alone."""


def cells(body: CompletionRequest, sweep: Sweep) -> Iterator[Cell]:
    """The cells of a grid, the last axis the fastest; raises RequestError for an intervention that is not there."""
    steering = body.steering
    if sweep.intervention >= len(steering.interventions):
        raise RequestError(
            f"sweep.intervention must be below the {len(steering.interventions)} interventions of "
            f"steering.interventions, got {sweep.intervention}",
            "sweep.intervention",
        )
    varied = steering.interventions[sweep.intervention]
    if sweep.attributes is not None and varied.attribute is None:
        raise RequestError(
            f"sweep.attributes needs an attribute in interventions[{sweep.intervention}] to take the place of",
            "sweep.attributes",
        )
    for places in itertools.product(*(range(len(getattr(sweep, axis))) for axis in sweep.axes)):
        at = dict(zip(sweep.axes, places, strict=True))
        told = {AXES[axis]: getattr(sweep, axis)[place] for axis, place in at.items()}
        changes = told | ({"negate": False} if "strength" in told else {})
        yield Cell(at, told, _with(body, sweep.intervention, varied.model_copy(update=changes)))


def admit_sweep(
    admit_one: Admit, body: CompletionRequest, sweep: Sweep, seed: int, most: int
) -> tuple[list[Row], list[Any]]:
    """Admit the row of every cell and, last, that of the baseline, or none; all by the same attributes."""
    _check(body, sweep, most)
    grid = list(cells(body, sweep))
    while True:
        rows, admitted = list[Row](), list[Any]()
        for choice, cell in enumerate(grid):
            try:
                [row], [one] = admit_fitting(admit_one, rows_of(cell.body, seed, 1), cell.body)
            except RequestError as error:
                error.param = _param(error.param, sweep, cell)
                raise
            rows.append(replace(row, choice=choice))
            admitted.append(one)
        twin = replace(rows[0], params=baseline_of(rows[0].params), choice=len(grid), baseline=True)
        rows.append(twin)
        admitted.append(admit_one(twin.params))
        if len({one.plan.get("revision") for one in admitted}) <= 1:
            return rows, admitted


def grid_told(
    body: CompletionRequest, sweep: Sweep, results: Sequence[Result], baseline: Result, verdicts: Sequence[Any]
) -> dict[str, Any]:
    """What an answer says of a grid: its axes, and of each cell the values, the quality of its text, the verdicts on
    it, and `distance`, the share of tokens that are others than those at their place in the baseline."""
    told = []
    for index, (cell, result, verdict) in enumerate(zip(cells(body, sweep), results, verdicts, strict=True)):
        shown = {"index": index} | dict(cell.told) | {"distance": distance(result.tokens, baseline.tokens)}
        told.append(shown | quality_told(result) | verdict)
    return {"intervention": sweep.intervention, "axes": sweep.axes, "cells": told}


def quality_told(result: Result) -> dict[str, Any]:
    """The quality of a text as JSON; nothing where it was not asked for."""
    if result.quality is None:
        return {}
    return {"loss": result.quality.loss, "distinct_pairs": result.quality.distinct_pairs}


def distance(tokens: Sequence[int], others: Sequence[int]) -> float:
    """Share of places, of the longer of two texts, at which they do not have the same token."""
    longest = max(len(tokens), len(others))
    same = sum(one == other for one, other in zip(tokens, others, strict=False))
    return 1 - same / longest if longest else 0.0


def _with(body: CompletionRequest, index: int, one: Intervention) -> CompletionRequest:
    """The request with another intervention in the place of one, without its sweep."""
    changed = list(body.steering.interventions)
    changed[index] = one
    quality = body.steering.quality is not False
    steering: Steering = body.steering.model_copy(update={"interventions": changed, "quality": quality})
    return body.model_copy(update={"steering": steering.without_places(), "sweep": None})


def _check(body: CompletionRequest, sweep: Sweep, most: int) -> None:
    for name, given in (("n", body.n > 1), ("best_of", (body.best_of or 1) > 1), ("stream", body.stream)):
        if given:
            raise RequestError(f"{name} cannot go with sweep, which has one text a cell, told at its end", name)
    if body.steering.baseline:
        raise RequestError("steering.baseline cannot go with sweep, which has one baseline", "steering.baseline")
    if isinstance(body.prompt, list) and not isinstance(body.prompt[0], int) and len(body.prompt) > 1:
        raise RequestError(f"prompt must be a single one with sweep, got {len(body.prompt)}", "prompt")
    if not body.length:
        raise RequestError("sweep needs a response, and max_tokens is 0", "sweep")
    count = 1
    for axis in sweep.axes:
        count *= len(getattr(sweep, axis))
    if count + 1 > most:
        raise RequestError(
            f"sweep: {' x '.join(str(len(getattr(sweep, axis))) for axis in sweep.axes)} cells and a baseline are "
            f"{count + 1} rows; a request may have {most}",
            "sweep",
        )


def _param(param: str | None, sweep: Sweep, cell: Cell) -> str | None:
    """The path of a field that a cell sets is that of the value in the sweep."""
    found = _VARIED.fullmatch(param or "")
    if found is None or int(found[1]) != sweep.intervention or found[2] not in cell.told:
        return param
    axis = next(axis for axis, field in AXES.items() if field == found[2])
    return f"sweep.{axis}[{cell.places[axis]}]{found[3]}"
