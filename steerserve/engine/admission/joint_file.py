"""Read and write the joint profile of a folder of attributes: `joint.json`, beside the attributes it is of.

It pins each attribute by its directions: they alone decide what pushes do, and an attribute's card changes whenever
its own profile is written.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from schedulers import JointProfile
from steerserve.errors import ArtifactError
from steerserve.steering.attribute import Attribute

FILE = "joint.json"
FORMAT = 1
UNIT = "residual"
"""What the strengths of the profile are in: fractions of the mean residual norm at each attribute's own layers."""
FIELDS = ("format", "model_sha256", "unit", "attributes", "profile")


def save_joint(root: Path, model_sha256: str, attributes: Mapping[str, Attribute], profile: JointProfile) -> None:
    """Write the joint profile of attributes, as they were loaded from below `root`, to `root/joint.json`, in one go.

    Raises ValueError where the profile names one that is not among them, or that is not of unit `residual`.
    """
    for name in profile.names:
        if name not in attributes or not attributes[name].directions_sha256:
            raise ValueError(f"the joint profile is of {name!r}, which has not been loaded")
        if attributes[name].unit != UNIT:
            raise ValueError(f"a joint profile is in unit {UNIT}, but {name!r} is in unit {attributes[name].unit}")
    raw = {
        "format": FORMAT,
        "model_sha256": model_sha256,
        "unit": UNIT,
        "attributes": {name: attributes[name].directions_sha256 for name in profile.names},
        "profile": profile.to_json(),
    }
    partial = root / f"{FILE}.partial"
    partial.write_text(json.dumps(raw), encoding="utf-8")
    partial.rename(root / FILE)


def load_joint(root: Path, model_sha256: str, attributes: Mapping[str, Attribute]) -> JointProfile | None:
    """The joint profile at `root`, None where there is none; attributes are those loaded from below it, by name.

    Raises ArtifactError for a broken file, one of another model, and one of an attribute that is not there or has
    other directions now.
    """
    path = root / FILE
    if not path.exists():
        return None
    try:
        raw: Any = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(raw, dict) or set(raw) != set(FIELDS) or not isinstance(raw["attributes"], dict):
            raise ValueError(f"it must be an object with exactly {', '.join(FIELDS)}, attributes being one by name")
        if raw["format"] != FORMAT or raw["unit"] != UNIT:
            raise ValueError(
                f"format and unit are {raw['format']!r} and {raw['unit']!r}, this version reads {FORMAT} and {UNIT!r}"
            )
        if raw["model_sha256"] != model_sha256:
            raise ValueError(
                f"it was measured on the model {str(raw['model_sha256'])[:12]}, this one is {model_sha256[:12]}"
            )
        profile = JointProfile.from_json(raw["profile"])
        if set(profile.names) != set(raw["attributes"]):
            raise ValueError(f"its profile is of {list(profile.names)}, its attributes are {list(raw['attributes'])}")
        for name, digest in raw["attributes"].items():
            if name not in attributes:
                raise ValueError(f"it names the attribute {name!r}, which is not below {root}")
            if attributes[name].directions_sha256 != digest:
                raise ValueError(f"the directions of {name!r} have changed since")
    except (OSError, ValueError, RecursionError) as error:
        raise ArtifactError(f"{path} cannot be used: {error}; calibrate again, or remove it") from error
    return profile
