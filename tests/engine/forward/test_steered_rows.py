"""Steering through the engine: what it changes, what it leaves, what its receipt and traces say."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from steerserve.engine.api.events import Done, Event, Trace
from steerserve.engine.api.params import FeatureRef, GenerationParams, Intervention, TraceParams, VectorRef
from steerserve.engine.engine import DiffusionEngine
from steerserve.engine.request.request import Request
from steerserve.models.families.bert import BertDiffusionLM
from tests import tiny

PLAIN = GenerationParams(prompt="the king", max_tokens=12, steps=6, seed=3)
PUSH = Intervention(attribute="topic/sports", strength=0.8)


@pytest.fixture
def served(tmp_path: Path) -> DiffusionEngine:
    return tiny.engine(tiny.bert(), tmp_path)


@pytest.mark.parametrize(
    "push",
    [
        Intervention(attribute="topic/sports", strength=0.0),
        Intervention(attribute="register/archaic", strength=-0.0, scope="all"),
        Intervention(vector=VectorRef(0, tuple(range(1, tiny.HIDDEN + 1))), strength=0.0, unit="raw"),
        Intervention(feature=FeatureRef("layer-1-mask", 4), strength=0.0, op="project_out"),
        Intervention(feature=FeatureRef("layer-1-mask", 4), strength=0.0, op="boost"),
        Intervention(feature=FeatureRef("layer-1-mask", 4), strength=1.0, op="multiply"),
    ],
)
def test_a_strength_that_changes_nothing_is_no_steering(served: DiffusionEngine, push: Intervention) -> None:
    [(plain, _), (pushed, result)] = tiny.run(served, PLAIN, replace(PLAIN, interventions=(push,)))
    assert pushed.response == plain.response
    assert result.receipt is not None
    [told] = result.receipt["interventions"]
    assert told["applied"] is False
    assert "changes nothing" in told["notes"][-1]


def test_a_push_changes_its_row_and_no_other(served: DiffusionEngine) -> None:
    alone = [tiny.tokens_of(served, replace(PLAIN, row=row)) for row in range(3)]
    steered = replace(PLAIN, row=1, interventions=(replace(PUSH, strength=20.0),))
    rows = tiny.run(served, replace(PLAIN, row=0), steered, replace(PLAIN, row=2))
    assert rows[0][0].response == alone[0]
    assert rows[1][0].response != alone[1]
    assert rows[2][0].response == alone[2]


def test_a_baseline_twin_is_the_plain_run(served: DiffusionEngine) -> None:
    [(twin, _), (steered, _)] = tiny.run(served, PLAIN, replace(PLAIN, interventions=(replace(PUSH, strength=20.0),)))
    assert twin.response == tiny.tokens_of(served, PLAIN)
    assert steered.response != twin.response


def unsteered_canvases(request: Request, events: list[Event]) -> list[list[int]]:
    """The canvas before each step, rebuilt from the events."""
    _, when = tiny.replayed(events, request)
    canvases = []
    for step in range(request.step):
        response = [request.response[p] if when[p] < step else tiny.MASK for p in range(request.params.max_tokens)]
        canvases.append([*request.prompt_ids, *response, *request.suffix_ids])
    return canvases


def outputs(model: BertDiffusionLM, canvas: list[int], pushes: dict[int, Tensor]) -> dict[int, Tensor]:
    """Each layer's output [length, hidden] as it arrives, with additive pushes [length, hidden] by layer."""
    kept: dict[int, Tensor] = {}

    def site(layer: int, hidden: Tensor) -> Tensor:
        kept[layer] = hidden[0]
        return hidden + pushes[layer] if layer in pushes else hidden

    model(torch.tensor([canvas]), sites=site)
    return kept


