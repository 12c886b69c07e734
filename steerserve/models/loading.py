"""Load a checkpoint folder strictly: every tensor of the family and no other, each in its shape."""

import hashlib
import json
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from tokenizers import Tokenizer
from torch import Tensor

from steerserve.errors import ArtifactError
from steerserve.models.base import DiffusionLM, ModelFacts, SamplerDefaults
from steerserve.models.bert import BertDiffusionLM
from steerserve.models.llada import LladaDiffusionLM

FAMILIES: dict[str, type[BertDiffusionLM] | type[LladaDiffusionLM]] = {
    "bert": BertDiffusionLM,
    "llada": LladaDiffusionLM,
}
"""Families by the `model_type` of their `config.json`."""


def read_config(folder: Path) -> dict[str, Any]:
    """The parsed `config.json` of a model folder."""
    path = folder / "config.json"
    if not path.is_file():
        raise ArtifactError(f"{folder} is no model folder: it has no config.json")
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ArtifactError(f"{path} is not JSON: {error}") from error
    if not isinstance(raw, dict):
        raise ArtifactError(f"{path} must hold an object, got {type(raw).__name__}")
    return raw


def read_sampler_defaults(folder: Path) -> SamplerDefaults:
    """The sampler settings in a model folder's `generation_config.json`; other keys of it are not ours to judge."""
    path = folder / "generation_config.json"
    if not path.is_file():
        return SamplerDefaults()
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
        given = {field.name: raw[field.name] for field in fields(SamplerDefaults) if raw.get(field.name) is not None}
    except (ValueError, AttributeError) as error:
        raise ArtifactError(f"{path} is not a JSON object: {error}") from error
    for field in fields(SamplerDefaults):
        value = given.get(field.name, field.default)
        number = isinstance(field.default, float) and isinstance(value, int) and not isinstance(value, bool)
        if not number and type(value) is not type(field.default):
            raise ArtifactError(f"{path}: {field.name} must be a {type(field.default).__name__}, got {value!r}")
    defaults = SamplerDefaults(**given)
    # As a request's own settings are bounded: a default out of bounds would refuse every request that names none.
    if not 0 <= defaults.temperature <= 10 or not 0 < defaults.top_p <= 1:
        raise ArtifactError(
            f"{path}: temperature must be 0 to 10 and top_p above 0 and at most 1, "
            f"got {defaults.temperature} and {defaults.top_p}"
        )
    return defaults


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a model folder: one file, or the shards that the index names."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        try:
            shards = sorted(
                {str(shard) for shard in json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()}
            )
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ArtifactError(f"{index} is no index of shards: {type(error).__name__}: {error}") from error
        # A shard is a file of this folder; an index must not make the server read another.
        if any(Path(shard).name != shard for shard in shards):
            raise ArtifactError(f"{index} names a shard outside its folder: {shards}")
        files = [folder / shard for shard in shards]
    else:
        files = [folder / "model.safetensors"]
    for file in files:
        if not file.is_file():
            raise ArtifactError(f"{folder} has no {file.name}")
    return files


def weights_sha256(folder: Path) -> str:
    """SHA-256 over the weight files in name order: the identity of a model, recorded in what is made from it."""
    digest = hashlib.sha256()
    for file in weight_files(folder):
        with open(file, "rb") as stream:
            while chunk := stream.read(1 << 24):
                digest.update(chunk)
    return digest.hexdigest()


def load_model(folder: Path, dtype: torch.dtype = torch.float32, device: str = "cpu") -> DiffusionLM:
    """The model of a folder, in evaluation mode; raises ArtifactError naming the missing, unexpected or misshapen."""
    raw = read_config(folder)
    kind = raw.get("model_type")
    if not isinstance(kind, str) or kind not in FAMILIES:
        raise ArtifactError(f"{folder}: model_type is {kind!r}, known families are {sorted(FAMILIES)}")
    with torch.device("meta"):
        try:
            model = FAMILIES[kind].from_config(raw)
        except TypeError as error:
            raise ArtifactError(f"{folder}/config.json does not fit the {kind} family: {error}") from error
    _check_ids(folder, model.facts)
    wanted = {name: tensor.shape for name, tensor in model.state_dict().items()}
    found: dict[str, Tensor] = {}
    for file in weight_files(folder):
        try:
            with safe_open(file, framework="pt", device=device) as shard:
                for name in shard.keys():  # noqa: SIM118  (safe_open has no __iter__)
                    if name in found:
                        raise ArtifactError(f"{folder}: tensor {name} is in two shards")
                    found[name] = shard.get_tensor(name)
        except SafetensorError as error:
            raise ArtifactError(f"{file} is not a whole safetensors file: {error}") from error
    _compare(folder, wanted, found)
    model.load_state_dict({name: tensor.to(dtype) for name, tensor in found.items()}, strict=True, assign=True)
    model.requires_grad_(False)
    return model.eval()


def _check_ids(folder: Path, facts: ModelFacts) -> None:
    ids: list[tuple[str, object]] = [("mask", facts.mask_id), ("eos", facts.eos_id)]
    ids += [("bos", facts.bos_id)] if facts.bos_id is not None else []
    for name, token in [*ids, *(("special", token) for token in facts.forbidden_ids)]:
        if isinstance(token, bool) or not isinstance(token, int) or not 0 <= token < facts.vocab_size:
            raise ArtifactError(
                f"{folder}/config.json: {name} token {token!r} is no id from 0 to {facts.vocab_size - 1}"
            )


def _compare(folder: Path, wanted: dict[str, torch.Size], found: dict[str, Tensor]) -> None:
    missing, unexpected = sorted(set(wanted) - set(found)), sorted(set(found) - set(wanted))
    misshapen = [
        f"{name} is {list(found[name].shape)}, expected {list(shape)}"
        for name, shape in sorted(wanted.items())
        if name in found and found[name].shape != shape
    ]
    faults = [
        f"{title}: {', '.join(names[:8])}{f' and {len(names) - 8} more' if len(names) > 8 else ''}"
        for title, names in (
            ("missing tensors", missing),
            ("unexpected tensors", unexpected),
            ("misshapen tensors", misshapen),
        )
        if names
    ]
    if faults:
        raise ArtifactError(f"{folder} does not fit its config.json; " + "; ".join(faults))


def load_tokenizer(folder: Path) -> Tokenizer:
    """The folder's `tokenizer.json`; raises ArtifactError where there is none or it cannot be read."""
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise ArtifactError(f"{folder} has no tokenizer.json")
    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # tokenizers raises bare Exception for every kind of broken file
        raise ArtifactError(f"{path} is not a tokenizer: {error}") from error
