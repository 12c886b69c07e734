"""Reader of the SAELens layout: a folder with `cfg.json` and `sae_weights.safetensors`.

Written after the files of SAELens 6 (https://github.com/decoderesearch/SAELens): what `SAE.save_model` and
`TrainingSAE.save_inference_model` write, and checkpoints of a training run, which come with `activation_scaler.json`
where states were scaled. BatchTopK and Matryoshka SAEs are `jumprelu` once trained. Configs of earlier versions, whose
metadata lie flat beside the rest, are read too.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from steerserve.errors import ArtifactError
from steerserve.saes.activation import AbsTopK, Activation, JumpRelu, Relu, TopK
from steerserve.saes.layouts import layer as layers
from steerserve.saes.layouts.files import checked, choose_k, known, read_json, read_safetensors, whole
from steerserve.saes.layouts.fold import gated, plain_input, scaled_input, unit_decoder
from steerserve.saes.layouts.parts import Description, Parts
from steerserve.saes.matching_pursuit import Pursuit

CONFIG, WEIGHTS, SCALER = "cfg.json", "sae_weights.safetensors", "activation_scaler.json"

HONOURED: dict[str, tuple[Any, ...]] = {
    "normalize_activations": ("none", None, False, "expected_average_only_in", True),
    "reshape_activations": ("none", None),
    "hook_head_index": (None,),
    "activation_fn": ("relu", "topk", None),
    "activation_fn_str": ("relu", "topk", None),
}
"""Fields of a config that change what the SAE computes, and the values under which it computes what we compute."""

LINEAR = ("W_enc", "b_enc", "W_dec", "b_dec")


@dataclass(frozen=True)
class Architecture:
    """An architecture of the layout: the tensors it has, and how its activation is made of config and tensors."""

    tensors: tuple[str, ...]
    activation: Callable[[Mapping[str, Any], Mapping[str, Tensor]], Activation | Pursuit]
    rescales: bool | None = None
    """What `rescale_acts_by_decoder_norm` is where a config leaves it out; None: the architecture has no such field."""


def _pursuit(config: Mapping[str, Any], _: Mapping[str, Tensor]) -> Pursuit:
    given = {name: config[name] for name in Pursuit.__dataclass_fields__ if name in config}
    threshold = given.get("residual_threshold", 0.0)
    if isinstance(threshold, bool) or not isinstance(threshold, int | float):
        raise ArtifactError(f"residual_threshold: {threshold!r}, but a number is needed")
    if given.get("max_iterations") is not None:
        whole(given, "max_iterations")
    if not isinstance(given.get("stop_on_duplicate_support", True), bool):
        raise ArtifactError(f"stop_on_duplicate_support: {given['stop_on_duplicate_support']!r}, but a bool is needed")
    return Pursuit(**given)


def _batch_top_k(_: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Activation:
    return JumpRelu(tensors["topk_threshold"])


ARCHITECTURES: dict[str, Architecture] = {
    "standard": Architecture(LINEAR, lambda _config, _tensors: Relu()),
    "topk": Architecture(LINEAR, lambda config, _: TopK(choose_k(config, config["d_sae"])), rescales=False),
    "abstopk": Architecture(LINEAR, lambda config, _: AbsTopK(choose_k(config, config["d_sae"])), rescales=False),
    "jumprelu": Architecture((*LINEAR, "threshold"), lambda _, tensors: JumpRelu(tensors["threshold"])),
    "gated": Architecture(
        ("W_enc", "W_dec", "b_dec", "b_gate", "b_mag", "r_mag"), lambda _, tensors: JumpRelu(gated(tensors)[1])
    ),
    "matching_pursuit": Architecture(("W_dec", "b_dec"), _pursuit),
    # Only in checkpoints of a training run.
    "batchtopk": Architecture((*LINEAR, "topk_threshold"), _batch_top_k, rescales=True),
    "matryoshka_batchtopk": Architecture((*LINEAR, "topk_threshold"), _batch_top_k, rescales=True),
}


def describe(folder: Path) -> Description:
    """What the config says."""
    config = read_config(folder / CONFIG)
    metadata, k = config["metadata"], config.get("k")
    # BatchTopK writes its mean number as a float.
    counts = ARCHITECTURES[config["architecture"]].rescales is not None
    return Description(
        activation=config["architecture"],
        layer=layer_of(metadata),
        policy=metadata.get("policy"),
        k=int(k) if counts and isinstance(k, int | float) and float(k).is_integer() else None,
        metadata=metadata,
    )


def read(folder: Path) -> Parts:
    """The weights, with what the config asks to be done around them folded in."""
    config = read_config(folder / CONFIG)
    architecture, hidden_size, features = ARCHITECTURES[config["architecture"]], config["d_in"], config["d_sae"]
    shapes: dict[str, tuple[int, ...]] = dict.fromkeys(architecture.tensors, (features,))
    shapes |= {"W_enc": (hidden_size, features), "W_dec": (features, hidden_size), "b_dec": (hidden_size,)}
    shapes |= {"topk_threshold": ()}
    found = _without_scaling(read_safetensors(folder / WEIGHTS), config)
    tensors = checked(WEIGHTS, found, {name: shapes[name] for name in architecture.tensors})
    factor = scaling_factor(folder, config)
    subtracts = config.get("apply_b_dec_to_input", True)
    activation = architecture.activation(config, tensors)
    if isinstance(activation, Pursuit):
        # Its rows encode as well as decode, so of scaled states only bias and threshold are in other units.
        bias = tensors["b_dec"] / factor if subtracts else torch.zeros(hidden_size)
        threshold = activation.residual_threshold / factor
        pursuit = Pursuit(threshold, activation.max_iterations, activation.stop_on_duplicate_support)
        return Parts({"W_dec": tensors["W_dec"], "b_dec": bias}, pursuit)
    held = gated(tensors)[0] if "r_mag" in tensors else tensors
    if not subtracts:
        held = plain_input(held)
    if factor != 1.0:
        held = scaled_input(held, factor)
    if config.get("rescale_acts_by_decoder_norm", architecture.rescales) and architecture.rescales is not None:
        held = unit_decoder(held)
        if isinstance(activation, JumpRelu):
            activation = JumpRelu(activation.threshold / factor)
    return Parts({name: held[name] for name in LINEAR}, activation)


def _without_scaling(tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> dict[str, Tensor]:
    """The tensors without the activations' `scaling_factor`, which early versions of SAELens wrote; it must be 1.

    Raises ArtifactError where it is not, or where the config says that activations are scaled and no factor is there.
    """
    left = dict(tensors)
    factor = left.pop("scaling_factor", None)
    if factor is not None and not bool((factor == 1).all()):
        raise ArtifactError(f"{WEIGHTS}: scaling_factor is not 1; SAEs with scaled activations are not supported")
    asked = any(place.get("finetuning_scaling_factor") for place in (config, config["metadata"]))
    if asked and factor is None:
        raise ArtifactError(f"finetuning_scaling_factor: True, but {WEIGHTS} has no scaling_factor")
    return left


def read_config(path: Path) -> dict[str, Any]:
    """A config whose `metadata` is a dict, with every field that we could not honour refused."""
    config = read_json(path)
    if not isinstance(config.setdefault("metadata", dict(config)), dict):
        raise ArtifactError(f"metadata must be an object, got {config['metadata']!r}")
    for name in ("d_in", "d_sae"):
        whole(config, name)
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
    known("architecture", config["architecture"], ARCHITECTURES)
    return config


def scaling_factor(folder: Path, config: Mapping[str, Any]) -> float:
    """What states were multiplied by in training; 1 where they were not, or the factor is in the weights."""
    asked = config.get("normalize_activations")
    if asked not in ("expected_average_only_in", True):
        return 1.0
    if not (folder / SCALER).is_file():
        raise ArtifactError(
            f"normalize_activations: {asked!r} needs the factor that states were scaled by, in {SCALER}; "
            "an SAE saved for inference has it in its weights and says 'none'"
        )
    factor = read_json(folder / SCALER).get("scaling_factor")
    if isinstance(factor, bool) or not isinstance(factor, int | float) or not 0 < factor < float("inf"):
        raise ArtifactError(f"{SCALER}: scaling_factor is {factor!r}, but a number above 0 is needed")
    return float(factor)


def layer_of(metadata: Mapping[str, Any]) -> int:
    """The layer an SAE reads, from `hook_name` (or, in old configs, `hook_point`); only layer outputs are sites."""
    name = metadata.get("hook_name", metadata.get("hook_point"))
    layer = layers.of_module(name) if isinstance(name, str) else None
    if layer is None:
        raise ArtifactError(f"hook_name: {name!r}, but a layer's output is needed, such as 'blocks.3.hook_resid_post'")
    stated = metadata.get("hook_layer", metadata.get("hook_point_layer"))
    if stated is not None and stated != layer:
        raise ArtifactError(f"hook_layer: {stated!r} contradicts hook_name {name!r}")
    return layer
