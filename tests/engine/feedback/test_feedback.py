"""The closed loop in the engine, against a loop written down from its description, and what its rows keep."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from schedulers import CommitmentProfile
from steerserve.config import EngineConfig
from steerserve.engine.api.events import Done
from steerserve.engine.api.params import FeatureRef, GenerationParams, Intervention, VectorRef
from steerserve.engine.engine import DiffusionEngine
from steerserve.errors import RequestError
from steerserve.models.families.bert import BertDiffusionLM
from steerserve.steering.attribute import AttributeSite, FeatureWeight
from tests import tiny
from tests.engine.loops import rounded

LOOP: dict[str, Any] = {"type": "feedback", "gain": 2.0, "hold": 8.0, "lead": 0.25, "rate": 0.3, "release": 2}
PUSH = Intervention(attribute="topic/sports", strength=4.0, schedule=LOOP)
PLAIN = GenerationParams(
    prompt="the king",
    max_tokens=16,
    steps=8,
    seed=3,
    temperature=0.0,
    order="confidence",
    transfer="linear",
    ignore_eos=True,
)
FED = replace(PLAIN, interventions=(PUSH,))
FEATURES = (FeatureWeight(3, 0.9, 1e-4, 0.7), FeatureWeight(9, 0.4, 1e-4, 0.3), FeatureWeight(5, -0.9, 1e-4, 0.0))
"""Two that steer and one that is only kept."""


@pytest.fixture
def served(tmp_path: Path) -> DiffusionEngine:
    return engine_of(tiny.bert(), tmp_path)


def engine_of(model: Any, folder: Path, **config: Any) -> DiffusionEngine:
    """An engine whose attribute reads two features of one layer, another one features of two."""
    made = tiny.catalogue(model, folder)
    curve = CommitmentProfile(tuple(min(1.0, i / 32) ** 2 for i in range(65))).to_json()
    sites = {
        layer: AttributeSite(5.0 + layer, f"sae-{layer}", f"{layer}" * 64, FEATURES[: 2 + layer % 2])
        for layer in (0, 1, 2)
    }
    attributes = {
        "topic/sports": tiny.attribute(folder / "a", "topic/sports", (1,), sites={1: sites[1]}, profile=curve),
        "both": tiny.attribute(
            folder / "b", "both", (0, 2), sites={0: sites[0], 2: sites[2]}, profile=curve, schedule={"type": "uniform"}
        ),
        "bare": tiny.attribute(folder / "c", "bare", (1,), profile=None, schedule={"type": "uniform"}),
        "flat": tiny.attribute(folder / "d", "flat", (1,), profile=CommitmentProfile((1.0, 1.0)).to_json()),
        "alien": tiny.attribute(folder / "e", "alien", (2,)),
    }
    saes = {}
    for layer in (0, 1, 2):
        sae = tiny.sae(layer, seed=layer, name=f"sae-{layer}")
        sae.facts = replace(sae.facts, sha256=f"{layer}" * 64)
        saes[sae.facts.id] = sae
    catalogue = replace(made, attributes=attributes, saes=saes)
    return DiffusionEngine(model, tiny.tokenizer(), catalogue, EngineConfig(**config))


def read(served: DiffusionEngine, layers: tuple[int, ...], arrived: dict[int, torch.Tensor], start: int) -> float:
    """The mean over the response and over the steering features of all layers, of their ReLU activation."""
    found = []
    for layer in layers:
        sae = served.catalogue.saes[f"sae-{layer}"]
        hidden = arrived[layer][start:].double().numpy()
        for feature in (3, 9):
            row = sae.W_enc[:, feature].double().numpy()
            pre = (hidden - sae.b_dec.double().numpy()) @ row + float(sae.b_enc[feature])
            found.append(np.maximum(pre, 0.0))
    return float(np.mean(found))


def straight_line(
    served: DiffusionEngine, name: str, layers: tuple[int, ...], hold: float
) -> tuple[list[int], list[float], list[float], float | None]:
    """Denoise by hand: response, gains, readings, and the progress at which the loop let go."""
    model = served.model
    assert isinstance(model, BertDiffusionLM)
    prompt = served.admit(PLAIN).prompt_ids
    attribute = served.catalogue.attributes[name]
    canvas, start = [*prompt, *([tiny.MASK] * 16)], len(prompt)
    rise = [min(1.0, i / 32) ** 2 for i in range(65)]
    gains: list[float] = []
    readings: list[float] = []
    streak, let_go = 0, None
    for _ in range(8):
        progress = sum(token != tiny.MASK for token in canvas[start:]) / 16
        ahead = float(np.interp(min(1.0, progress + 0.25), np.linspace(0, 1, 65), rise))
        if readings:
            reading = readings[-1]
            streak = streak + 1 if reading >= hold else 0
        else:
            reading = hold * float(np.interp(progress, np.linspace(0, 1, 65), rise))
        if streak >= 2 and let_go is None:
            let_go = progress
        wanted = min(max(2.0 * (hold * ahead - reading), 0.0), 1.0)
        wanted = min(wanted, gains[-1] + 0.3) if gains else wanted
        gains.append(0.0 if let_go is not None else wanted)
        masked = torch.tensor([token == tiny.MASK for token in canvas])
        arrived: dict[int, torch.Tensor] = {}

        def unsteered(layer: int, hidden: torch.Tensor, kept: dict[int, torch.Tensor] = arrived) -> torch.Tensor:
            kept[layer] = hidden[0]
            return hidden

        def site(
            layer: int, hidden: torch.Tensor, open_: torch.Tensor = masked, gain: float = gains[-1]
        ) -> torch.Tensor:
            if layer not in layers:
                return hidden
            size = 4.0 * attribute.sites[layer].residual_norm * gain
            return hidden + open_[:, None] * size * attribute.directions[layer, "sae"]

        logits = model.head(model(torch.tensor([canvas]), sites=site))[0].double()
        # What is read is the canvas as it is without the push.
        model(torch.tensor([canvas]), sites=unsteered)
        readings.append(read(served, layers, arrived, start))
        logits[:, [*model.facts.forbidden_ids, tiny.EOS]] = -math.inf
        best = logits.softmax(1).max(1)
        places = sorted((p for p in range(start, len(canvas)) if canvas[p] == tiny.MASK), key=lambda p: -best.values[p])
        for place in places[:2]:
            canvas[place] = int(best.indices[place])
    return canvas[start:], gains, readings, let_go


@pytest.mark.parametrize(
    ("name", "layers", "hold"), [("topic/sports", (1,), 8.0), ("topic/sports", (1,), 3.2), ("both", (0, 2), 2.5)]
)
def test_the_engine_does_what_a_straight_loop_does(
    served: DiffusionEngine, name: str, layers: tuple[int, ...], hold: float
) -> None:
    response, gains, readings, let_go = straight_line(served, name, layers, hold)
    push = replace(PUSH, attribute=name, scope="masked", schedule=LOOP | {"hold": hold})
    [(request, result)] = tiny.run(served, replace(PLAIN, interventions=(push,)))
    assert result.receipt is not None
    [told] = result.receipt["interventions"]
    assert told["feedback"]["gains"] == pytest.approx(gains, abs=2e-4)
    assert told["feedback"]["readings"] == pytest.approx(readings, rel=1e-3, abs=1e-4)
    assert told["feedback"]["let_go_at"] == let_go
    assert told["feedback"]["target"] == hold
    assert told["feedback"]["spent"] == {
        "gain": pytest.approx(sum(gains), abs=1e-3),
        "gain_squared": pytest.approx(sum(gain * gain for gain in gains), abs=1e-3),
    }
    assert told["strength_per_step"] == pytest.approx([4.0 * gain for gain in gains], abs=1e-3)
    assert len(set(gains)) > 2 or let_go
    assert request.response == response != tiny.tokens_of(served, PLAIN)


def test_the_plan_says_that_the_run_decides(served: DiffusionEngine) -> None:
    [plan] = served.admit(FED).plan["interventions"]
    assert plan["strength_per_step"] is None
    assert plan["schedule"] == {**LOOP, "peak": 1.0, "norm": None, "gains": None}
    assert plan["rho"] is None
    assert "0 to 4" in plan["notes"][0]


def test_a_fed_row_is_the_same_alone_and_in_any_batch(served: DiffusionEngine) -> None:
    alone = tiny.run(served, FED)[0]
    both = Intervention(attribute="both", strength=2.0, schedule="feedback")
    longer = replace(FED, prompt="the team won the match and then the king lost", max_tokens=32, steps=16, row=2)
    together = tiny.run(served, longer, FED, replace(PLAIN, row=5), replace(PLAIN, row=1, interventions=(both, PUSH)))
    assert together[1][0].response == alone[0].response
    # Where MKL has no strict mode, sums beside other rows differ in their last digits.
    assert together[1][1].receipt == rounded(alone[1].receipt)
    assert together[2][0].response == tiny.tokens_of(served, replace(PLAIN, row=5))
    [(other, result)] = tiny.run(served, longer)
    assert (other.response, result.receipt) == (together[0][0].response, rounded(together[0][1].receipt))


def test_rows_that_come_and_go_leave_a_loop_as_it_was(served: DiffusionEngine) -> None:
    """The batch is rebuilt under it: a row joins, one is aborted, one ends."""
    expected = tiny.run(served, FED)[0]
    first, gone = served.admit(FED), served.admit(replace(FED, row=7))
    served.add([first, gone])
    served.step()
    served.step()
    late = served.admit(replace(PLAIN, steps=2, row=9))
    served.add([late])
    served.step()
    served.abort(gone.id)
    found = tiny.results(tiny.drain(served))
    assert first.response == expected[0].response
    told, same = found[first.id].receipt, expected[1].receipt
    assert told is not None and same is not None
    for name in ("feedback", "strength_per_step"):
        assert told["interventions"][0][name] == same["interventions"][0][name]


def test_a_step_that_does_not_fit_into_memory_is_not_counted(
    served: DiffusionEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = [tiny.run(served, replace(FED, row=row))[0] for row in range(2)]
    requests = [served.admit(replace(FED, row=row)) for row in range(2)]
    served.add(requests)
    served.step()
    served.step()
    forward = served.model.forward
    failures = [True]

    def failing(*args: Any, **kwargs: Any) -> Any:
        if failures:
            failures.pop()
            raise MemoryError
        return forward(*args, **kwargs)

    monkeypatch.setattr(served.model, "forward", failing)
    found = tiny.results(tiny.drain(served))
    for request, (same, result) in zip(requests, expected, strict=True):
        assert request.response == same.response
        told = found[request.id].receipt
        assert told is not None and result.receipt is not None
        assert told["interventions"][0]["feedback"] == result.receipt["interventions"][0]["feedback"]


def test_new_interventions_start_a_new_loop(served: DiffusionEngine) -> None:
    request = served.admit(FED)
    served.add([request])
    for _ in range(3):
        served.step()
    served.steer(request.id, served.admit(FED))
    [done] = [event for event in tiny.drain(served) if isinstance(event, Done)]
    assert done.result.receipt is not None
    before, after = done.result.receipt["interventions"]
    assert (len(before["feedback"]["gains"]), len(after["feedback"]["gains"])) == (3, 5)
    # Without a reading it pushes by the rise ahead: 2 x 8 x (h(5/8) - h(3/8)) is cut off at the peak.
    assert after["feedback"]["gains"][0] == 1.0


def test_it_lets_go_once_the_attribute_has_committed(served: DiffusionEngine) -> None:
    loop = {"type": "feedback", "hold": 0.01, "release": 3, "lead": 1.0}
    [(_, result)] = tiny.run(served, replace(PLAIN, interventions=(replace(PUSH, schedule=loop),)))
    assert result.receipt is not None
    told = result.receipt["interventions"][0]["feedback"]
    assert told["let_go_at"] == 3 * 2 / 16
    assert told["gains"][1:] == [0.0] * 7


def test_guided_rows_are_pushed_in_both_halves(served: DiffusionEngine) -> None:
    guided = replace(FED, cfg_scale=1.0)
    [(request, result)] = tiny.run(served, guided)
    [_, (same, its)] = tiny.run(served, replace(PLAIN, row=4), guided)
    assert request.response == same.response
    assert result.receipt == its.receipt
    assert request.response != tiny.tokens_of(served, replace(PLAIN, cfg_scale=1.0))


def test_no_step_of_a_fed_row_goes_without_a_forward(served: DiffusionEngine) -> None:
    idle = replace(FED, max_tokens=4, steps=8, transfer={"type": "ddpm"}, order="random")
    [(request, result)] = tiny.run(served, idle)
    assert result.forward_passes == result.steps == request.step


@pytest.mark.parametrize(
    ("change", "param", "said"),
    [
        ({"strength": -1.0}, "interventions[0].strength", "must be above 0, got -1"),
        ({"strength": 0.0}, "interventions[0].strength", "must be above 0, got 0"),
        ({"op": "clamp", "unit": "raw"}, "interventions[0].op", "is for op 'add', got 'clamp'"),
        ({"attribute": "bare"}, "interventions[0].schedule", "needs a commitment profile"),
        ({"attribute": "flat"}, "interventions[0].schedule", "ends above its start"),
        ({"attribute": "alien"}, "interventions[0].schedule", "needs the SAE 'layer-2-mask'"),
        ({"schedule": {"type": "feedback", "norm": "kl"}}, "interventions[0].schedule", "no option 'norm'"),
        (
            {"attribute": None, "feature": FeatureRef("sae-1", 3), "unit": "raw"},
            "interventions[0].schedule",
            "needs a commitment profile",
        ),
        (
            {"attribute": None, "vector": VectorRef(1, (1.0,) * tiny.HIDDEN), "unit": "raw"},
            "interventions[0].schedule",
            "needs a commitment profile",
        ),
    ],
)
def test_what_a_loop_cannot_do_is_refused(
    served: DiffusionEngine, change: dict[str, Any], param: str, said: str
) -> None:
    with pytest.raises(RequestError, match=said) as error:
        served.admit(replace(PLAIN, interventions=(replace(PUSH, **change),)))
    assert error.value.param == param
