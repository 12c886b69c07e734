"""The text engine with the whole plan of the engine's contract, and a file of keys for it."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from steerserve.engine.api.params import GenerationParams, Intervention
from steerserve.steering.names import NEUTRAL
from tests.server.text_engine import TextEngine, TextRequest

GAINS = {"uniform": [1.0] * 4, "window": [4.0, 0.0, 0.0, 0.0], "feedback": [1.0] * 4}
DEFAULT_STRENGTH = 0.3
SECRET = "sk-steer-0123456789abcdef0123456789abcdef"


class PlannedEngine(TextEngine):
    """`cosines` by pairs of names, 0 for others and 1 for a name with itself; None: the engine tells no overlaps."""

    def __init__(self, cosines: Mapping[frozenset[str], float] | None = None, **bounds: int) -> None:
        super().__init__(**bounds)
        self.cosines = cosines
        self.added: list[TextRequest] = []

    def admit(self, params: GenerationParams) -> TextRequest:
        request = super().admit(params)
        names = [source(one) for one in params.interventions]
        request.plan["interventions"] = [
            planned(name, one) for name, one in zip(names, params.interventions, strict=True)
        ]
        if self.cosines is not None:
            known = self.cosines
            request.plan["overlaps"] = [
                [1.0 if a == b else known.get(frozenset((a, b)), 0.0) for b in names] for a in names
            ]
        return request

    def add(self, requests: list[TextRequest]) -> None:
        super().add(requests)
        self.added += requests


def source(one: Intervention) -> str:
    return one.attribute or ("feature" if one.feature is not None else "vector")


def planned(name: str, one: Intervention) -> dict[str, Any]:
    schedule = one.schedule if isinstance(one.schedule, Mapping) else {"type": one.schedule or "uniform"}
    strength = DEFAULT_STRENGTH if one.strength is None else one.strength
    factor = one.op in ("boost", "multiply", "project_out")
    unit = "factor" if factor else one.unit or "residual"
    most, nothing = max(GAINS[schedule["type"]]), NEUTRAL.get(one.op)
    return {
        "name": name,
        "operator": one.op,
        "strength": strength,
        "unit": unit,
        "neutral": strength == nothing,
        "peak": None
        if schedule["type"] == "feedback"
        else abs(strength - (nothing or 0.0)) * (most**2 if unit == "kl" else most),
        "scope": one.scope or "masked",
        "schedule": {**schedule, "gains": GAINS[schedule["type"]]},
        "sites": [{"layer": layer, "strength_hidden": 10 * strength} for layer in one.layers or (1,)],
    }


def entry(name: str = "team", secret: str = SECRET, **fields: Any) -> dict[str, Any]:
    return {"name": name, "sha256": hashlib.sha256(secret.encode()).hexdigest(), **fields}


def keys_file(folder: Path, *entries: dict[str, Any]) -> Path:
    path = folder / "keys.json"
    path.write_text(json.dumps({"keys": list(entries)}))
    return path
