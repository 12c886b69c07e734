"""What a checkpoint's tensors must be, and what of them does not fit."""

from collections.abc import Mapping

import torch
from torch import Tensor

from steerserve.errors import ArtifactError

SHOWN = 8
"""How many names of a kind of fault are shown."""


def check_layout(what: str, wanted: Mapping[str, torch.Size], found: Mapping[str, Tensor]) -> None:
    """Raise ArtifactError naming every tensor that is missing, unexpected, misshapen or no floating-point number.

    what names the checkpoint in the message; wanted are the shapes by the names that found uses.
    """
    shared = sorted(wanted.keys() & found.keys())
    faults: dict[str, list[str]] = {
        "missing tensors": sorted(wanted.keys() - found.keys()),
        "unexpected tensors": sorted(found.keys() - wanted.keys()),
        "misshapen tensors": [
            f"{name} is {list(found[name].shape)}, expected {list(wanted[name])}"
            for name in shared
            if found[name].shape != wanted[name]
        ],
        "tensors that are no floating-point numbers": [
            f"{name} is {found[name].dtype}" for name in shared if not found[name].is_floating_point()
        ],
    }
    lines = [
        f"{title}: {', '.join(names[:SHOWN])}{f' and {len(names) - SHOWN} more' if len(names) > SHOWN else ''}"
        for title, names in faults.items()
        if names
    ]
    if lines:
        raise ArtifactError(f"{what} does not fit its config.json; " + "; ".join(lines))


def leave_out_copies(tensors: Mapping[str, Tensor], copies: Mapping[str, str]) -> dict[str, Tensor]:
    """The tensors without those that only repeat another one, such as a tied head that was written out as well.

    copies: the name of a tensor that may be a copy, with the name of its original. A copy that differs from its
    original is an ArtifactError: the config ties what the file does not.
    """
    left = dict(tensors)
    for name, original in copies.items():
        if name in left and original in left:
            copy, source = left.pop(name), left[original]
            if copy.shape != source.shape or not torch.equal(copy.to(source.dtype), source):
                raise ArtifactError(f"unexpected tensors: {name} differs from {original}, to which config.json ties it")
    return left
