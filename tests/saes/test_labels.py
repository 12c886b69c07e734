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
        ("[]", "must hold an object"),
        ("{", "cannot be read"),
    ],
)
def test_what_is_no_label_is_refused(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "labels.json").write_text(text)
    with pytest.raises(ArtifactError, match=said):
        read_labels(tmp_path, 10)
