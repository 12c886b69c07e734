"""How a model is sampled where a request does not say: its family's defaults, changed by its own folder."""

from collections.abc import Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from steerserve.errors import ArtifactError
from steerserve.models.base import SamplerDefaults
from steerserve.models.folder import read_object

_CHOICES = ("order", "transfer")


def read_sampler_defaults(folder: Path, base: SamplerDefaults | None = None) -> SamplerDefaults:
    """The sampler settings in a model folder's `generation_config.json` over those of `base`; other keys of it are
    not ours to judge."""
    base = base or SamplerDefaults()
    path = folder / "generation_config.json"
    if not path.is_file():
        return base
    raw = read_object(path)
    given = {field.name: raw[field.name] for field in fields(SamplerDefaults) if raw.get(field.name) is not None}
    for field in fields(SamplerDefaults):
        if field.name in given:
            _check(path, field.name, given[field.name], field.default)
    defaults = replace(base, **given)
    # As a request's own settings are bounded: a default out of bounds would refuse every request that names none.
    if not 0 <= defaults.temperature <= 10 or not 0 < defaults.top_p <= 1:
        raise ArtifactError(
            f"{path}: temperature must be 0 to 10 and top_p above 0 and at most 1, "
            f"got {defaults.temperature} and {defaults.top_p}"
        )
    return defaults


def _check(path: Path, name: str, value: Any, default: object) -> None:
    if name in _CHOICES:
        if not isinstance(value, str) and not (isinstance(value, Mapping) and isinstance(value.get("type"), str)):
            raise ArtifactError(f"{path}: {name} must be a name or an object with a type, got {value!r}")
        return
    number = isinstance(default, float) and isinstance(value, int) and not isinstance(value, bool)
    if not number and type(value) is not type(default):
        raise ArtifactError(f"{path}: {name} must be a {type(default).__name__}, got {value!r}")
