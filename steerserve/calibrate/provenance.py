"""The card of an attribute: where it came from, what it lacks to be measured, and the profile written into it."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

from schedulers import CommitmentProfile
from steerserve.calibrate.recipes import ProfileRecipe
from steerserve.calibrate.texts.tasks import Task
from steerserve.errors import ArtifactError
from steerserve.models import OpenedModel
from steerserve.steering.attribute import Attribute
from steerserve.train import corpus

UNRECORDED: Final = ("dtype", "tokenizer", "probes")
"""What earlier versions did not record: it is compared where it was."""


def origin_of_model(opened: OpenedModel) -> dict[str, Any]:
    """Everything about an opened model that decides the results, as JSON: weights, dtype, tokenizer, sampler."""
    vocabulary = json.dumps(sorted(opened.tokenizer.get_vocab().items()))
    return {
        "model_sha256": opened.sha256,
        "dtype": str(opened.dtype).removeprefix("torch."),
        "tokenizer": hashlib.sha256(vocabulary.encode()).hexdigest(),
        "sampler": json.loads(json.dumps(asdict(opened.defaults))),
    }


def differing(recorded: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[str]:
    """Names of the settings whose recorded value is not the one wanted."""
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
    """Tell if `folder` holds the attribute of this origin; raises ArtifactError where it holds another one."""
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


def task_of(attribute: Attribute) -> Task:
    """The task an attribute was calibrated for, read from its provenance."""
    if "task" not in attribute.provenance:
        raise ArtifactError(
            f"attribute {attribute.name!r} does not say what texts it is of (provenance.task): calibrate it first"
        )
    return Task.from_json(attribute.provenance["task"], f"provenance.task of {attribute.name!r}")


def profile_of(attribute: Attribute, recipe: ProfileRecipe) -> CommitmentProfile:
    """The commitment curve of an attribute; raises ArtifactError where pushes of it cannot be measured."""
    name = attribute.name
    if attribute.profile is None:
        raise ArtifactError(f"attribute {name!r} has no commitment curve: calibrate it first")
    try:
        profile = CommitmentProfile.from_json(attribute.profile)
    except ValueError as error:
        raise ArtifactError(f"attribute {name!r}: {error}") from error
    if profile.slices != recipe.edges[-1]:
        raise ArtifactError(
            f"attribute {name!r} has a profile of {profile.slices} slices, but the edges go to {recipe.edges[-1]}"
        )
    if attribute.unit != "residual" or attribute.strength == 0:
        raise ArtifactError(
            f"attribute {name!r} has strength {attribute.strength:g} in unit {attribute.unit!r}: it must be other than "
            f"0, in unit 'residual'"
        )
    return profile


def pushed(attribute: Attribute) -> dict[str, Any]:
    """Everything about an attribute that decides what pushing it does and how that is judged, as JSON."""
    return {
        "directions": attribute.directions_sha256,
        "layers": list(attribute.layers),
        "strength": attribute.strength,
        "scope": attribute.scope,
        "task": attribute.provenance["task"],
        "curve": attribute.profile["curve"] if attribute.profile else None,
        "norms": {str(layer): attribute.sites[layer].residual_norm for layer in attribute.layers},
    }


def write_profile(root: Path, name: str, profile: CommitmentProfile, found: Mapping[str, Any]) -> Path:
    """Put the profile and what was found into the card of an attribute below `root`, in one go; returns its folder.

    The directions' file is not written: what is pinned by its hash stays as it is.
    """
    path = folder_of(root, name) / "attribute.json"
    card = json.loads(path.read_text(encoding="utf-8"))
    card["profile"] = profile.to_json()
    card["provenance"] = card.get("provenance", {}) | {"measured": dict(found)}
    partial = path.with_name(f"{path.name}.partial")
    partial.write_text(json.dumps(card, indent=1), encoding="utf-8")
    partial.rename(path)
    return path.parent


def folder_of(root: Path, name: str) -> Path:
    """The folder below `root` of the attribute of this name; raises ArtifactError where there is none."""
    for path in sorted(root.rglob("attribute.json")):
        if json.loads(path.read_text(encoding="utf-8"))["name"] == name:
            return path.parent
    raise ArtifactError(f"{root}: the attribute {name!r} is gone")
