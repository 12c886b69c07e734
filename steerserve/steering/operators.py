"""The operators: how a push changes the hidden state along its unit direction v, all as one coefficient on v.

Every operator is `h + coefficient(h) v`, with strength s and gain g of the moment (g = 1 is the full push):

    add          g s
    boost        g s max_j a_j(h) |d_f|                DLM-Scope's released form (arXiv 2602.05859)
    multiply     g (s - 1) x c
    clamp        g (s - x) c
    project_out  -g s <h, v>                           arXiv 2512.24143 at s = 1
    cap          g (s - x) c where x > s, else 0
    read         0: the state is read and nothing is changed

so that a site applies any mix of them in one contraction. All pushes at a site read the state as it arrived.

x is the value that an operator sets. Of a direction it is the projection <h, v>, and c is 1. Of a feature it is the
latent, read as `SparseAutoencoder.latent` says, and c is the hidden units that change it by 1: |d_f| / (w_f . d_f),
with d_f the decoder row as it is and w_f the encoder's column. After the push the encoder then reads s. Whatever else
is in the state stays, the SAE's error included.
"""

from typing import Final

import torch
from torch import Tensor

from steerserve.steering.names import OPERATORS

CODES: Final = {op: code for code, op in enumerate((*OPERATORS, "read"))}
PURE_NUMBERS: Final = frozenset({"boost", "multiply", "project_out"})
"""Operators whose strength is a factor and has no unit."""
SETS_VALUE: Final = frozenset({"clamp", "project_out", "cap"})
"""Operators that go towards a value; their gain is the share of the way, at most 1."""
NEEDS_SAE: Final = frozenset({"boost", "multiply"})
SETS_LATENT: Final = frozenset({"clamp", "cap"})
"""Operators that set a projection, and of a feature its latent; their strength is in the same units."""
READS_LATENT: Final = NEEDS_SAE | SETS_LATENT
"""Operators that, of a feature, read the state by its SAE."""
READS_PAIR: Final = frozenset({"boost"})
"""Operators that read each token by the SAE of its state, where the feature's SAE is one of a pair."""


def coefficients(code: Tensor, strength: Tensor, gain: Tensor, value: Tensor, scale: Tensor | None = None) -> Tensor:
    """Coefficient on v of every push at every position: [rows, pushes, length].

    code, strength, gain [rows, pushes]. value [rows, pushes, length]: what the operator reads, <h, v> of a direction;
    of a feature the latent, and for `boost` the largest activation. scale [rows, pushes]: hidden units of 1 of that;
    None: 1 everywhere.
    """
    op, s = code[:, :, None], strength[:, :, None]
    zero = torch.zeros_like(value)
    out = torch.where(op == CODES["add"], s, zero)
    out = torch.where(op == CODES["clamp"], s - value, out)
    out = torch.where(op == CODES["project_out"], -s * value, out)
    out = torch.where((op == CODES["cap"]) & (value > s), s - value, out)
    out = torch.where(op == CODES["boost"], s * value, out)
    out = torch.where(op == CODES["multiply"], (s - 1.0) * value, out)
    if scale is not None:
        out = scale[:, :, None] * out
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
