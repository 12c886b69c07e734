"""Names of features: `labels.json` beside an SAE, `{"812": "sports scores"}`."""

from collections.abc import Mapping
from pathlib import Path

from steerserve.errors import ArtifactError
from steerserve.saes.layouts.files import read_json

LABELS = "labels.json"


def read_labels(folder: Path, features: int) -> Mapping[int, str]:
    """Labels by feature, of an SAE of so many; none where the file is not there. Raises ArtifactError."""
    if not (folder / LABELS).exists():
        return {}
    labels = {}
    for name, label in read_json(folder / LABELS).items():
        if not (name.isascii() and name.isdigit() and int(name) < features):
            raise ArtifactError(f"{folder / LABELS}: features are 0 to {features - 1}, got {name!r}")
        if not isinstance(label, str):
            raise ArtifactError(f"{folder / LABELS}: the label of feature {name} must be a text, got {label!r}")
        labels[int(name)] = label
    return labels
