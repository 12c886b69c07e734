"""Cost of pushing attributes over progress: trajectory KL in nats per response token, to second order.

By the chain rule the KL of a steered run from the unsteered one is the sum, over the tokens it commits, of the KL of
the prediction each was drawn from. A token that commits at progress p under pushes of strengths a [A] costs
a^T C(p) a / 2, C(p) being the mean Fisher inner product of the pushes at the masked positions of canvases that
unsteered runs are at when their progress is p (a token is as likely to commit from any of them where the order is
random; for other orders this is an approximation). With K equal slices each slice commits 1 / K of the tokens, so

    C_k = mean over the canvases of slice k / K

and uniform pushes cost sum_k a^T C_k a / 2 nats a token, whatever the number of steps. Source: the additive
decomposition of arXiv 2605.10971, appendix A.1; the matrices are ours.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from schedulers import JointProfile
from steerserve.calibrate.profile.canvases import Canvases
from steerserve.calibrate.profile.fisher import PushedPredictions

CHECK_EVERY = 2
"""The exact KL is taken on one canvas of every so many slices."""
CHECK_KL = 1e-3
"""Mean KL in nats a position of the smaller of the pushes that it is taken for: far above rounding, still quadratic."""
RIDGE = 1e-6
"""Smallest eigenvalue of a slice's cost, scaled to a diagonal of ones: what is added to that diagonal where it is
less, as where two attributes push the same way."""
FLOOR = 1e-12
"""Smallest cost of a slice, as where a push changes nothing."""


@dataclass(frozen=True, eq=False)
class Cost:
    """Costs of A attributes on K slices."""

    matrices: Tensor
    """[K, A, A] float64."""
    errors: Tensor
    """[K, A] standard errors of the diagonals, over canvases."""
    ridge: float
    """What was added to the scaled diagonals."""

    def of(self, a: int) -> Tensor:
        """Cost c [K] of the attribute with index a."""
        return self.matrices[:, a, a]


def canvas_means(predictions: PushedPredictions) -> list[list[list[float]]]:
    """The mean Fisher inner products of each canvas [N][A][A]: what is kept of a slice."""
    fisher, row = predictions.fisher(), predictions.canvases.row
    found: list[list[list[float]]] = [fisher[row == i].mean(0).tolist() for i in sorted(set(row.tolist()))]
    return found


def assemble(measured: Mapping[int, Sequence[Sequence[Sequence[float]]]], slices: int) -> Cost:
    """The costs from the canvas means [N][A][A] of each slice that was reached; the others lie between their
    neighbours.

    Slice k is the mean of the slices within min(k / 4, 4, K - 1 - k) of it: the start, where costs change fastest, is
    left as measured.
    """
    known = sorted(measured)
    found = {k: torch.tensor(measured[k], dtype=torch.float64) for k in known}
    means = torch.stack([found[k].mean(0) for k in known])
    spread = [
        found[k].diagonal(dim1=1, dim2=2).var(0) / len(found[k]) if len(found[k]) > 1 else torch.zeros(means.shape[1])
        for k in known
    ]
    weights = _between(known, slices)
    smooth = _smoothing(slices) @ weights / slices
    matrices = torch.einsum("kn,nab->kab", smooth, means)
    errors = (smooth.square() @ torch.stack(spread).double()).sqrt()
    matrices = (matrices + matrices.mT) / 2
    diagonal = matrices.diagonal(dim1=1, dim2=2)
    diagonal.clamp_(min=FLOOR)
    scale = diagonal.sqrt()
    scaled = matrices / scale[:, :, None] / scale[:, None, :]
    ridge = max(0.0, RIDGE - float(torch.linalg.eigvalsh(scaled).min()))
    return Cost(matrices + ridge * torch.diag_embed(diagonal), errors, ridge)


def _between(known: Sequence[int], slices: int) -> Tensor:
    """Weights [slices, known] by which each slice lies linearly between those known."""
    weights = torch.zeros(slices, len(known), dtype=torch.float64)
    for k in range(slices):
        above = next((i for i, one in enumerate(known) if one >= k), len(known) - 1)
        below = above if known[above] <= k or above == 0 else above - 1
        share = 0.0 if above == below else (k - known[below]) / (known[above] - known[below])
        weights[k, below] += 1 - share
        weights[k, above] += share
    return weights


def _smoothing(slices: int) -> Tensor:
    weights = torch.zeros(slices, slices, dtype=torch.float64)
    for k in range(slices):
        width = min(k // 4, 4, slices - 1 - k)
        weights[k, k - width : k + width + 1] = 1 / (2 * width + 1)
    return weights


def check(
    predict: Callable[[Canvases], PushedPredictions], canvases: Mapping[int, Canvases], total: float, strength: float
) -> dict[str, Any]:
    """The exact KL of pushes of one attribute, whose predictions are given, against the quadratic form, on a few
    canvases of all slices.

    total: its sum of c, that the small push is chosen by. `exact_over_fisher` is KL(x) / (x^2 c / 2) for a small push
    x, the mean of both signs; `doubling` is KL(2 x) / 4 KL(x), 1 as far as it is quadratic; `at_strength` is that of
    the attribute's own strength.
    """
    small = math.sqrt(2 * CHECK_KL / total)
    sizes = (small, -small, 2 * small, -2 * small, strength)
    exact, form = torch.zeros(len(sizes), dtype=torch.float64), 0.0
    chosen = [canvases[k].first() for k in sorted(canvases)[::CHECK_EVERY]]
    for one in chosen:
        predictions = predict(one)
        exact += predictions.kl([torch.tensor([size]) for size in sizes]).mean(1) / len(chosen)
        form += float(predictions.fisher().mean()) / len(chosen)
    pushed, doubled = float(exact[:2].mean()), float(exact[2:4].mean())
    return {
        "push": round(small, 6),
        "kl": float(f"{pushed:.4g}"),
        "exact_over_fisher": round(pushed / (small**2 * form / 2), 4),
        "doubling": round(doubled / (4 * pushed), 4),
        "at_strength": round(float(exact[4]) / (strength**2 * form / 2), 4),
        "canvases": len(chosen),
    }


def joint(names: Sequence[str], sensitivities: Sequence[Sequence[float]], cost: Cost) -> JointProfile:
    """The joint profile of attributes, each with its sensitivity [K], of the same costs as their own profiles."""
    matrices = tuple(tuple(tuple(row) for row in matrix) for matrix in cost.matrices.tolist())
    return JointProfile(tuple(names), tuple(tuple(row) for row in sensitivities), matrices)
