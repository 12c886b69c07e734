"""The operators: what a push does to the hidden state along its unit direction v, all as one coefficient on v.

Every operator is `h + coefficient(h) v`, with strength s and gain g of the moment (g = 1 is the full push):

    add          g s
    boost        g s max_j a_j(h)                      DLM-Scope's released form (arXiv 2602.05859)
    multiply     g (s - 1) a_f(h)
    clamp        g (s - <h, v>)
    project_out  -g s <h, v>                           arXiv 2512.24143 at s = 1
    cap          g (s - <h, v>) where <h, v> > s, else 0
    read         0: the projection is recorded and nothing is changed

so that a site applies any mix of them in one contraction. All pushes at a site read the state as it arrived.
"""

from typing import Final

import torch
from torch import Tensor

CODES: Final = {"add": 0, "boost": 1, "multiply": 2, "clamp": 3, "project_out": 4, "cap": 5, "read": 6}
PURE_NUMBERS: Final = frozenset({"boost", "multiply", "project_out"})
"""Operators whose strength is a factor and has no unit."""
SETS_PROJECTION: Final = frozenset({"clamp", "project_out", "cap"})
"""Operators that go towards a projection; their gain is the share of the way, at most 1."""
NEUTRAL: Final = {"multiply": 1.0}
"""Strength that changes nothing, where it is not 0. A clamp or cap at 0 is a push; its neutral value is gain 0."""
NEEDS_SAE: Final = frozenset({"boost", "multiply"})
READS_PAIR: Final = frozenset({"boost"})
"""Operators that read each token by the SAE of its state, where the feature's SAE is one of a pair."""


def coefficients(
    code: Tensor, strength: Tensor, gain: Tensor, projection: Tensor, largest: Tensor | None, activation: Tensor | None
) -> Tensor:
    """Coefficient on v of every push at every position: [rows, pushes, length].

    code, strength, gain [rows, pushes]; projection = <h, v>, activation = a_f(h) [rows, pushes, length];
    largest = max_j a_j(h) [rows, pushes, length]; the last two may be None where no operator needs them.
    """
    op, s = code[:, :, None], strength[:, :, None]
    zero = torch.zeros_like(projection)
    out = torch.where(op == CODES["add"], s, zero)
    out = torch.where(op == CODES["clamp"], s - projection, out)
    out = torch.where(op == CODES["project_out"], -s * projection, out)
    out = torch.where((op == CODES["cap"]) & (projection > s), s - projection, out)
    if largest is not None:
        out = torch.where(op == CODES["boost"], s * largest, out)
    if activation is not None:
        out = torch.where(op == CODES["multiply"], (s - 1.0) * activation, out)
    return gain[:, :, None] * out


def combined(weight: Tensor, directions: Tensor) -> Tensor:
    """The sum of directions [rows, pushes, hidden_size], each times its weight [rows, pushes, length]: [rows, length,
    hidden_size].

    One push after the other, not contracted: a matrix product's last bits depend on how many rows and pushes stand
    beside, and a row must be steered alike in any batch.
    """
    delta = weight[:, 0, :, None] * directions[:, 0, None]
    for p in range(1, weight.shape[1]):
        delta += weight[:, p, :, None] * directions[:, p, None]
    return delta
