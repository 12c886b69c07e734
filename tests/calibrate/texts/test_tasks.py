"""Tasks as data: those of the bundled model, and those a user writes."""

import json
from pathlib import Path
from typing import Any

import pytest

from steerserve.calibrate.texts.tasks import BUNDLED, Task, read_tasks
from steerserve.errors import ArtifactError

MINE = {"name": "mood/happy", "file": "mine", "field": "mood", "target": "happy", "contrast": ["sad", "angry"]}


def written(folder: Path, content: Any) -> Path:
    path = folder / "tasks.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def test_bundled_tasks_survive_json() -> None:
    assert len({task.name for task in BUNDLED}) == len(BUNDLED) == 10
    for task in BUNDLED:
        assert Task.from_json(json.loads(json.dumps(task.to_json())), "task") == task


def test_classes_of_one_kind_are_one_group() -> None:
    assert len({task.group for task in BUNDLED if task.name.startswith("topic/")}) == 1
    assert len({task.group for task in BUNDLED}) == 4


def test_a_users_tasks_are_read(tmp_path: Path) -> None:
    numbers = {"name": "stars", "file": ["a", "b"], "field": "stars", "target": 5, "contrast": 1, "at_least": ["n", 2]}
    happy, stars = read_tasks(written(tmp_path, [MINE, numbers]))
    assert happy == Task("mood/happy", ("mine",), "mood", "happy", ("sad", "angry"), all_texts=True)
    assert stars == Task("stars", ("a", "b"), "stars", "5", ("1",), ("n", 2.0), all_texts=True)


def test_a_users_tasks_use_every_text_unless_they_say_otherwise(tmp_path: Path) -> None:
    (some,) = read_tasks(written(tmp_path, [MINE | {"all_texts": False}]))
    assert not some.all_texts and "all_texts" not in some.to_json()
    (every,) = read_tasks(written(tmp_path, [MINE]))
    assert Task.from_json(every.to_json(), "recorded") == every
    assert not any(task.all_texts for task in BUNDLED)
    with pytest.raises(ArtifactError, match="all_texts must be true or false, got 'no'"):
        read_tasks(written(tmp_path, [MINE | {"all_texts": "no"}]))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "cannot be read as JSON"),
        ({}, "list of tasks"),
        ([], "list of tasks"),
        ([7], r"\[0\] must be an object"),
        ([MINE | {"colour": 1}], "unknown fields .'colour'."),
        ([{"name": "x"}], "lacks .'file', 'field', 'target', 'contrast'."),
        ([MINE | {"name": "../up"}], "'../up'"),
        ([MINE | {"name": "/root"}], "'/root'"),
        ([MINE | {"contrast": "happy"}], "target 'happy' is also a contrast"),
        ([MINE | {"contrast": []}], "contrast must be"),
        ([MINE | {"confidence": 2}], "confidence must be between 0 and 1, got 2"),
        ([MINE | {"at_least": "n"}], "at_least must be"),
        ([MINE, MINE], "two tasks are named .'mood/happy'."),
    ],
)
def test_a_wrong_task_is_refused_by_name(tmp_path: Path, content: Any, message: str) -> None:
    with pytest.raises(ArtifactError, match=message):
        read_tasks(written(tmp_path, content))
