"""What a run says of itself beside its records: settings, hashes of all that decides a cell, and what was refused."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from bench.steering.plan.cells import Cell
from bench.steering.plan.settings import Settings
from bench.steering.report.render import HEADER
from bench.steering.texts.measure import Judges
from steerserve.engine.admission.catalogue import Catalogue
from steerserve.engine.engine import DiffusionEngine


def origin_of(engine: DiffusionEngine, judges: Judges, settings: Settings) -> dict[str, Any]:
    """All beside its request that decides what a cell comes out as."""
    catalogue = engine.catalogue
    return {
        "attributes": {name: one.sha256 for name, one in catalogue.attributes.items()},
        "defaults": asdict(catalogue.defaults),
        "model": next((one.model_sha256 for one in catalogue.attributes.values()), None),
        "saes": sorted(one.facts.sha256 or "" for one in catalogue.saes.values()),
        "judge": judges.quality.facts["sha256"],
        "classifiers": judges.classifiers.summary(),
        "seed": settings.seed,
        "joint": _joint_hash(catalogue),
        "context": [settings.order_context, settings.order_tokens],
    }


def _joint_hash(catalogue: Catalogue) -> str | None:
    """A hash of what several attributes cost together; None where nothing was measured of that."""
    profile = getattr(catalogue, "joint", None)
    return None if profile is None else hashlib.sha256(json.dumps(profile.to_json()).encode()).hexdigest()


def write_header(
    out: Path,
    engine: DiffusionEngine,
    judges: Judges,
    settings: Settings,
    origin: dict[str, Any],
    refused: dict[str, str],
    real: dict[str, Any],
) -> None:
    """Write `run.json`: settings, hashes, what was refused, what real texts come to, and the profiles that predictions
    are made from."""
    facts = {name: value for name, value in judges.quality.facts.items() if name != "step"}
    header = {
        "settings": asdict(settings),
        "origin": origin | {"digest": hashlib.sha256(json.dumps(origin, sort_keys=True).encode()).hexdigest()[:16]},
        "judge": facts,
        "classifiers": judges.classifiers.summary(),
        "refused": refused,
        "real": real,
        "attributes": {
            name: {"strength": one.strength, "layers": list(one.layers), "unit": one.unit, "profile": one.profile}
            for name, one in engine.catalogue.attributes.items()
        },
    }
    (out / HEADER).write_text(json.dumps(header, indent=1) + "\n", encoding="utf-8")


def still_refused(out: Path, refused: dict[str, str], cells: Sequence[Cell]) -> dict[str, str]:
    """What was refused now, and before in experiments that this call was not asked for."""
    before: dict[str, str] = {}
    if (out / HEADER).exists():
        before = json.loads((out / HEADER).read_text(encoding="utf-8")).get("refused", {})
    asked = {f"{cell.method}: {cell.task}" for cell in cells}
    return {name: why for name, why in before.items() if name not in asked} | refused
