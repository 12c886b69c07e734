"""Reading the files of an SAE: configs and tensors, with everything that is wrong with them refused by name."""

import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from steerserve.errors import ArtifactError
from steerserve.numerics import aligned
from steerserve.pointers import refuse_pointer

Shapes = Mapping[str, tuple[int, ...]]

FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file."""
    refuse_pointer(path)
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ArtifactError(f"{path.name} cannot be read: {error}") from error
    if not isinstance(config, dict):
        raise ArtifactError(f"{path.name} must hold an object, got {type(config).__name__}")
    return config


def whole(config: Mapping[str, Any], name: str, least: int = 1) -> int:
    """A field that must be a whole number."""
    value = config.get(name)
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ArtifactError(f"{name}: {value!r}, but a whole number of {least} or more is needed")
    return value


def known(name: str, value: object, allowed: Collection[str]) -> str:
    """A field that must be one of the names we know."""
    if not isinstance(value, str) or value not in allowed:
        raise ArtifactError(f"{name}: {value!r} is not supported, allowed are {sorted(allowed)}")
    return value


def choose_k(config: Mapping[str, Any], features: int) -> int:
    """The field `k` of an SAE that keeps so many features of each token."""
    value = config.get("k")
    if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= features:
        raise ArtifactError(
            f"k: {value!r}, but a topk SAE of {features} features needs a whole number from 1 to {features}"
        )
    return value


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """Every tensor of a file, memory-mapped."""
    refuse_pointer(path)
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise ArtifactError(f"{path.name} cannot be read as safetensors: {error}") from error


def read_tensors(path: Path, shapes: Shapes) -> dict[str, Tensor]:
    """Exactly the tensors named, in float32; missing, unexpected, misshapen or non-finite ones are refused."""
    return checked(path.name, read_safetensors(path), shapes)


def checked(
    file: str,
    found: Mapping[str, Tensor],
    shapes: Shapes,
    optional: Collection[str] = (),
    integers: Collection[str] = (),
) -> dict[str, Tensor]:
    """The tensors named, in float32 and on aligned memory; a shape may have sides of -1. A tensor stays mapped where
    it is both already.

    Those of `optional` may be missing, those of `integers` hold whole numbers and are left as they are. Missing,
    unexpected, misshapen or non-finite tensors are refused.
    """
    if missing := sorted(shapes.keys() - found.keys() - set(optional)):
        raise ArtifactError(f"{file}: missing tensors {missing}")
    if unexpected := sorted(found.keys() - shapes.keys()):
        raise ArtifactError(f"{file}: unexpected tensors {unexpected}, allowed are {sorted(shapes)}")
    for name, tensor in found.items():
        check_shape(file, name, tuple(tensor.shape), shapes[name])
        allowed = INTEGERS if name in integers else FLOATS
        if tensor.dtype not in allowed:
            raise ArtifactError(
                f"{file}: {name} has type {tensor.dtype}, allowed are {[str(kind) for kind in allowed]}"
            )
        if tensor.numel() == 0:
            raise ArtifactError(f"{file}: {name} is empty")
        # Extremes rather than `isfinite`, which would make a copy of a matrix that is only mapped.
        if name not in integers and not all(bool(extreme.isfinite()) for extreme in tensor.aminmax()):
            raise ArtifactError(f"{file}: {name} has {int((~tensor.isfinite()).sum())} values that are not finite")
    return {name: tensor if name in integers else aligned(tensor.float()) for name, tensor in found.items()}


def check_shape(file: str, name: str, found: tuple[int, ...], wanted: tuple[int, ...]) -> None:
    """Raise an ArtifactError unless the shapes agree; the message says so where one is the other transposed."""
    if len(found) != len(wanted) or any(want not in (have, -1) for have, want in zip(found, wanted, strict=True)):
        turned = " (it is transposed)" if len(wanted) == 2 and found == wanted[::-1] else ""
        raise ArtifactError(f"{file}: {name} has shape {list(found)}, expected {list(wanted)}{turned}")
