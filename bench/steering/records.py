"""What a run keeps in its folder: finished cells as compressed JSON lines, and a header of settings and hashes.

A run that was stopped goes on from them, and results are drawn again from them.
"""

import gzip
import hashlib
import json
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

from bench.steering.plan.cells import Cell
from bench.steering.plan.settings import Settings
from bench.steering.texts.measure import Judges
from steerserve.engine.admission.catalogue import Catalogue
from steerserve.engine.engine import DiffusionEngine

RECORDS: Final = "cells.jsonl.gz"
HEADER: Final = "run.json"


class Store:
    """Records by the key of their cell, each written as soon as it is there."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.records: dict[str, dict[str, Any]] = {}
        if path.exists() and not self._read():
            # The run was stopped while it wrote; what comes after a broken end could not be read.
            self.keep(list(self.records))

    def put(self, key: str, record: Mapping[str, Any]) -> None:
        """Keep a record and append it to the file."""
        self.records[key] = {"key": key, **record}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with open(self.path, "ab") as file:
            file.write(_packed([self.records[key]]))

    def keep(self, keys: Sequence[str]) -> None:
        """Rewrite the file with these records only, in this order: what other settings left behind is dropped."""
        self.records = {key: self.records[key] for key in keys if key in self.records}
        partial = self.path.with_suffix(".partial")
        partial.parent.mkdir(parents=True, exist_ok=True)
        partial.write_bytes(_packed(list(self.records.values())))
        partial.rename(self.path)

    def _read(self) -> bool:
        """Read what is there; False where the end is broken."""
        try:
            with gzip.open(self.path, "rt", encoding="utf-8") as lines:
                for line in lines:
                    record = json.loads(line)
                    self.records[record["key"]] = record
        except (EOFError, gzip.BadGzipFile, zlib.error, ValueError):
            return False
        return True


def _packed(records: Sequence[Mapping[str, Any]]) -> bytes:
    """A gzip member without a time, so that the same records make the same file."""
    lines = "".join(json.dumps(record, separators=(",", ":")) + "\n" for record in records)
    return gzip.compress(lines.encode(), mtime=0)


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
