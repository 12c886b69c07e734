"""How a model is sampled where a request does not say: its family's defaults, changed by its own folder."""

from collections.abc import Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, TypeGuard

from steerserve.config import MAX_TEMPERATURE
from steerserve.errors import ArtifactError, RequestError
from steerserve.models.base import SamplerDefaults
from steerserve.models.checkpoint.config import read_object
from steerserve.models.pretrained import from_folder

FILE = "generation_config.json"
UNCHOSEN = "_from_model_config"
"""Set where nobody chose the file's settings: `transformers` wrote out the defaults of its own classes."""
NEUTRAL: Mapping[str, Any] = {
    "repetition_penalty": 1.0,
    "encoder_repetition_penalty": 1.0,
    "no_repeat_ngram_size": 0,
    "min_p": 0.0,
    "typical_p": 1.0,
    "epsilon_cutoff": 0.0,
    "eta_cutoff": 0.0,
    "penalty_alpha": 0.0,
    "diversity_penalty": 0.0,
    "guidance_scale": 1.0,
    "num_beams": 1,
    "bad_words_ids": [],
    "suppress_tokens": [],
    "begin_suppress_tokens": [],
    "sequence_bias": {},
}
"""Settings that change a draw in `transformers` and in no sampler of ours, by the value that asks for nothing."""
_CHOICES = ("order", "transfer")
_DREAM_ORDERS = {"maskgit_plus": "confidence", "topk_margin": "margin", "entropy": "entropy"}
"""Orders by the names of Dream's `alg`."""


def check_sampling(temperature: object, top_p: object, top_k: object) -> None:
    """Raise RequestError for a setting out of bounds: one rule for a request's own and for a model's defaults.

    temperature is 0 to MAX_TEMPERATURE, 0 being the likeliest token; top_p is above 0 and at most 1, which leaves none
    out; top_k is a whole number of tokens, of which 0 and -1 leave none out.
    """
    if not _number(temperature) or not 0 <= temperature <= MAX_TEMPERATURE:
        raise RequestError(f"temperature must be 0 to {MAX_TEMPERATURE:g}, got {temperature!r}", "temperature")
    if not _number(top_p) or not 0 < top_p <= 1:
        raise RequestError(f"top_p must be above 0 and at most 1, got {top_p!r}", "top_p")
    if top_k is not None and (isinstance(top_k, bool) or not isinstance(top_k, int) or not -1 <= top_k < 2**31):
        raise RequestError(f"top_k must be a whole number from 1, or 0 or -1 for all tokens, got {top_k!r}", "top_k")


def read_generation_config(folder: Path) -> dict[str, Any]:
    """What a folder's `generation_config.json` sets, as `transformers` reads it; empty where there is none."""
    path = folder / FILE
    if not path.is_file():
        return {}
    read_object(path)
    try:
        config = from_folder("GenerationConfig", folder)
    except Exception as error:  # transformers raises exceptions of several kinds for values that it refuses
        raise ArtifactError(f"{path}: {' '.join(str(error).split())}") from error
    return {name: value for name, value in vars(config).items() if value is not None}


def read_sampler_defaults(folder: Path, base: SamplerDefaults | None = None) -> SamplerDefaults:
    """The sampler settings in a model folder's `generation_config.json` over those of `base`; `do_sample: false` is
    temperature 0. What else the file says is not ours to judge, but see `unused_settings`."""
    base = base or SamplerDefaults()
    path, said = folder / FILE, read_generation_config(folder)
    if said.get(UNCHOSEN) is True:
        return base
    given = _dreams(path, said) | {field.name: said[field.name] for field in fields(base) if field.name in said}
    for name in _CHOICES:
        _check_choice(path, name, given.get(name, "default"))
    if not isinstance(given.get("ignore_eos", False), bool):
        raise ArtifactError(f"{path}: ignore_eos must be true or false, got {given['ignore_eos']!r}")
    if said.get("do_sample") is False:
        given["temperature"] = 0.0
    defaults = replace(base, **given)
    try:
        check_sampling(defaults.temperature, defaults.top_p, defaults.top_k)
    except RequestError as error:
        raise ArtifactError(f"{path}: {error}") from error
    return defaults


def unused_settings(folder: Path) -> dict[str, Any]:
    """Sampler settings of a folder's `generation_config.json` that ask for something and are not followed."""
    said = read_generation_config(folder)
    if said.get(UNCHOSEN) is True:
        return {}
    return {name: said[name] for name, neutral in NEUTRAL.items() if said.get(name, neutral) != neutral}


def _dreams(path: Path, said: Mapping[str, Any]) -> dict[str, Any]:
    """The order and transfer that Dream's own keys ask for: `alg`, `alg_temp` and `eps`."""
    name = said.get("alg")
    if name is None:
        return {}
    eps = said.get("eps")
    options = {} if eps is None else {"eps": eps}
    if name == "origin":
        return {"order": "random", "transfer": {"type": "origin", **options}}
    if name not in _DREAM_ORDERS:
        raise ArtifactError(f"{path}: alg must be origin, {', '.join(_DREAM_ORDERS)}, got {name!r}")
    order = {"type": _DREAM_ORDERS[name], "filtered": True, "alg_temp": said.get("alg_temp") or 0.0}
    return {"order": order, "transfer": {"type": "timesteps", **options}}


def _check_choice(path: Path, name: str, value: Any) -> None:
    if not isinstance(value, str) and not (isinstance(value, Mapping) and isinstance(value.get("type"), str)):
        raise ArtifactError(f"{path}: {name} must be a name or an object with a type, got {value!r}")


def _number(value: object) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool)
