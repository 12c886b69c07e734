import gzip
import json
from pathlib import Path

import pytest

from steerserve.errors import ArtifactError
from steerserve.saes.labels import read_labels


def test_labels_are_read_by_feature(tmp_path: Path) -> None:
    assert read_labels(tmp_path, 10) == {}
    (tmp_path / "labels.json").write_text(json.dumps({"8": "sports scores", "0": "café"}))
    assert read_labels(tmp_path, 10) == {8: "sports scores", 0: "café"}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{"10": "a"}', "features are 0 to 9, got '10'"),
        ('{"-1": "a"}', "got '-1'"),
        ('{"one": "a"}', "got 'one'"),
        ('{"1": 5}', "must be a text, got 5"),
        ("5", "must hold an object"),
        ("[5]", "every explanation needs an index"),
        ("{", "cannot be read"),
    ],
)
def test_what_is_no_label_is_refused(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "labels.json").write_text(text)
    with pytest.raises(ArtifactError, match=said):
        read_labels(tmp_path, 10)


EXPORT = [
    {
        "modelId": "m",
        "layer": "3-res",
        "index": "8",
        "description": " sports scores ",
        "typeName": "oai_token-act-pair",
    },
    {"modelId": "m", "layer": "3-res", "index": "8", "description": "a second one"},
    {"modelId": "m", "layer": "3-res", "index": "2", "description": ""},
    {"modelId": "m", "layer": "3-res", "index": 5, "description": "kings"},
]


def test_neuronpedias_export_is_read_whole_or_in_lines(tmp_path: Path) -> None:
    (tmp_path / "labels.json").write_text(json.dumps(EXPORT))
    assert read_labels(tmp_path, 10) == {8: "sports scores", 5: "kings"}
    (tmp_path / "labels.json").unlink()
    with gzip.open(tmp_path / "labels.jsonl.gz", "wt") as file:
        file.write("\n".join(json.dumps(row) for row in EXPORT))
    assert read_labels(tmp_path, 10) == {8: "sports scores", 5: "kings"}
    with pytest.raises(ArtifactError, match="features are 0 to 7, got '8'"):
        read_labels(tmp_path, 8)
    (tmp_path / "labels.json").write_text("{}")
    with pytest.raises(ArtifactError, match=r"labels.json and labels.jsonl.gz; one file is needed"):
        read_labels(tmp_path, 10)


def test_dlm_scopes_explanations_are_read(tmp_path: Path) -> None:
    (tmp_path / "labels.json").write_text(json.dumps({"23": {"8": {"explanation": "sports scores", "score": 0.9}}}))
    assert read_labels(tmp_path, 10) == {8: "sports scores"}
    (tmp_path / "labels.json").write_text(json.dumps({"8": {"explanation": "kings"}, "3": {"explanation": "ships"}}))
    assert read_labels(tmp_path, 10) == {8: "kings", 3: "ships"}
