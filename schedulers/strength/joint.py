"""Several attributes at once: how the cost is best shared out between their pushes, over progress.

To first order the pushes alpha_t [A] move the attributes by S = sum_t (w * s_t) . alpha_t, weighted with w, and cost
the trajectory KL sum_t alpha_t^T C_t alpha_t / 2, C_t being the Fisher inner products of the pushes. Of all alpha of
one cost, alpha_t proportional to C_t^-1 (w * s_t) moves them furthest. Source: ours; for one attribute it is the
schedule of arXiv 2605.10971, theorem 1.

A weight has the sign of its strength, and says what a unit of that attribute's log-odds is worth beside the others'.
Where none is given, `joint_weights` are those under which the strengths asked for are the best uniform mix: then
scheduling moves cost over progress, and rho is the gain over the very pushes that were asked for.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from schedulers.choice import integer, number
from schedulers.joint_profile import JointProfile, check_cost

MOST = 8
"""Attributes that can be pushed together: the exact solution tries each of their 2^A sets."""


@dataclass(frozen=True, eq=False)
class JointTable:
    """The compiled schedules of A attributes: the strength of each at progress p is its own times its gain there."""

    gains: Tensor
    """[A, K] float32, >= 0."""
    weights: tuple[float, ...]
    """[A] in force."""
    rho: float
    """`joint_rho` with gains of either sign, as in the closed form."""
    rho_attained: float
    """`joint_rho` with gains of 0 or more, as in `gains`."""
    note: str | None
    """What the receipt must say; None where the gains are those of the closed form."""


def compile_joint(
    profile: JointProfile, strengths: Sequence[float], weights: Sequence[float] | None = None, slices: int = 64
) -> JointTable:
    """The joint schedules on K = `slices` equal slices of progress, of the predicted KL of the uniform pushes.

    strengths [A], none of them 0, in the profile's units; weights [A] of the same signs, None for `joint_weights`.
    Raises ValueError where they do not fit the profile, or where no weights make the strengths the best uniform mix.
    """
    integer("slices", slices, 1, 65536)
    asked = _vector("strengths", strengths, profile.names)
    sensitivity, cost = profile.sensitivity_on(slices), profile.cost_on(slices)
    worth = joint_weights(sensitivity, cost, asked) if weights is None else _vector("weights", weights, profile.names)
    if weights is None and not bool(((worth * asked > 0) & worth.isfinite()).all()):
        at = int(((worth * asked <= 0) | ~worth.isfinite()).nonzero()[0])
        raise ValueError(
            f"no weights make these strengths the best uniform mix, which would not push '{profile.names[at]}' that "
            f"way: give weights"
        )
    gains = joint_gains(sensitivity, cost, worth, asked).float()
    if not bool(gains.isfinite().all()):
        raise ValueError("the joint gains are too large for a float32: strengths or costs are too far apart")
    rho, attained = (joint_rho(sensitivity, cost, worth, nonnegative=only) for only in (False, True))
    unlimited = _free((worth[:, None] * sensitivity).T, cost).T * asked[:, None]
    counts = dict(zip(profile.names, (unlimited < 0).sum(1).tolist(), strict=True))
    note = None
    if any(counts.values()):
        limited = ", ".join(f"'{name}' in {count}" for name, count in counts.items() if count)
        note = f"gains are 0 or more; without that limit some would be negative: {limited} of {slices} slices"
    return JointTable(gains, tuple(worth.tolist()), rho, attained, note)


def joint_gains(sensitivity: Tensor, cost: Tensor, weights: Tensor, strengths: Tensor | None = None) -> Tensor:
    """The best gains of 0 or more [A, K] float64: strengths * gains costs what the uniform strengths do.

    sensitivity [A, K], cost [K, A, A], weights [A], strengths [A] of the weights' signs, None for the weights
    themselves. In each slice the gains are those of the closed form where these are all 0 or more; else they are the
    exact solution with that limit, of which every attribute left at 0 may change the others' gains. Raises ValueError
    where no such push moves the attributes forward, and for a cost that is none.
    """
    pull, metric, signs = _oriented(sensitivity, cost, weights)
    asked = weights.double() if strengths is None else strengths.double()
    if asked.shape != weights.shape or not bool((asked * signs > 0).all()):
        raise ValueError(f"strengths must have the signs of the weights {weights.tolist()}, not {asked.tolist()}")
    best = _best(pull, metric)
    moved = (best * pull).sum()
    if moved <= 0:
        raise ValueError("no push of the signs asked for moves the attributes forward in any slice")
    # At the best pushes S is the cost: the slope of the objective vanishes along them.
    budget = asked @ cost.double().sum(0) @ asked
    gains: Tensor = best * (budget / moved).sqrt() / asked.abs()
    return gains.T


def joint_rho(sensitivity: Tensor, cost: Tensor, weights: Tensor, *, nonnegative: bool = False) -> float:
    """Predicted gain of the best schedules over the best uniform mix of the same KL on the weighted attributes; >= 1.

    rho^2 = sum_t s_t^T C_t^-1 s_t / ((sum s)^T (sum C)^-1 (sum s)) with w * s for s: never below 1, s^T C^-1 s being
    jointly convex and homogeneous, and 1 exactly where C_t^-1 (w * s_t) is the same in every slice. `nonnegative`:
    both the schedules and the mix with pushes of the weights' signs only. sensitivity [A, K], cost [K, A, A],
    weights [A]. Raises ValueError where no uniform push moves the attributes.
    """
    pull, metric, _ = _oriented(sensitivity, cost, weights)
    solve = _best if nonnegative else _free
    total = pull.sum(0, keepdim=True)
    uniform = float((solve(total, metric.sum(0, keepdim=True)) * total).sum())
    if uniform <= 0:
        raise ValueError("no uniform push of the attributes moves them forward: there is nothing to compare with")
    return math.sqrt(max(1.0, float((solve(pull, metric) * pull).sum()) / uniform))


def joint_weights(sensitivity: Tensor, cost: Tensor, strengths: Tensor) -> Tensor:
    """The weights [A] float64 under which uniform pushes of these strengths [A] are the best uniform mix.

    w * sum s = (sum C) strengths, the condition of the best mix, solved for w: not finite where a sensitivity [A, K]
    sums to 0, and of the other sign than its strength where the mix moves an attribute against it. cost [K, A, A].
    """
    weights: Tensor = (cost.double().sum(0) @ strengths.double()) / sensitivity.double().sum(1)
    return weights


def _free(pull: Tensor, metric: Tensor) -> Tensor:
    """The pushes of either sign [K, A] that maximise pull . a - a^T metric a / 2 in each slice."""
    pushes: Tensor = torch.linalg.solve(metric, pull)
    return pushes


def _best(pull: Tensor, metric: Tensor) -> Tensor:
    """The pushes a >= 0 [K, A] that maximise pull . a - a^T metric a / 2 in each slice; pull [K, A], metric [K, A, A].

    Exact: the solution is the free one of the set of attributes it pushes, and of all sets whose free solution is
    allowed it is the best, since each of these is feasible. Scaled to a cost it is the best of that cost.
    """
    attributes = pull.shape[1]
    best, moved = torch.zeros_like(pull), torch.zeros_like(pull[:, 0])
    for members in range(1, 2**attributes):
        at = [a for a in range(attributes) if members >> a & 1]
        push = _free(pull[:, at], metric[:, at][:, :, at])
        gain = (push * pull[:, at]).sum(1)
        better = (push >= 0).all(1) & (gain > moved)
        moved = torch.where(better, gain, moved)
        whole = torch.zeros_like(pull)
        whole[:, at] = push
        best = torch.where(better[:, None], whole, best)
    return best


def _oriented(sensitivity: Tensor, cost: Tensor, weights: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """|w| s [K, A] and C [K, A, A], each attribute turned so that a push wanted of it is positive; signs [A]."""
    attributes, slices = sensitivity.shape
    if not 1 <= attributes <= MOST:
        raise ValueError(f"1 to {MOST} attributes can be pushed together, not {attributes}")
    if cost.shape != (slices, attributes, attributes) or weights.shape != (attributes,):
        raise ValueError(
            f"for sensitivity [{attributes}, {slices}] cost must be [{slices}, {attributes}, {attributes}] and weights "
            f"[{attributes}], not {list(cost.shape)} and {list(weights.shape)}"
        )
    check_cost(cost.double())
    signs = weights.double().sign()
    if not bool((weights.isfinite() & (weights != 0)).all()):
        raise ValueError(f"weights must be finite and not 0, not {weights.tolist()}")
    pull = (weights.double().abs()[:, None] * sensitivity.double()).T
    return pull, cost.double() * signs[:, None] * signs, signs


def _vector(name: str, values: Sequence[float], names: Sequence[str]) -> Tensor:
    if len(values) != len(names):
        raise ValueError(f"{name} must have a value for each of {', '.join(names)}, not {len(values)}")
    read = [number(f"{name}[{at}]", value) for at, value in enumerate(values)]
    if 0.0 in read:
        raise ValueError(f"{name}[{read.index(0.0)}] must not be 0: leave '{names[read.index(0.0)]}' out")
    return torch.tensor(read, dtype=torch.float64)
