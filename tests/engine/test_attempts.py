"""Forwards that do not fit into memory leave nothing behind: neither in the batch nor in the receipt."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from steerserve.engine.api.params import GenerationParams, Intervention
from steerserve.engine.engine import DiffusionEngine
from steerserve.models import DiffusionLM
from steerserve.models.families.llada import LladaDiffusionLM
from tests import tiny
from tests.engine import priced

SPORTS = Intervention(attribute="topic/sports", strength=0.8)
ARCHAIC = Intervention(attribute="register/archaic", strength=0.5)
PLAIN = GenerationParams(
    prompt=(9, 8, 7, 60),
    max_tokens=24,
    block_length=8,
    steps=6,
    order="confidence",
    transfer="linear",
    temperature=0.0,
    ignore_eos=True,
    interventions=(SPORTS,),
)
LONG = replace(PLAIN, max_tokens=48, steps=6)


def failing(monkeypatch: pytest.MonkeyPatch, method: str, *calls: int) -> None:
    """Calls of a method of the model, by their numbers from 1, that do not fit."""
    plain, made = getattr(LladaDiffusionLM, method), []

    def small(self: DiffusionLM, *given: Any) -> torch.Tensor:
        made.append(1)
        if len(made) in calls:
            raise torch.OutOfMemoryError("out of memory")
        found: torch.Tensor = plain(self, *given)
        return found

    monkeypatch.setattr(LladaDiffusionLM, method, small)


@pytest.fixture
def served(tmp_path: Path) -> DiffusionEngine:
    return priced.engine(tiny.llada(1), tmp_path)


@pytest.mark.parametrize(
    ("cache", "method"),
    [(None, "forward"), (None, "head"), ("prefix", "resume"), ("prefix", "head"), ("dual", "resume"), ("dual", "head")],
)
@pytest.mark.parametrize("call", [1, 4])
def test_receipts_are_those_of_rows_that_fit(
    served: DiffusionEngine, monkeypatch: pytest.MonkeyPatch, cache: str | None, method: str, call: int
) -> None:
    asked = [replace(PLAIN, cache=cache), replace(LONG, cache=cache)]
    alone = [(request.response, result.receipt) for one in asked for request, result in tiny.run(served, one)]
    failing(monkeypatch, method, call)
    for (request, result), (response, receipt) in zip(tiny.run(served, *asked), alone, strict=True):
        assert result.receipt is not None and receipt is not None
        assert request.response == response
        assert result.receipt["predicted_kl"] == receipt["predicted_kl"]
        [told], [expected] = result.receipt["interventions"], receipt["interventions"]
        assert told["strength_per_step"] == expected["strength_per_step"]
        assert len(told["strength_per_step"]) == result.forward_passes
        for site, same in zip(told["sites"], expected["sites"], strict=True):
            assert site == same | {name: pytest.approx(same[name]) for name in ("delta_ratio_mean", "delta_ratio_max")}


@pytest.mark.parametrize("method", ["forward", "head"])
def test_steering_may_change_behind_a_forward_that_did_not_fit(
    served: DiffusionEngine, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    rows = [served.admit(replace(PLAIN, seed=seed)) for seed in range(2)]
    served.add(rows)
    with monkeypatch.context() as patch:
        failing(patch, method, 3)
        events = [event for _ in range(3) for event in served.step()]
    for row in rows:
        assert served.steer(row.id, served.admit(replace(row.params, interventions=(ARCHAIC,)))) == 2
    found = tiny.results(events + tiny.drain(served))
    for row in rows:
        receipt = found[row.id].receipt
        assert receipt is not None
        assert [len(one["strength_per_step"]) for one in receipt["interventions"]] == [
            found[row.id].forward_passes - 4,
            4,
        ]
        assert receipt["predicted_kl"] > 0
