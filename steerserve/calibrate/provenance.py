"""Where an attribute came from, and whether the one on disk is the one that would be made."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

from steerserve.calibrate.texts.tasks import Task
from steerserve.errors import ArtifactError
from steerserve.models import OpenedModel
from steerserve.train import corpus

UNRECORDED: Final = ("dtype", "tokenizer", "probes")
"""What earlier versions did not record: it is compared where it was."""


def origin_of_model(opened: OpenedModel) -> dict[str, Any]:
    """What of a model, as it is placed, decides what is found by it, as JSON."""
    vocabulary = json.dumps(sorted(opened.tokenizer.get_vocab().items()))
    return {
        "model_sha256": opened.sha256,
        "dtype": str(opened.dtype).removeprefix("torch."),
        "tokenizer": hashlib.sha256(vocabulary.encode()).hexdigest(),
        "sampler": json.loads(json.dumps(asdict(opened.defaults))),
    }


def differing(recorded: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[str]:
    """Names of what is not recorded as it is wanted."""
    known = [name for name in wanted if name in recorded or name not in UNRECORDED]
    return [name for name in known if recorded.get(name) != wanted[name]]


def file_hashes(data: Path, tasks: Sequence[Task]) -> dict[str, str]:
    """SHA-256 of every file that the tasks read, by stem; raises ArtifactError for one that is not there."""
    known = corpus.files(data)
    wanted = sorted({stem for task in tasks for stem in task.files})
    if unknown := [stem for stem in wanted if stem not in known]:
        raise ArtifactError(f"{data} has no files {unknown}; it has {sorted(known)}")
    found = {}
    for stem in wanted:
        with open(known[stem], "rb") as stream:
            found[stem] = hashlib.file_digest(stream, "sha256").hexdigest()
    return found


def already_made(folder: Path, origin: Mapping[str, Any]) -> bool:
    """Whether `folder` holds the attribute of this origin; raises ArtifactError where it holds another one."""
    path = folder / "attribute.json"
    if not path.exists():
        return False
    try:
        provenance = json.loads(path.read_text(encoding="utf-8"))["provenance"]
    except (ValueError, KeyError):
        # Written last and in one go: a file that cannot be read is one whose writing was cut short.
        return False
    if changed := differing(provenance, origin):
        raise ArtifactError(
            f"{folder} was made with another {' and '.join(changed)}: remove it, or choose another folder"
        )
    return True
