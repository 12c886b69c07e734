"""How a model is sampled where a request does not say: its family's defaults, changed by its own folder."""

from collections.abc import Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from steerserve.errors import ArtifactError
from steerserve.models.base import SamplerDefaults
from steerserve.models.folder import read_object

_CHOICES = ("order", "transfer")
_DREAM_ORDERS = {"maskgit_plus": "confidence", "topk_margin": "margin", "entropy": "entropy"}
"""Orders by the names of Dream's `alg`."""


def read_sampler_defaults(folder: Path, base: SamplerDefaults | None = None) -> SamplerDefaults:
    """The sampler settings in a model folder's `generation_config.json` over those of `base`; other keys of it are
    not ours to judge, but for `do_sample: false`, which is temperature 0."""
    base = base or SamplerDefaults()
    path = folder / "generation_config.json"
    if not path.is_file():
        return base
    raw = read_object(path)
    if raw.get("_from_model_config") is True:
        # Nobody chose these: transformers wrote out the defaults of its own classes.
        return base
    given = _dreams(path, raw) | {
        field.name: raw[field.name] for field in fields(SamplerDefaults) if raw.get(field.name) is not None
    }
    for field in fields(SamplerDefaults):
        if field.name in given:
            _check(path, field.name, given[field.name], field.default)
    if raw.get("do_sample") is False:
        given["temperature"] = 0.0
    defaults = replace(base, **given)
    # As a request's own settings are bounded: a default out of bounds would refuse every request that names none.
    if not 0 <= defaults.temperature <= 10 or not 0 < defaults.top_p <= 1:
        raise ArtifactError(
            f"{path}: temperature must be 0 to 10 and top_p above 0 and at most 1, "
            f"got {defaults.temperature} and {defaults.top_p}"
        )
    return defaults


def _dreams(path: Path, raw: Mapping[str, Any]) -> dict[str, Any]:
    """The order and transfer that Dream's own keys ask for: `alg`, `alg_temp` and `eps`."""
    name = raw.get("alg")
    if name is None:
        return {}
    eps = raw.get("eps")
    options = {} if eps is None else {"eps": eps}
    if name == "origin":
        return {"order": "random", "transfer": {"type": "origin", **options}}
    if name not in _DREAM_ORDERS:
        raise ArtifactError(f"{path}: alg must be origin, {', '.join(_DREAM_ORDERS)}, got {name!r}")
    order = {"type": _DREAM_ORDERS[name], "filtered": True, "alg_temp": raw.get("alg_temp") or 0.0}
    return {"order": order, "transfer": {"type": "timesteps", **options}}


def _check(path: Path, name: str, value: Any, default: object) -> None:
    if name in _CHOICES:
        if not isinstance(value, str) and not (isinstance(value, Mapping) and isinstance(value.get("type"), str)):
            raise ArtifactError(f"{path}: {name} must be a name or an object with a type, got {value!r}")
        return
    if name == "top_k":
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ArtifactError(f"{path}: top_k must be a whole number above 0, got {value!r}")
        return
    number = isinstance(default, float) and isinstance(value, int) and not isinstance(value, bool)
    if not number and type(value) is not type(default):
        raise ArtifactError(f"{path}: {name} must be a {type(default).__name__}, got {value!r}")
