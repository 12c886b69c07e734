"""What features mean, as somebody has found out: `labels.json` or `labels.jsonl[.gz]` beside an SAE.

Three forms are read. Ours: `{"812": "sports scores"}`. Neuronpedia's export of explanations: a list of objects, or one
a line, with `index` and `description` (https://docs.neuronpedia.org, Exports). DLM-Scope's: an object with an object of
`explanation` a feature, `{"812": {"explanation": "sports scores", "score": 0.9}}`, which may stand under the layer.
"""

import gzip
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from steerserve.errors import ArtifactError
from steerserve.pointers import refuse_pointer

LABELS = "labels.json"
LINES = ("labels.jsonl", "labels.jsonl.gz")


def read_labels(folder: Path, features: int) -> Mapping[int, str]:
    """Labels by feature, of an SAE of so many; none where no such file is there. Raises ArtifactError."""
    there = [folder / name for name in (LABELS, *LINES) if (folder / name).exists()]
    if not there:
        return {}
    if len(there) > 1:
        raise ArtifactError(f"{folder}: labels in {' and '.join(path.name for path in there)}; one file is needed")
    [path] = there
    raw = _read(path)
    if isinstance(raw, list):
        return _of_neuronpedia(path, raw, features)
    if not isinstance(raw, dict):
        raise ArtifactError(f"{path} must hold an object, or a list of explanations, got {type(raw).__name__}")
    layers = [value for value in raw.values() if isinstance(value, dict) and "explanation" not in value]
    if len(raw) == len(layers) == 1:
        [raw] = layers
    labels = {}
    for name, label in raw.items():
        index = _index(path, name, features)
        if isinstance(label, dict):
            label = label.get("explanation")
        if not isinstance(label, str):
            raise ArtifactError(f"{path}: the label of feature {name} must be a text, got {label!r}")
        labels[index] = label
    return labels


def _read(path: Path) -> Any:
    refuse_pointer(path)
    try:
        if path.name == LABELS:
            return json.loads(path.read_text(encoding="utf-8"))
        opened = gzip.open if path.suffix == ".gz" else open
        with opened(path, "rt", encoding="utf-8") as lines:
            return [json.loads(line) for line in lines if line.strip()]
    except (OSError, EOFError, ValueError, RecursionError) as error:
        raise ArtifactError(f"{path} cannot be read: {error}") from error


def _of_neuronpedia(path: Path, rows: Iterable[Any], features: int) -> dict[int, str]:
    """The first description of each feature: a feature may have several."""
    labels: dict[int, str] = {}
    for row in rows:
        if not isinstance(row, dict) or "index" not in row:
            raise ArtifactError(f"{path}: every explanation needs an index and a description, got {str(row)[:100]}")
        index, label = _index(path, str(row["index"]), features), row.get("description")
        if not isinstance(label, str):
            raise ArtifactError(f"{path}: the description of feature {index} must be a text, got {label!r}")
        if label.strip():
            labels.setdefault(index, label.strip())
    return labels


def _index(path: Path, name: str, features: int) -> int:
    if not (name.isascii() and name.isdigit() and int(name) < features):
        raise ArtifactError(f"{path}: features are 0 to {features - 1}, got {name!r}")
    return int(name)
