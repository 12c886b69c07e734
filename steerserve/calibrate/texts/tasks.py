"""Tasks of a calibration: each attribute, the texts that show it, and the texts it is contrasted with."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from steerserve.errors import ArtifactError


@dataclass(frozen=True)
class Group:
    """The classes that one classifier tells apart; tasks of one group share its texts and its classifier."""

    files: tuple[str, ...]
    field: str
    labels: tuple[str, ...]
    at_least: tuple[str, float] | None
    all_texts: bool = False
    """Use every text, also those that are held out for bench/ and for the bundled model."""


@dataclass(frozen=True)
class Task:
    """One attribute: the texts with `target` in `field` against those with one of `contrast` there."""

    name: str
    files: tuple[str, ...]
    """Files of the data directory by stem: the name before its first dot."""
    field: str
    target: str
    contrast: tuple[str, ...]
    at_least: tuple[str, float] | None = None
    """(field, value): only rows with |field| >= value are used."""
    confidence: float | None = None
    """Probability from which an unsteered text counts as showing the attribute; None: the recipe's."""
    all_texts: bool = False
    """Use every text. False leaves out two splits by hash: the 40 % that the classifiers of bench/ are trained on, and
    the 4 % that the bundled model was never trained on. Tasks that are read from a file use every text."""

    @property
    def group(self) -> Group:
        """The classes of this task."""
        labels = tuple(sorted({self.target, *self.contrast}))
        return Group(self.files, self.field, labels, self.at_least, self.all_texts)

    def to_json(self) -> dict[str, Any]:
        """A dict of JSON values that `from_json` reads back."""
        raw = asdict(self)
        raw["file"] = list(raw.pop("files"))
        return {
            name: list(value) if isinstance(value, tuple) else value
            for name, value in raw.items()
            # A task that leaves splits out is recorded as it was before there was a choice.
            if value is not None and (name != "all_texts" or value)
        }

    @classmethod
    def from_json(cls, raw: Any, place: str) -> "Task":
        """The task of a JSON object; raises ArtifactError naming the place, the field and what is allowed."""
        allowed = ["file", *(field.name for field in fields(cls) if field.name != "files")]
        needed = ("name", "file", "field", "target", "contrast")
        if not isinstance(raw, Mapping):
            raise ArtifactError(f"{place} must be an object, got {raw!r}")
        if unknown := sorted(set(raw) - set(allowed)):
            raise ArtifactError(f"{place} has unknown fields {unknown}; allowed: {allowed}")
        if missing := [name for name in needed if name not in raw]:
            raise ArtifactError(f"{place} lacks {missing}; needed: {list(needed)}")
        name = raw["name"]
        if not isinstance(name, str) or not name or any(part in ("", ".", "..") for part in name.split("/")):
            raise ArtifactError(f"{place}: name must be folder names with slashes between them, got {name!r}")
        at_least, confidence = raw.get("at_least"), raw.get("confidence")
        if at_least is not None:
            at_least = _field_and_value(at_least, place)
        if confidence is not None and not (isinstance(confidence, int | float) and 0 < confidence < 1):
            raise ArtifactError(f"{place}: confidence must be between 0 and 1, got {confidence!r}")
        contrast = _several(raw["contrast"], f"{place}: contrast")
        if str(raw["target"]) in contrast:
            raise ArtifactError(f"{place}: target {raw['target']!r} is also a contrast")
        files = _several(raw["file"], f"{place}: file")
        all_texts = raw.get("all_texts", False)
        if not isinstance(all_texts, bool):
            raise ArtifactError(f"{place}: all_texts must be true or false, got {all_texts!r}")
        return cls(name, files, str(raw["field"]), str(raw["target"]), contrast, at_least, confidence, all_texts)


def read_tasks(path: Path) -> tuple[Task, ...]:
    """Tasks from a JSON list of objects with name, file, field, target, contrast and perhaps at_least, confidence and
    all_texts (true where it is left out)."""
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ArtifactError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(raw, list) or not raw:
        raise ArtifactError(f"{path} must hold a list of tasks, got {type(raw).__name__}")
    rows = [{"all_texts": True, **one} if isinstance(one, Mapping) else one for one in raw]
    tasks = tuple(Task.from_json(one, f"{path}[{index}]") for index, one in enumerate(rows))
    names = [task.name for task in tasks]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ArtifactError(f"{path}: two tasks are named {twice}")
    return tasks


def _several(value: Any, place: str) -> tuple[str, ...]:
    values = [value] if isinstance(value, str | int) else value
    if not isinstance(values, Sequence) or not values or not all(isinstance(one, str | int) for one in values):
        raise ArtifactError(f"{place} must be a name or a list of names, got {value!r}")
    return tuple(str(one) for one in values)


def _field_and_value(value: Any, place: str) -> tuple[str, float]:
    match value:
        case [str(field), int(number) | float(number)]:
            return field, float(number)
        case _:
            raise ArtifactError(f"{place}: at_least must be [field, number], got {value!r}")


def _opposites(
    kind: str, files: tuple[str, ...], one: str, other: str, at_least: tuple[str, float] | None = None
) -> tuple[Task, Task]:
    return (
        Task(f"{kind}/{one}", files, "label_name", one, (other,), at_least),
        Task(f"{kind}/{other}", files, "label_name", other, (one,), at_least),
    )


_TOPICS = ("World", "Sports", "Business", "Sci/Tech")
_FORMAL, _INFORMAL = _opposites("formality", ("pavlick_train",), "formal", "informal", ("score", 1.0))

BUNDLED: tuple[Task, ...] = (
    *(
        Task(
            f"topic/{topic.lower().replace('/', '-')}",
            ("agnews_train",),
            "label_name",
            topic,
            tuple(other for other in _TOPICS if other != topic),
        )
        for topic in _TOPICS
    ),
    *_opposites("sentiment", ("imdb_train", "sst2_train"), "positive", "negative"),
    *_opposites("register", ("bible_train",), "archaic", "modern"),
    _FORMAL,
    # Unsteered text is mostly formal, so few samples are surely informal (arXiv 2605.10971 lowers this one too).
    Task(**(vars(_INFORMAL) | {"confidence": 0.6})),
)
"""The attributes of the bundled model."""
