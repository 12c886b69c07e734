"""Reader of EleutherAI's sparsify layout: a folder with `cfg.json` and `sae.safetensors`, named as its hook point.

Written after sparsify 1.3 (https://github.com/EleutherAI/sparsify) and its predecessor `sae`, whose configs have
`signed`. The layer is in the folder's name: `layers.10`, or with the path of the module, `model.layers.10`.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from steerserve.errors import ArtifactError
from steerserve.saes.activation import AbsTopK, Activation, GroupMax, TopK
from steerserve.saes.layouts import layer as layers
from steerserve.saes.layouts.files import choose_k, known, read_json, read_tensors, whole
from steerserve.saes.layouts.parts import Description, Parts

CONFIG, WEIGHTS = "cfg.json", "sae.safetensors"

ACTIVATIONS: dict[str, Callable[[int], Activation]] = {"topk": TopK, "signed topk": AbsTopK, "groupmax": GroupMax}


def describe(folder: Path) -> Description:
    """What the config and the folder's name say."""
    config = read_config(folder / CONFIG)
    name = folder.resolve().name
    layer = layers.of_module(name)
    if layer is None and layers.of_module(name.rpartition(".")[0]) is not None:
        raise ArtifactError(f"hook point {name!r}, but a layer's output is needed, such as 'layers.3'")
    return Description(config["activation"], layer, k=config["k"], metadata=config)


def read(folder: Path) -> Parts:
    """The weights; the encoder is transposed without a copy."""
    config = read_config(folder / CONFIG)
    hidden_size, features = config["d_in"], config["num_latents"]
    shapes: dict[str, tuple[int, ...]] = {
        "encoder.weight": (features, hidden_size),
        "encoder.bias": (features,),
        "W_dec": (features, hidden_size),
        "b_dec": (hidden_size,),
    }
    tensors = read_tensors(folder / WEIGHTS, shapes)
    held = {name: tensors[name] for name in ("W_dec", "b_dec")}
    held |= {"W_enc": tensors["encoder.weight"].T, "b_enc": tensors["encoder.bias"]}
    return Parts(held, ACTIVATIONS[config["activation"]](config["k"]))


def read_config(path: Path) -> dict[str, Any]:
    """A config with `num_latents`, `activation` and `k` filled in and checked; coders of other things are refused."""
    config = read_json(path)
    for name in ("transcode", "skip_connection"):
        if config.get(name, False) is not False:
            raise ArtifactError(f"{name}: {config[name]!r} is not supported, only SAEs of one layer's output are")
    hidden_size = whole(config, "d_in")
    if not config.get("num_latents"):
        config["num_latents"] = hidden_size * whole(config, "expansion_factor")
    whole(config, "num_latents")
    config.setdefault("activation", "topk")
    if config.get("signed", False):
        config["activation"] = f"signed {config['activation']}"
    known("activation", config["activation"], ACTIVATIONS)
    config["k"] = choose_k(config, config["num_latents"])
    if config["activation"] == "groupmax" and config["num_latents"] % config["k"]:
        raise ArtifactError(f"k: {config['k']} groups do not divide the {config['num_latents']} features")
    return config
