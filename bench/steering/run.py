"""Run the cells of a plan that are not there yet, saying how far it is."""

import json
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bench.steering.plan.cells import INFILL, Cell
from bench.steering.plan.settings import Settings
from bench.steering.records import Store
from bench.steering.texts.measure import Judges, measure
from bench.steering.texts.writing import Passage, compose
from steerserve.calibrate.texts.labelled import held_out_texts
from steerserve.engine.engine import DiffusionEngine
from steerserve.errors import ArtifactError, RequestError

SOURCE_TEXTS = 400
"""Texts of each held-out file among which passages are looked for."""


def run(
    engine: DiffusionEngine,
    cells: Sequence[Cell],
    judges: Judges,
    store: Store,
    origin: Mapping[str, Any],
    settings: Settings,
    data: Path,
    texts_out: Path | None = None,
) -> dict[str, str]:
    """Measure every cell into `store`, and return what the engine refused: the reason by method and task.

    texts_out: a file that the texts themselves are appended to.
    """
    attributes = engine.catalogue.attributes
    refused: dict[str, str] = {}
    passages: list[Passage] = []
    left = [cell for cell in cells if cell.key(origin) not in store.records]
    total, done, began = sum(cell.work for cell in left), 0.0, time.monotonic()
    print(f"{len(cells)} cells, {sum(c.texts for c in cells)} texts; {len(left)} cells to run", file=sys.stderr)
    for number, cell in enumerate(left):
        if cell.task == INFILL and not passages:
            passages = held_out_passages(engine, data, settings)
        given = passages if cell.task == INFILL else ()
        started = time.monotonic()
        try:
            rows, plan = compose(engine, cell, settings.seed, given)
        except RequestError as error:
            refused[f"{cell.method}: {cell.task}"] = str(error)
            total -= cell.work
            continue
        record = measure(cell, rows, plan, judges, attributes, given)
        told = {name: value for name, value in vars(cell).items() if name != "attributes"}
        store.put(cell.key(origin), told | {"seconds": round(time.monotonic() - started, 2)} | record)
        if texts_out is not None:
            with open(texts_out, "a", encoding="utf-8") as lines:
                lines.write(json.dumps({"cell": told, "texts": [row.text for row in rows]}) + "\n")
        done += cell.work
        _print_progress(number + 1, len(left), done, total, began, cell)
    return refused


def held_out_passages(engine: DiffusionEngine, data: Path, settings: Settings) -> list[Passage]:
    """Passages of held-out texts, as many from each file in turn as there are long enough ones."""
    context, middle = settings.order_context, settings.order_tokens
    found = []
    for text in held_out_texts(data, SOURCE_TEXTS):
        ids = tuple(engine.tokenizer.encode(text, add_special_tokens=False).ids)
        if len(ids) >= middle + 2 * context:
            end = context + middle
            found.append(Passage(ids[:context], ids[context:end], ids[end : end + context]))
    if len(found) < settings.order_texts:
        raise ArtifactError(
            f"{data}: {len(found)} held-out texts have {middle + 2 * context} tokens, {settings.order_texts} are needed"
        )
    # Spread over all of them: the files come one after the other.
    return [found[i * len(found) // settings.order_texts] for i in range(settings.order_texts)]


def _print_progress(number: int, cells: int, done: float, total: float, began: float, cell: Cell) -> None:
    left = (time.monotonic() - began) * (total - done) / done
    print(
        f"\r{number}/{cells} cells, {100 * done / total:.0f} %, about {left / 60:.0f} min left: "
        f"{cell.method}, {cell.task}, {cell.factor:g}".ljust(110)[:110],
        end="\n" if number == cells else "",
        file=sys.stderr,
        flush=True,
    )
