"""From the records of a run to its results: summary, tables and figures."""

import json
import math
from pathlib import Path
from typing import Any

from bench.steering.analysis.summary import summarise
from bench.steering.records import HEADER, RECORDS, Store
from bench.steering.report.figures import draw
from bench.steering.report.tables import tables
from schedulers import CommitmentProfile
from steerserve.errors import ArtifactError


def render(folder: Path) -> dict[str, Any]:
    """Write `summary.json`, the figures, and `tables.md` with the tables and links to the figures, beside the records.

    Raises ArtifactError where `folder` holds no records.
    """
    try:
        header = json.loads((folder / HEADER).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ArtifactError(f"{folder} holds no run: {error}") from error
    profiles = {
        name: CommitmentProfile.from_json(one["profile"])
        for name, one in header.pop("attributes").items()
        if one["profile"] is not None
    }
    summary = summarise(list(Store(folder / RECORDS).records.values()), profiles, header)
    (folder / "summary.json").write_text(json.dumps(finite(summary), indent=1) + "\n", encoding="utf-8")
    figures = draw(summary, profiles, folder)
    shown = [f"![{path.stem}]({path.name})\n" for path in figures]
    (folder / "tables.md").write_text("\n".join([tables(summary), *shown]), encoding="utf-8")
    return summary


def finite(value: Any) -> Any:
    """The same with null for what is not a number: JSON has no NaN."""
    if isinstance(value, dict):
        return {name: finite(one) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return [finite(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
