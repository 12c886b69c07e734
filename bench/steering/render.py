"""From the records of a run to its results: summary, tables and figures, and the page that shows them."""

import json
import math
import re
from pathlib import Path
from typing import Any, Final

from bench.steering.figures import draw
from bench.steering.store import Store
from bench.steering.summary import summarise
from bench.steering.tables import tables
from schedulers import CommitmentProfile
from steerserve.errors import ArtifactError

RECORDS: Final = "cells.jsonl.gz"
HEADER: Final = "run.json"
MARK: Final = "results"
"""Name of the marks in the page between which the tables go."""


def render(folder: Path, page: Path | None = None) -> dict[str, Any]:
    """Write `summary.json`, `tables.md` and the figures beside the records; raises ArtifactError where there are none.

    page: a Markdown file; what is between its marks <!-- results --> and <!-- end of results --> becomes the tables.
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
    text = tables(summary)
    (folder / "tables.md").write_text(text, encoding="utf-8")
    figures = draw(summary, profiles, folder)
    if page is not None:
        shown = [
            f"![{path.stem}]({path.relative_to(page.parent)})" for path in figures if path.is_relative_to(page.parent)
        ]
        _fill(page, "\n\n".join([text.strip(), *shown]))
    return summary


def finite(value: Any) -> Any:
    """The same with null for what is not a number: JSON has no NaN."""
    if isinstance(value, dict):
        return {name: finite(one) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return [finite(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _fill(page: Path, text: str) -> None:
    whole = page.read_text(encoding="utf-8")
    pattern = rf"(<!-- {MARK} -->\n).*?(<!-- end of {MARK} -->)"
    if not re.search(pattern, whole, re.DOTALL):
        raise ArtifactError(f"{page} has no marks <!-- {MARK} --> and <!-- end of {MARK} -->")
    filled = re.sub(pattern, lambda found: f"{found[1]}\n{text}\n\n{found[2]}", whole, flags=re.DOTALL)
    page.write_text(filled, encoding="utf-8")
