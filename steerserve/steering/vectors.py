"""Steering directions of other tools, by name: safetensors files and GGUF control vectors.

A layer is counted from 0 everywhere, and a direction belongs to that layer's output. Accepted keys of a safetensors
file, one scheme a file:

    layer.N  layers.N  direction.N      one vector, named by the file; [hidden_size] each
    NAME.layer.N  (layers, direction)   several vectors, each named FILE/NAME; [hidden_size] each
    any single key, 2-D                 one vector; [num_layers, hidden_size], a row of zeros is no direction
    any single key, 1-D                 one vector; [hidden_size], its layer is the file's metadata `layer`

A GGUF file is a control vector (architecture `controlvector`) as repeng and llama.cpp write them: tensors
`direction.N`. Both add direction.N to the residual stream after block N, counted from 0: repeng 0.4.0 to the output of
`layers[N]` (control.py), llama.cpp to `l_out-N` (`build_cvec(cur, il)` after the block's last addition, src/models;
common.cpp and llama-adapter.cpp put direction.il at il). So N is the layer here; llama.cpp never steers layer 0.
"""

import hashlib
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from steerserve.errors import ArtifactError
from steerserve.extras import install_command
from steerserve.pointers import refuse_pointer
from steerserve.steering.mounted import files_below

SUFFIXES: Final = (".safetensors", ".gguf")
KEY: Final = re.compile(r"(?:(?P<name>.+)\.)?(?:layers?|direction)\.(?P<layer>[0-9]{1,9})")
LAYER: Final = re.compile(r"[0-9]{1,9}")
SCHEMES: Final = (
    "layer.N, layers.N or direction.N, the same behind 'NAME.', a single tensor [layers, hidden_size], or a single "
    "tensor [hidden_size] in a file with the metadata 'layer'"
)
Stack = dict[str, dict[int, Tensor]]
"""Raw directions by the name behind the file's ("" for none) and by layer."""


@dataclass(frozen=True)
class NamedVector:
    """A direction at one or more layers' outputs."""

    name: str
    layers: Mapping[int, Tensor] = field(repr=False)
    """Unit directions [hidden_size] float32."""
    norms: Mapping[int, float]
    """Norms of the directions as they were stored: strength 1 of the tool that made them, in hidden units."""
    sha256: str
    """SHA-256 of the file."""
    source: str
    """The file, from the folder that was loaded."""


def load_vectors(directory_or_file: Path, num_layers: int, hidden_size: int) -> dict[str, NamedVector]:
    """Every vector of a file, or of a folder and those below it, by name: the path from the folder, without the suffix.

    Raises ArtifactError for a path without vectors, a file of another layout, a shape or layer that is not the model's,
    a direction that is not finite or all zero, two vectors of one name, or a GGUF file without the `gguf` package.
    """
    if directory_or_file.is_dir():
        root = directory_or_file
        files = [path for path in files_below(root) if path.suffix in SUFFIXES]
    else:
        root, files = directory_or_file.parent, [directory_or_file]
    if not directory_or_file.exists() or not files:
        fault = "has no vectors" if directory_or_file.exists() else "does not exist"
        raise ArtifactError(
            f"{directory_or_file} {fault}: a file {' or '.join(SUFFIXES)}, or a folder of them, is needed"
        )
    found: dict[str, NamedVector] = {}
    for path in files:
        place = path.relative_to(root)
        for inner, raw in _read(path, num_layers).items():
            name = "/".join((*place.with_suffix("").parts, *([inner] if inner else [])))
            if name in found:
                raise ArtifactError(f"{path}: a second vector named {name!r}, beside {found[name].source}")
            units, norms = _units(path, raw, num_layers, hidden_size)
            found[name] = NamedVector(name, units, norms, _sha256(path), place.as_posix())
    return found


def _read(path: Path, num_layers: int) -> Stack:
    refuse_pointer(path)
    if path.suffix == ".safetensors":
        return _read_safetensors(path, num_layers)
    if path.suffix == ".gguf":
        return _read_gguf(path)
    raise ArtifactError(f"{path} is no vector: its suffix is {path.suffix!r}, allowed are {list(SUFFIXES)}")


