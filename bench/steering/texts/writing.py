"""Rows of a cell through the engine: what a client would ask for, admitted as a client's request is."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Final

from bench.steering.plan.cells import Cell
from steerserve.engine.api.base import Engine
from steerserve.engine.api.events import Done, Failed
from steerserve.engine.api.params import FeatureRef, GenerationParams, Intervention, Refine
from steerserve.engine.api.scoring import likelihood
from steerserve.errors import RequestError, SteerserveError

BENCH_ONLY: Final = ("interventions", "context", "best_of", "probes")
"""Fields of a cell's request that are not the engine's under these names."""
APART: Final = 1 << 20
"""Between the row numbers of two candidates of a text, the first of which draws the noise of every method's row."""


@dataclass(frozen=True)
class Row:
    """One finished text."""

    text: str
    tokens: tuple[int, ...]
    receipt: Mapping[str, Any]
    """Empty where nothing was asked for."""
    verdicts: Mapping[str, float] = field(default_factory=dict)
    """Log-odds by attribute, where texts are ranked."""


@dataclass(frozen=True)
class Passage:
    """A held-out text cut in three, in token ids: the middle is to be filled in."""

    before: tuple[int, ...]
    middle: tuple[int, ...]
    after: tuple[int, ...]


def compose(
    engine: Engine, cell: Cell, seed: int, passages: Sequence[Passage] = ()
) -> tuple[list[Row], dict[str, Any]]:
    """The rows of a cell, row i of every cell drawing the same noise, and the plan of the first.

    Raises RequestError where the engine does not take the request, before anything is written.
    """
    drawn = [row + APART * candidate for row in range(cell.texts) for candidate in range(cell.candidates)]
    requests = [engine.admit(params(cell, seed, row, passages)) for row in drawn]
    engine.add(requests)
    place = {request.id: i for i, request in enumerate(requests)}
    found: dict[int, Row] = {}
    while len(found) < len(requests):
        for event in engine.step():
            match event:
                case Done():
                    result = event.result
                    found[place[event.request_id]] = Row(
                        result.text, result.tokens, result.receipt or {}, result.verdicts or {}
                    )
                case Failed():
                    raise SteerserveError(f"row {place[event.request_id]} of {cell.task} failed: {event.message}")
                case _:
                    pass
    groups = [range(first, first + cell.candidates) for first in range(0, len(requests), cell.candidates)]
    return [max((found[i] for i in group), key=_score) for group in groups], requests[0].plan


def params(cell: Cell, seed: int, row: int, passages: Sequence[Passage] = ()) -> GenerationParams:
    """The request of one row; raises RequestError for a field that this version of the engine does not know."""
    asked = {name: value for name, value in cell.request.items() if name not in BENCH_ONLY}
    asked |= {"seed": seed, "row": row}
    if passages:
        asked |= {"prompt": passages[row].before, "suffix": passages[row].after}
    pushes = cell.request["interventions"]
    # It takes a second forward pass, so the first rows stand for the others.
    if pushes and row < cell.kl_texts and _knows(GenerationParams, "measure_kl"):
        asked["measure_kl"] = True
    if "verdicts" in asked:
        asked["verdicts"] = tuple(asked["verdicts"])
    if "refine" in asked:
        asked["refine"] = Refine(**asked["refine"])
    _check(GenerationParams, asked, "the request")
    return GenerationParams(**asked, interventions=tuple(_intervention(push) for push in pushes))


def measured_kl(receipt: Mapping[str, Any], tokens: int) -> float | None:
    """Nats a response token by which steering changed what was drawn from; None where it was not measured."""
    value = receipt.get("measured_kl")
    return None if value is None or not tokens else float(value)


def _intervention(push: Mapping[str, Any]) -> Intervention:
    _check(Intervention, push, "an intervention")
    asked = dict(push)
    if "feature" in asked:
        asked["feature"] = FeatureRef(**asked["feature"])
    return Intervention(**asked)


def _check(kind: type, asked: Mapping[str, Any], what: str) -> None:
    if unknown := [name for name in asked if not _knows(kind, name)]:
        raise RequestError(f"{what} has no field {unknown[0]!r} in this version", unknown[0])


def _knows(kind: Any, name: str) -> bool:
    return name in {one.name for one in fields(kind)}


def _score(row: Row) -> float:
    """Log-probability that the text has all the attributes that it is ranked by."""
    return likelihood(row.verdicts)
