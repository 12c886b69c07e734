"""An engine whose attributes have calibrated costs, and a joint profile of two of them."""

from pathlib import Path
from typing import Any

import torch

from schedulers import CommitmentProfile, JointProfile
from steerserve.config import EngineConfig
from steerserve.engine.admission.catalogue import Catalogue
from steerserve.engine.engine import TorchEngine
from steerserve.models import DiffusionLM
from tests import tiny

K = 64
COSTS = {
    "topic/sports": tuple(0.04 * (1.5 - k / K) / K for k in range(K)),
    "register/archaic": tuple(0.02 * (0.5 + k / K) / K for k in range(K)),
    "tone/warm": tuple(0.03 / K for _ in range(K)),
}
"""c of each attribute, for strength 1 in its own unit, nats a token."""
SLOPES = {"topic/sports": 1.0, "register/archaic": -1.0}


def sensitivity(name: str) -> tuple[float, ...]:
    return tuple(1.0 + SLOPES.get(name, 0.0) * (0.5 - (k + 0.5) / K) for k in range(K))


def profile(name: str, cost: tuple[float, ...] | None = None) -> dict[str, Any]:
    curve = tuple(min(1.0, i / 32) ** 2 for i in range(K + 1))
    return CommitmentProfile(curve, samples=8, sensitivity=sensitivity(name), cost=cost or COSTS[name]).to_json()


def joint() -> JointProfile:
    """Of the first two attributes, whose pushes share a quarter of their directions."""
    names = ("topic/sports", "register/archaic")
    a, b = (torch.tensor(COSTS[name], dtype=torch.float64) for name in names)
    cross = 0.25 * (a * b).sqrt()
    matrices = torch.stack([torch.stack([a, cross], 1), torch.stack([cross, b], 1)], 1)
    return JointProfile(
        names,
        tuple(sensitivity(name) for name in names),
        tuple(tuple(tuple(row) for row in matrix) for matrix in matrices.tolist()),
    )


def engine(model: DiffusionLM, folder: Path, *, together: bool = True, **costs: tuple[float, ...]) -> TorchEngine:
    """`costs` by the last part of an attribute's name; `plain` is an attribute without a cost."""
    attributes = [
        tiny.attribute(
            folder / name.replace("/", "-"),
            name,
            layers,
            seed=seed,
            profile=profile(name, costs.get(name.rpartition("/")[2])),
            schedule={"type": "uniform"},
        )
        for name, layers, seed in (
            ("topic/sports", (1,), 1),
            ("register/archaic", (0, 2), 2),
            ("tone/warm", (2,), 3),
        )
    ]
    attributes.append(tiny.attribute(folder / "plain", "plain", (1,), seed=4))
    norms = {layer: site.residual_norm for one in attributes for layer, site in one.sites.items()}
    saes = [tiny.sae(0, seed=0), tiny.sae(1, seed=1), tiny.sae(2, seed=2)]
    catalogue = Catalogue(
        model.facts,
        {one.name: one for one in attributes},
        {one.facts.id: one for one in saes},
        norms,
        vectors={"warm": tiny.vector()},
        joint=joint() if together else None,
    )
    return TorchEngine(model, tiny.tokenizer(), catalogue, EngineConfig())
