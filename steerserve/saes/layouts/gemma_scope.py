"""Reader of Gemma Scope's layout (arXiv 2408.05147): `params.npz` of a JumpReLU SAE that encodes raw hidden states.

There is no config: the layer is in the folders' names, `layer_20/width_16k/average_l0_71`. A folder elsewhere needs
`steerserve.json` with its layer. The archive is read without pickle.
"""

import re
import zipfile
import zlib
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from steerserve.errors import ArtifactError
from steerserve.pointers import refuse_pointer
from steerserve.saes.activation import JumpRelu
from steerserve.saes.layouts import layer as layers
from steerserve.saes.layouts.files import checked
from steerserve.saes.layouts.fold import plain_input
from steerserve.saes.layouts.parts import Description, Parts

WEIGHTS = "params.npz"
ARRAYS = {"W_enc", "b_enc", "W_dec", "b_dec", "threshold"}

BROKEN = (
    OSError,
    ValueError,
    TypeError,
    EOFError,
    KeyError,
    MemoryError,  # a header that claims more than there is
    RuntimeError,  # an encrypted member
    NotImplementedError,  # a compression that is not known
    zipfile.BadZipFile,
    zlib.error,
)

_OTHER_SITES = re.compile(r"gemma-scope-[\w.-]*-(?:mlp|att|transcoders)\b")


def describe(folder: Path) -> Description:
    """What the folders' names say."""
    path = folder.resolve()
    if match := _OTHER_SITES.search(path.as_posix()):
        raise ArtifactError(f"{match[0]} does not hold SAEs of a layer's output, gemma-scope-...-res does")
    found = [layers.of_folder(part.name) for part in (path, path.parent, path.parent.parent)]
    return Description("jumprelu", next((layer for layer in found if layer is not None), None))


def read(folder: Path) -> Parts:
    """The weights; `b_dec` is not subtracted by these SAEs, which is folded into `b_enc`."""
    found = read_archive(folder / WEIGHTS)
    # Of the biases' lengths, because a matrix that is transposed must not pass for one of another size.
    sizes = [len(found[name]) if name in found and found[name].ndim == 1 else -1 for name in ("b_dec", "b_enc")]
    hidden_size, features = sizes
    shapes = {
        "W_enc": (hidden_size, features),
        "b_enc": (features,),
        "W_dec": (features, hidden_size),
        "b_dec": (hidden_size,),
        "threshold": (features,),
    }
    tensors = checked(WEIGHTS, found, shapes)
    threshold = tensors.pop("threshold")
    return Parts(plain_input(tensors), JumpRelu(threshold))


def read_archive(path: Path) -> dict[str, Tensor]:
    """Every array of an `.npz` as a tensor; one that holds objects is refused, unread."""
    refuse_pointer(path)
    try:
        with open(path, "rb") as stream:
            archive = np.load(stream, allow_pickle=False)
            if not isinstance(archive, np.lib.npyio.NpzFile):
                raise ArtifactError(f"{path.name} holds one array, but an archive of them is needed")
            # Before anything is unpacked: a small archive may hold much that is not asked for.
            if unexpected := sorted(set(archive.files) - ARRAYS):
                raise ArtifactError(f"{path.name}: unexpected arrays {unexpected[:8]}, allowed are {sorted(ARRAYS)}")
            return {name: torch.from_numpy(archive[name]) for name in archive.files}
    except BROKEN as error:
        raise ArtifactError(f"{path.name} cannot be read as an archive of arrays: {error}") from error
