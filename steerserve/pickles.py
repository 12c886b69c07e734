"""Read torch's pickled checkpoints without executing anything in them, and keep their tensors as safetensors.

Only `torch.load(weights_only=True)` reads a pickle: its unpickler builds tensors and plain values and knows no other
callable, so a payload cannot run.
"""

import os
import pickle
import re
import shutil
import tempfile
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from steerserve.digests import files_sha256
from steerserve.errors import ArtifactError
from steerserve.pointers import refuse_pointer

SUFFIX = ".converted.safetensors"
SOURCE = "source_sha256"
"""Key of a converted file's metadata: the SHA-256 of the pickle it was made from."""


def load_pickle(path: Path) -> Any:
    """What a pickle written by `torch.save` holds: tensors on the CPU, memory-mapped where the format allows, in plain
    containers. Raises ArtifactError for a file that asks for anything else, or is not whole."""
    refuse_pointer(path)
    try:
        with warnings.catch_warnings():
            # torch warns of protocols its restricted unpickler may not know whole; such a file then fails to load.
            warnings.simplefilter("ignore", UserWarning)
            return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError as error:
        raise ArtifactError(
            f"{path} is a pickle that asks for {_asked_for(str(error))}; only tensors and plain values are read from a "
            "pickle, code is never run (save its tensors alone, best as safetensors)"
        ) from error
    except Exception as error:  # the bytes of a broken pickle are instructions, and may fail in any way
        reason = str(error).split("\n")[0].split(". ")[0]
        raise ArtifactError(f"{path} is not a whole torch checkpoint: {type(error).__name__}: {reason}") from error


def converted(path: Path) -> dict[str, Tensor] | None:
    """The tensors that `convert` kept of the pickle at `path`, memory-mapped; None where there are none, or where the
    pickle has changed since."""
    target = _target(path)
    if not target.is_file():
        return None
    try:
        with safe_open(target, framework="pt") as kept:
            if (kept.metadata() or {}).get(SOURCE) != files_sha256([path]):
                return None
            return {name: kept.get_tensor(name) for name in kept.keys()}  # noqa: SIM118  (safe_open has no __iter__)
    except (SafetensorError, OSError):
        return None


def convert(path: Path, tensors: Mapping[str, Tensor]) -> Path | None:
    """Keep the tensors of the pickle at `path` beside it, as `NAME.converted.safetensors`; returns that file, or None
    where the folder cannot be written to."""
    target = _target(path)
    temporary = None
    try:
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=".", suffix=SUFFIX, delete=False) as stream:
            temporary = Path(stream.name)
        save_file(_apart(tensors), temporary, {SOURCE: files_sha256([path]), "source": path.name})
        shutil.copymode(path, temporary)
        os.replace(temporary, target)
    except (OSError, SafetensorError):  # safetensors reports a full disk as an error of its own
        return None
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)
    return target


def _target(path: Path) -> Path:
    return path.with_name(path.name + SUFFIX)


def _apart(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors, contiguous, no two of them in one storage, as safetensors wants them."""
    seen: set[int] = set()
    apart = {}
    for name, tensor in tensors.items():
        storage = tensor.untyped_storage().data_ptr()
        apart[name] = tensor.clone(memory_format=torch.contiguous_format) if storage in seen else tensor.contiguous()
        seen.add(storage)
    return apart


def _asked_for(message: str) -> str:
    """What a pickle wanted beyond tensors, from torch's many-line message."""
    found = re.search(r"GLOBAL ([\w.]+)", message)
    return found[1] if found else "more than that"