def _read_safetensors(path: Path, num_layers: int) -> Stack:
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  (safe_open has no __iter__)
    except (OSError, SafetensorError) as error:
        raise ArtifactError(f"{path} is not a whole safetensors file: {error}") from error
    if whole := [key for key, tensor in tensors.items() if not tensor.is_floating_point()]:
        raise ArtifactError(f"{path}: {whole} are {tensors[whole[0]].dtype}, directions are floating-point numbers")
    if tensors and all(KEY.fullmatch(key) for key in tensors):
        return _by_key(path, tensors)
    if len(tensors) == 1:
        (tensor,) = tensors.values()
        if tensor.ndim == 2:
            return {"": _rows(path, tensor, num_layers)}
        if "layer" in metadata:
            if not LAYER.fullmatch(metadata["layer"]):
                raise ArtifactError(f"{path}: metadata layer must be a whole number, got {metadata['layer']!r}")
            return {"": {int(metadata["layer"]): tensor}}
    raise ArtifactError(f"{path}: cannot tell the layers of the tensors {sorted(tensors)[:8]}; accepted are {SCHEMES}")


def _by_key(path: Path, tensors: Mapping[str, Tensor]) -> Stack:
    found: Stack = {}
    for key, tensor in tensors.items():
        match = KEY.fullmatch(key)
        if match is None:
            raise ArtifactError(f"{path}: tensor {key!r} names no layer; accepted are {SCHEMES}")
        directions = found.setdefault(match["name"] or "", {})
        if int(match["layer"]) in directions:
            raise ArtifactError(f"{path}: tensor {key!r} is a second direction of layer {int(match['layer'])}")
        directions[int(match["layer"])] = tensor
    return found


def _rows(path: Path, tensor: Tensor, num_layers: int) -> dict[int, Tensor]:
    """The rows of a stack of directions that are not all zero."""
    if len(tensor) != num_layers:
        raise ArtifactError(
            f"{path}: {len(tensor)} rows, but the model has {num_layers} layers and takes a row of each"
        )
    rows = {layer: row for layer, row in enumerate(tensor) if bool((row != 0).any())}
    if not rows:
        raise ArtifactError(f"{path}: every direction is all zero")
    return rows


def _read_gguf(path: Path) -> Stack:
    try:
        import gguf
    except ImportError as error:
        raise ArtifactError(f"{path} needs the gguf package: {install_command('gguf')}") from error
    plain = (gguf.GGMLQuantizationType.F32, gguf.GGMLQuantizationType.F16, gguf.GGMLQuantizationType.BF16)
    try:
        reader = gguf.GGUFReader(path)
        field = reader.get_field("general.architecture")
        architecture = field.contents() if field is not None else None
        tensors = {}
        for tensor in reader.tensors:
            if tensor.tensor_type not in plain:
                raise ArtifactError(
                    f"{path}: tensor {tensor.name!r} is {tensor.tensor_type.name}, directions are float"
                )
            # Copied, so that nothing keeps the file mapped.
            tensors[tensor.name] = torch.from_numpy(gguf.dequantize(tensor.data, tensor.tensor_type).copy())
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise ArtifactError(f"{path} is not a whole GGUF file: {type(error).__name__}: {error}") from error
    if architecture != "controlvector":
        raise ArtifactError(f"{path}: general.architecture is {architecture!r}, a control vector's is 'controlvector'")
    if strange := [name for name in tensors if not re.fullmatch(r"direction\.[0-9]{1,9}", name)] or not tensors:
        raise ArtifactError(f"{path}: a control vector holds tensors direction.N, got {strange or 'none'}")
    return _by_key(path, tensors)


def _units(
    path: Path, raw: Mapping[int, Tensor], num_layers: int, hidden_size: int
) -> tuple[dict[int, Tensor], dict[int, float]]:
    """Unit directions and norms, by layer."""
    units, norms = {}, {}
    for layer, tensor in sorted(raw.items()):
        if layer >= num_layers:
            raise ArtifactError(f"{path}: layer {layer}, but the model has layers 0 to {num_layers - 1}")
        if tensor.shape != (hidden_size,):
            raise ArtifactError(f"{path}: layer {layer} is {list(tensor.shape)}, expected {[hidden_size]}")
        wide = tensor.double()
        norm = float(wide.norm())
        if not math.isfinite(norm) or norm == 0:
            fault = "all zero" if norm == 0 else "not finite"
            raise ArtifactError(f"{path}: the direction of layer {layer} is {fault}")
        units[layer], norms[layer] = (wide / norm).float(), norm
    return units, norms


def _sha256(path: Path) -> str:
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
