"""Reader of the SAELens layout: a folder with `cfg.json` and `sae_weights.safetensors`.

Written after the files of SAELens 6 (https://github.com/decoderesearch/SAELens, `SAE.save_model`); configs of
earlier versions, whose metadata lie flat beside the rest, are read too. Beside these two files we keep, optionally,
`feature_stats.safetensors` with `max_act`, `mean_act` and `density`, each [features].
"""

import hashlib
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from steerserve.errors import ArtifactError
from steerserve.saes.activation import Relu, TopK
from steerserve.saes.sae import FeatureStats, SaeFacts, SparseAutoencoder

CONFIG, WEIGHTS, STATS = "cfg.json", "sae_weights.safetensors", "feature_stats.safetensors"

HONOURED: dict[str, tuple[Any, ...]] = {
    "normalize_activations": ("none", None, False),
    "reshape_activations": ("none", None),
    "finetuning_scaling_factor": (False, None),
    "hook_head_index": (None,),
    "activation_fn": ("relu", "topk", None),
    "activation_fn_str": ("relu", "topk", None),
}
"""Fields of a config that change what the SAE computes, and the values under which it computes what we compute."""

_FLOATS = (torch.float32, torch.float16, torch.bfloat16)
_HOOKS = re.compile(r"(?:blocks|layers?)\.(\d+)(?:\.hook_resid_post|\.output)?")


@dataclass(frozen=True)
class Architecture:
    """An architecture of the layout: how its activation is made, and the tensors [features] it has beyond the four."""

    build: Callable[[Mapping[str, Any], Mapping[str, Tensor]], nn.Module]
    tensors: tuple[str, ...] = ()


def _top_k(config: Mapping[str, Any], _: Mapping[str, Tensor]) -> nn.Module:
    k, features = config.get("k"), config["d_sae"]
    if not isinstance(k, int) or isinstance(k, bool) or not 1 <= k <= features:
        raise ArtifactError(
            f"k: {k!r}, but a topk SAE of {features} features needs a whole number from 1 to {features}"
        )
    return TopK(k)


ARCHITECTURES: dict[str, Architecture] = {
    "standard": Architecture(lambda _config, _tensors: Relu()),
    "topk": Architecture(_top_k),
}


def load_saes(directory: Path) -> dict[str, SparseAutoencoder]:
    """Every SAE folder in a directory by its name, in alphabetical order; folders without `cfg.json` are no SAEs."""
    if not directory.is_dir():
        raise ArtifactError(f"no SAE directory at {directory}")
    folders = sorted(path for path in directory.iterdir() if (path / CONFIG).is_file())
    return {folder.name: load_sae(folder) for folder in folders}


def load_sae(folder: Path) -> SparseAutoencoder:
    """One SAE, checked, in float32; its id is the folder's name. An ArtifactError names field, value and what fits."""
    try:
        config = read_config(folder / CONFIG)
        architecture = ARCHITECTURES[config["architecture"]]
        hidden_size, features = config["d_in"], config["d_sae"]
        shapes = {
            "W_enc": (hidden_size, features),
            "b_enc": (features,),
            "W_dec": (features, hidden_size),
            "b_dec": (hidden_size,),
        }
        shapes |= dict.fromkeys(architecture.tensors, (features,))
        tensors = read_tensors(folder / WEIGHTS, shapes)
        activation = architecture.build(config, tensors)
        stats = None
        if (folder / STATS).exists():
            stats = FeatureStats(
                **read_tensors(folder / STATS, dict.fromkeys(FeatureStats.__dataclass_fields__, (features,)))
            )
        metadata = config["metadata"]
        facts = SaeFacts(
            id=folder.name,
            layer=layer_of(metadata),
            hidden_size=hidden_size,
            features=features,
            activation=config["architecture"],
            sha256=hashlib.sha256((folder / WEIGHTS).read_bytes()).hexdigest(),
            policy=metadata.get("policy"),
            k=config.get("k") if isinstance(activation, TopK) else None,
            metadata=metadata,
        )
        if facts.policy not in ("mask", "visible", None):
            raise ArtifactError(f"policy: {facts.policy!r}, allowed are 'mask' and 'visible'")
        return SparseAutoencoder(facts, fold(config, tensors), activation, stats)
    except ArtifactError as error:
        raise ArtifactError(f"SAE {folder}: {error}") from error


