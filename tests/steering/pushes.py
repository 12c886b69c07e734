"""Pushes, states and scopes that the tests of sites and plans share."""

from typing import Any

import torch
from torch import Tensor

from steerserve.saes import SparseAutoencoder
from steerserve.steering.operators import NEEDS_SAE
from steerserve.steering.push import SCOPES, Push
from tests import tiny

LENGTH = 16
SAE = tiny.sae(1)


def push(op: str = "add", strength: float = 1.5, seed: int = 0, **changes: Any) -> Push:
    """A push at layer 1 over everything, always on; `multiply` and `boost` take a feature of the tiny SAE, by seed."""
    direction = tiny.unit(torch.randn(tiny.HIDDEN, generator=torch.Generator().manual_seed(seed)))
    fields: dict[str, Any] = {"layer": 1, "direction": direction, "gains": torch.ones(4)} | changes
    if op in NEEDS_SAE:
        fields = {"sae": SAE, "feature": seed + 1} | fields
    return Push(op=op, strength=strength, **fields)


def of_feature(op: str, strength: float, feature: int, sae: SparseAutoencoder = SAE, **changes: Any) -> Push:
    """The push of a feature as an engine makes it: along its decoder row."""
    fields: dict[str, Any] = {"direction": sae.direction(feature), "sae": sae, "feature": feature} | changes
    return push(op, strength, **fields)


def hidden(rows: int, seed: int = 0) -> Tensor:
    return torch.randn(rows, LENGTH, tiny.HIDDEN, generator=torch.Generator().manual_seed(seed))


def scopes(rows: int) -> Tensor:
    """Row r: 12 + r % 3 real positions, a prompt of 3 + r % 2, every third of the response masked."""
    out = torch.zeros(rows, 5, LENGTH, dtype=torch.bool)
    for r in range(rows):
        for position in range(12 + r % 3):
            response = position >= 3 + r % 2
            masked = response and (position + r) % 3 == 0
            out[r, :, position] = torch.tensor([True, not response, response, masked, response and not masked])
    return out


def gain_at(one: Push, progress: float) -> float:
    return float(one.gains[min(len(one.gains) - 1, int(progress * len(one.gains)))])


def touched(one: Push, r: int, position: int, scope: Tensor) -> bool:
    if isinstance(one.scope, tuple):
        return bool(scope[r, 0, position]) and one.scope[0] <= position < one.scope[1]
    return bool(scope[r, SCOPES[one.scope], position])
