"""Labelled texts: which rows are taken, and that the splits never meet."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from steerserve.calibrate.texts.labelled import held_out_texts, labelled_texts
from steerserve.calibrate.texts.tasks import Group
from steerserve.errors import ArtifactError
from steerserve.train.corpus import split_of

GROUP = Group(("one", "two"), "kind", ("left", "right"), ("score", 1.0))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    for stem, count in (("one", 300), ("two", 60)):
        rows = [
            {
                "text": f"text number {i} of file {stem}",
                "kind": ("left", "right", "up")[i % 3],
                "score": (-1.5, 0.5, 2)[i // 3 % 3],
            }
            for i in range(count)
        ]
        rows += [{"text": f"short {stem}", "kind": "left", "score": 2}, {"text": "a text without any label here"}]
        (folder / f"{stem}.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    return folder


def test_only_the_rows_of_the_group_and_the_split_are_taken(data: Path) -> None:
    found = labelled_texts(data, GROUP, "calibrate", 1000, 0)
    assert sorted(found) == ["left", "right"]
    for label, texts in found.items():
        assert len(set(texts)) == len(texts) > 20
        for text in texts:
            number = int(text.split()[2])
            assert ("left", "right", "up")[number % 3] == label and number // 3 % 3 != 1
            assert split_of(text) == "calibrate"


def test_the_judges_of_the_bench_share_no_text_with_calibration(data: Path) -> None:
    ours, theirs = (labelled_texts(data, GROUP, split, 1000, 0) for split in ("calibrate", "bench"))
    assert not {t for texts in ours.values() for t in texts} & {t for texts in theirs.values() for t in texts}


def test_a_group_may_take_every_text(data: Path) -> None:
    every = replace(GROUP, all_texts=True)
    found = labelled_texts(data, every, "calibrate", 1000, 0)
    for label, texts in found.items():
        parts = [labelled_texts(data, GROUP, split, 1000, 0)[label] for split in ("calibrate", "bench", "valid")]
        assert sorted(texts) == sorted(text for part in parts for text in part)
    assert len(held_out_texts(data, 3, every=True)) == 6


def test_files_take_turns(data: Path) -> None:
    for texts in labelled_texts(data, GROUP, "calibrate", 8, 0).values():
        assert [text.split()[-1] for text in texts] == ["one", "two"] * 4


def test_the_choice_is_seeded(data: Path) -> None:
    assert labelled_texts(data, GROUP, "bench", 5, 1) == labelled_texts(data, GROUP, "bench", 5, 1)
    assert labelled_texts(data, GROUP, "bench", 5, 1) != labelled_texts(data, GROUP, "bench", 5, 2)


def test_held_out_texts_are_of_their_split(data: Path) -> None:
    found = held_out_texts(data, 3)
    assert 0 < len(found) <= 6 and {split_of(text) for text in found} == {"valid"}


def test_missing_files_and_labels_are_named(data: Path) -> None:
    with pytest.raises(ArtifactError, match="no files .'three'"):
        labelled_texts(data, Group(("three",), "kind", ("left",), None), "bench", 5, 0)
    with pytest.raises(ArtifactError, match="has kind .'down'"):
        labelled_texts(data, Group(("one",), "kind", ("left", "down"), None), "bench", 5, 0)


def test_what_a_field_holds_is_told_where_a_label_is_missing(data: Path) -> None:
    with pytest.raises(ArtifactError, match=r"'left' \(\d+\).*'right' \(\d+\)"):
        labelled_texts(data, Group(("one",), "kind", ("down",), None), "calibrate", 5, 0)
    with pytest.raises(ArtifactError, match="no row has that field"):
        labelled_texts(data, Group(("one",), "knid", ("left",), None), "calibrate", 5, 0)