def test_the_receipt_counts_what_was_done(served: DiffusionEngine) -> None:
    model = served.model
    assert isinstance(model, BertDiffusionLM)
    push = replace(PUSH, strength=1.5, scope="masked", schedule={"type": "window", "start": 0.25, "stop": 0.75})
    request, events = tiny.solo(served, replace(PLAIN, interventions=(push,), ignore_eos=True))
    direction = served.catalogue.attributes["topic/sports"].directions[1, "sae"]
    size = 1.5 * 6.0
    positions, steps, ratios = 0, 0, []
    for canvas in unsteered_canvases(request, events):
        masked = [i for i, token in enumerate(canvas) if token == tiny.MASK]
        progress = 1 - len(masked) / 12
        if not 0.25 <= progress < 0.75:
            continue
        arrived = outputs(model, canvas, {})[1]
        steps += 1
        for i in masked:
            positions += 1
            ratios.append(size / float(arrived[i].norm()))
    assert positions == 8 + 6 + 4
    assert isinstance(events[-1], Done)
    receipt = events[-1].result.receipt
    assert receipt is not None
    assert receipt["steps"] == 6
    [told] = receipt["interventions"]
    attribute = served.catalogue.attributes["topic/sports"]
    assert (told["name"], told["operator"], told["unit"], told["scope"]) == (
        "topic/sports",
        "add",
        "residual",
        "masked",
    )
    assert told["attribute_sha256"] == attribute.sha256
    assert told["rho"] > 1
    assert told["schedule"]["type"] == "window"
    assert told["schedule"]["gains"] == [0.0] * 16 + [1.0] * 32 + [0.0] * 16
    assert told["strength_per_step"] == [0.0, 0.0, 1.5, 1.5, 1.5, 0.0]
    [site] = told["sites"]
    assert site["layer"] == 1
    assert site["strength_hidden"] == pytest.approx(size)
    assert site["positions_touched"] == positions
    assert site["steps_touched"] == steps == 3
    assert site["delta_ratio_mean"] == pytest.approx(sum(ratios) / len(ratios), rel=1e-4)
    assert site["delta_ratio_max"] == pytest.approx(max(ratios), rel=1e-4)
    assert float(direction.norm()) == pytest.approx(1)


def test_an_attribute_at_two_layers_is_pushed_at_both(served: DiffusionEngine) -> None:
    push = Intervention(attribute="register/archaic", strength=0.5, scope="response")
    [(request, result)] = tiny.run(served, replace(PLAIN, interventions=(push,), ignore_eos=True))
    assert result.receipt is not None
    sites = result.receipt["interventions"][0]["sites"]
    assert [site["layer"] for site in sites] == [0, 2]
    assert [site["strength_hidden"] for site in sites] == pytest.approx([0.5 * 5.0, 0.5 * 7.0])
    assert [site["positions_touched"] for site in sites] == [12 * request.step] * 2


def test_the_steered_distribution_is_the_one_that_is_sampled(served: DiffusionEngine) -> None:
    """At temperature 0 and one step, the tokens are the argmax of a forward with the push added by hand."""
    model = served.model
    assert isinstance(model, BertDiffusionLM)
    push = Intervention(attribute="topic/sports", strength=2.0, scope="masked", schedule="uniform")
    params = replace(PLAIN, steps=1, temperature=0.0, interventions=(push,), ignore_eos=True)
    request, _ = tiny.solo(served, params)
    direction = served.catalogue.attributes["topic/sports"].directions[1, "sae"]
    canvas = [*request.prompt_ids, *([tiny.MASK] * 12)]
    delta = torch.zeros(len(canvas), tiny.HIDDEN)
    delta[request.start :] = 2.0 * 6.0 * direction

    def site(layer: int, hidden: Tensor) -> Tensor:
        return hidden + delta if layer == 1 else hidden

    logits = model.head(model(torch.tensor([canvas]), sites=site))[0, request.start :]
    logits[:, [*model.facts.forbidden_ids, tiny.EOS]] = float("-inf")
    assert request.response == logits.argmax(dim=1).tolist()


def test_traces_are_the_mean_projection_before_the_push(served: DiffusionEngine) -> None:
    model = served.model
    assert isinstance(model, BertDiffusionLM)
    trace = TraceParams(("topic/sports", "register/archaic"), every=2)
    push = replace(PUSH, strength=1.0, scope="response", schedule="uniform")
    request, events = tiny.solo(served, replace(PLAIN, trace=trace, interventions=(push,), ignore_eos=True))
    traces = [event for event in events if isinstance(event, Trace)]
    assert [event.step for event in traces] == [0, 2, 4]
    assert [event.progress for event in traces] == pytest.approx([0, 1 / 3, 2 / 3])
    assert isinstance(events[-1], Done)
    assert list(events[-1].result.trace) == traces
    known = served.catalogue.attributes
    for event, canvas in zip(traces, unsteered_canvases(request, events)[::2], strict=True):
        arrived = outputs(model, canvas, {})
        for name, layer, norm in (("topic/sports", 1, 6.0), ("register/archaic", 0, 5.0)):
            states = arrived[layer][request.start : request.stop].double()
            want = float((states @ known[name].directions[layer, "sae"].double()).mean()) / norm
            assert event.values[name] == pytest.approx(want, rel=1e-4, abs=1e-6)


def test_a_trace_changes_nothing(served: DiffusionEngine) -> None:
    traced = replace(PLAIN, trace=TraceParams(("topic/sports",)))
    assert tiny.tokens_of(served, traced) == tiny.tokens_of(served, PLAIN)