def read_config(path: Path) -> dict[str, Any]:
    """A config whose `metadata` is a dict, with every field that we could not honour refused."""
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ArtifactError(f"{path.name} cannot be read: {error}") from error
    if not isinstance(config, dict):
        raise ArtifactError(f"{path.name} must hold an object, got {type(config).__name__}")
    if not isinstance(config.setdefault("metadata", dict(config)), dict):
        raise ArtifactError(f"metadata must be an object, got {config['metadata']!r}")
    for name in ("d_in", "d_sae"):
        if not isinstance(config.get(name), int) or config[name] < 1:
            raise ArtifactError(f"{name}: {config.get(name)!r}, but a whole number of 1 or more is needed")
    for name, allowed in HONOURED.items():
        for place in (config, config["metadata"]):
            if name in place and not any(place[name] is value or place[name] == value for value in allowed):
                raise ArtifactError(f"{name}: {place[name]!r} is not supported, allowed are {list(allowed)}")
    config.setdefault("architecture", "standard")
    if (
        "topk" in (config.get("activation_fn"), config.get("activation_fn_str"))
        and config["architecture"] == "standard"
    ):
        config |= {"architecture": "topk", "k": (config.get("activation_fn_kwargs") or {}).get("k")}
    if config["architecture"] not in ARCHITECTURES:
        raise ArtifactError(
            f"architecture: {config['architecture']!r} is not supported, allowed are {sorted(ARCHITECTURES)}"
        )
    return config


def layer_of(metadata: Mapping[str, Any]) -> int:
    """The layer an SAE reads, from `hook_name` (or, in old configs, `hook_point`); only layer outputs are sites."""
    name = metadata.get("hook_name", metadata.get("hook_point"))
    match = _HOOKS.fullmatch(name) if isinstance(name, str) else None
    if match is None:
        raise ArtifactError(f"hook_name: {name!r}, but a layer's output is needed, such as 'blocks.3.hook_resid_post'")
    layer = metadata.get("hook_layer", metadata.get("hook_point_layer"))
    if layer is not None and layer != int(match[1]):
        raise ArtifactError(f"hook_layer: {layer!r} contradicts hook_name {name!r}")
    return int(match[1])


def read_tensors(path: Path, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """Exactly the tensors named, in float32; missing, unexpected, misshapen or non-finite ones are refused."""
    try:
        found = load_file(path)
    except (OSError, SafetensorError) as error:
        raise ArtifactError(f"{path.name} cannot be read as safetensors: {error}") from error
    if missing := sorted(shapes.keys() - found.keys()):
        raise ArtifactError(f"{path.name}: missing tensors {missing}")
    if unexpected := sorted(found.keys() - shapes.keys()):
        raise ArtifactError(f"{path.name}: unexpected tensors {unexpected}, allowed are {sorted(shapes)}")
    for name, shape in shapes.items():
        tensor = found[name]
        if tuple(tensor.shape) != shape:
            turned = " (it is transposed)" if len(shape) == 2 and tuple(tensor.shape) == shape[::-1] else ""
            raise ArtifactError(f"{path.name}: {name} has shape {list(tensor.shape)}, expected {list(shape)}{turned}")
        if tensor.dtype not in _FLOATS:
            raise ArtifactError(
                f"{path.name}: {name} has type {tensor.dtype}, allowed are {[str(kind) for kind in _FLOATS]}"
            )
        if not bool(tensor.isfinite().all()):
            raise ArtifactError(f"{path.name}: {name} has {int((~tensor.isfinite()).sum())} values that are not finite")
    return {name: found[name].float() for name in shapes}


def fold(config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Fold the layout's two switches into the weights, so that what is held follows the one definition.

    `apply_b_dec_to_input: false` encodes `h W_enc + b_enc`, which is ours with `b_enc + b_dec W_enc`.
    `rescale_acts_by_decoder_norm: true` scales each pre-activation by its decoder row's norm and divides the row by it.
    """
    held = dict(tensors)
    if not config.get("apply_b_dec_to_input", True):
        held["b_enc"] = held["b_enc"] + held["b_dec"] @ held["W_enc"]
    if config["architecture"] == "topk" and config.get("rescale_acts_by_decoder_norm", False):
        norm = held["W_dec"].norm(dim=1)
        if not bool((norm > 0).all()):
            raise ArtifactError(
                f"W_dec: row {int(norm.argmin())} is zero, which rescale_acts_by_decoder_norm cannot divide by"
            )
        held |= {"W_enc": held["W_enc"] * norm, "b_enc": held["b_enc"] * norm, "W_dec": held["W_dec"] / norm[:, None]}
    return held
