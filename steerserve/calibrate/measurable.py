"""What must be known of an attribute before what pushing it does can be measured, and written into it after."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from schedulers import CommitmentProfile
from steerserve.calibrate.profile_recipe import ProfileRecipe
from steerserve.calibrate.texts.tasks import Task
from steerserve.errors import ArtifactError
from steerserve.steering.attribute import Attribute


def task_of(attribute: Attribute) -> Task:
    """The task that its classifier is trained on."""
    if "task" not in attribute.provenance:
        raise ArtifactError(
            f"attribute {attribute.name!r} does not say what texts it is of (provenance.task): calibrate it first"
        )
    return Task.from_json(attribute.provenance["task"], f"provenance.task of {attribute.name!r}")


def profile_of(attribute: Attribute, recipe: ProfileRecipe) -> CommitmentProfile:
    """Its curve; raises ArtifactError where it cannot be measured."""
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
    """What decides what pushing an attribute does, and how that is judged."""
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
