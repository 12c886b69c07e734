"""What decides about a row is read without its own pushes: the same, bit for bit, as of the same canvas unsteered."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from steerserve.engine.api.conditions import Quantity
from steerserve.engine.api.events import Result
from steerserve.engine.api.params import GenerationParams, Intervention, Refine, TraceParams
from steerserve.engine.engine import DiffusionEngine
from steerserve.engine.feedback.react import read
from steerserve.engine.forward.batch import Batch
from steerserve.engine.forward.meter import ReadoutBatch
from steerserve.engine.request.request import Request
from steerserve.engine.sampling.predictions import Predictions, TorchPredictions
from steerserve.saes import SparseAutoencoder
from tests import tiny
from tests.engine.feedback.test_feedback import engine_of
from tests.engine.feedback.test_refining import probed

PLAIN = GenerationParams(prompt="the king", max_tokens=16, steps=8, seed=3, transfer="linear", ignore_eos=True)
LOOP: dict[str, Any] = {"type": "feedback", "gain": 2.0, "hold": 2.5, "lead": 0.25, "rate": 0.3, "release": 2}
BOTH = Intervention(attribute="both", strength=4.0, schedule=LOOP)
"""Pushes layers 0 and 2, and reads both."""
EARLY = Intervention(attribute="topic/sports", strength=4.0, schedule="uniform", layers=(1,))
ALWAYS = {"progress": {"at_least": 0.0}}
WHOLE: dict[str, Any] = {"feature": {"sae": "sae-2", "index": 5}, "over": "max", "above": 0.4}
"""A feature whose activation needs the whole code, behind every push of the first layers."""
SUM: dict[str, Any] = {"attribute": "both", "read": "activation", "above": 0.3}
ROWS: dict[str, GenerationParams] = {
    "a loop over two layers": replace(PLAIN, interventions=(BOTH,)),
    "a condition on its own activation": replace(
        PLAIN, interventions=(replace(BOTH, schedule="uniform", when={"not": SUM}),), block_length=8
    ),
    "another's condition": replace(PLAIN, interventions=(EARLY, replace(BOTH, strength=1.0, when=WHOLE))),
    "guided": replace(PLAIN, interventions=(BOTH,), cfg_scale=1.0),
    "ended": replace(PLAIN, interventions=(EARLY,), abort_when={"all": [WHOLE, {"progress": {"at_least": 0.9}}]}),
    "rewritten": replace(
        PLAIN,
        interventions=(EARLY,),
        remask_when={"condition": {"all": [SUM, {"progress": {"at_least": 0.5}}]}, "span": "block"},
        block_length=8,
    ),
    "measured": replace(PLAIN, interventions=(BOTH,), measure_kl=True),
    "measured beside what is imposed": replace(
        PLAIN, interventions=(BOTH, replace(EARLY, mandatory=True)), measure_kl=True
    ),
}
FAMILIES: dict[str, Any] = {"bert": tiny.bert, "dream": tiny.dream}


@pytest.fixture(scope="module", params=FAMILIES)
def served(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> DiffusionEngine:
    return engine_of(FAMILIES[request.param](), tmp_path_factory.mktemp(request.param))


class Seen:
    """Every canvas that rows were read on, with what was read, as a run goes."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.values: list[tuple[Request, list[int], dict[Quantity, float], tuple[int, int]]] = []
        self.projections: list[tuple[Request, Tensor, Tensor, Tensor]] = []
        self.features: list[tuple[Request, Tensor, Tensor, Tensor]] = []
        project, rank = TorchPredictions.projections, TorchPredictions.top_features

        def reading(batch: Batch, predictions: Predictions) -> Any:
            found = read(batch, predictions)
            for row, mine in found.items():
                request = batch.requests[row]
                assert batch.canvas[row, : len(request.canvas)].tolist() == request.canvas
                self.values.append((request, list(request.canvas), dict(mine), request.writing_span))
            return found

        def projecting(
            predictions: TorchPredictions, layer: int, directions: Tensor, row: Tensor, position: Tensor
        ) -> Tensor:
            found, batch = project(predictions, layer, directions, row, position), predictions.batch
            self.projections += [
                (r, batch.canvas[i].clone(), position[row == i], found[row == i])
                for i, r in enumerate(batch.requests)
                if r.uptake is not None and r.uptake.push.layer == layer
            ]
            return found

        def ranking(predictions: TorchPredictions, sae: SparseAutoencoder, row: Tensor, position: Tensor) -> Tensor:
            found, batch = rank(predictions, sae, row, position), predictions.batch
            self.features += [
                (r, batch.canvas[i].clone(), position[row == i], found[row == i])
                for i, r in enumerate(batch.requests)
                if r.stability is sae
            ]
            return found

        monkeypatch.setattr("steerserve.engine.engine.read", reading)
        monkeypatch.setattr(TorchPredictions, "projections", projecting)
        monkeypatch.setattr(TorchPredictions, "top_features", ranking)


def unsteered(served: DiffusionEngine, canvas: list[int]) -> dict[int, Tensor]:
    """The states [1, W, hidden_size] that arrive at each layer, of a canvas that nobody pushes."""
    kept: dict[int, Tensor] = {}

    def site(layer: int, hidden: Tensor) -> Tensor:
        kept[layer] = hidden
        return hidden

    wide = [*canvas, *([served.model.facts.eos_id] * (-len(canvas) % 4))]
    with torch.inference_mode():
        served.model(torch.tensor([wide]), torch.tensor([len(canvas)]), site)
    return kept


@pytest.mark.parametrize("kind", ROWS)
def test_readings_under_a_push_are_those_of_the_same_canvas_without_it(
    served: DiffusionEngine, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    seen = Seen(monkeypatch)
    asked = ROWS[kind]
    [_, (request, result), _] = tiny.run(served, replace(PLAIN, row=3), asked, replace(asked, row=1, max_tokens=32))
    assert result.receipt is not None
    assert any(one["applied"] for one in result.receipt["interventions"])
    assert request.plan["reads"] == result.receipt["reads"] == "unsteered twin"
    found = [one for one in seen.values if one[0] is request]
    assert len(found) == result.forward_passes
    gauges = request.gauges
    for _, canvas, values, _ in found:
        width = len(canvas) + -len(canvas) % 4
        position = torch.arange(width)
        first, last = request.start, request.start + 16
        response = ((position >= first) & (position < last))[None]
        meter = ReadoutBatch([(0, one) for one in gauges.values()], torch.device("cpu"))
        states = (position - served.model.facts.shift).clamp(min=0)
        assert meter.read(unsteered(served, canvas), response, states).tolist() == [values[one] for one in gauges]


@pytest.mark.parametrize("order", ["sae_stability", {"type": "sae_attribute", "attribute": "both"}])
@pytest.mark.parametrize("cached", [False, True])
def test_orders_read_the_canvas_as_it_is_without_the_push(
    served: DiffusionEngine, monkeypatch: pytest.MonkeyPatch, order: Any, cached: bool
) -> None:
    """A cache that makes everything anew at each step computes what is computed without one."""
    seen = Seen(monkeypatch)
    early = replace(BOTH, schedule="uniform", layers=(0,))
    cache = {"type": "dual", "refresh_every": 1} if cached else None
    if isinstance(order, dict):
        # The attribute is read at its first layer, which nothing stands before.
        [(request, _)] = tiny.run(served, replace(PLAIN, interventions=(early,), order=order, cache=cache))
        assert (request.plan["reads"], request.rows) == ("the row, before its pushes", 1)
        order = {"type": "sae_attribute", "attribute": "topic/sports"}
    [(request, result), _] = tiny.run(
        served,
        replace(PLAIN, interventions=(early,), order=order, cache=cache),
        replace(PLAIN, row=2, max_tokens=24, order=order, cache=cache),
    )
    assert (request.plan["reads"], request.rows) == ("unsteered twin", 2)
    assert result.receipt is not None and result.receipt["interventions"][0]["applied"]
    told = [one for one in (*seen.projections, *seen.features) if one[0] is request]
    assert len(told) == 8
    for _, canvas, position, found in told:
        kept = unsteered(served, canvas[: len(request.canvas)].tolist())
        at = position - served.model.facts.shift
        if request.uptake is None:
            assert request.stability is not None
            codes = request.stability.encode(kept[request.stability.facts.layer][0, at])
            best = codes.sort(dim=1, descending=True, stable=True).indices[:, :4]
            assert torch.equal(best, found[:, :4])
        else:
            direction = request.uptake.push.direction
            assert torch.equal((kept[request.uptake.push.layer][0, at] * direction).sum(1), found)


def test_a_cached_row_with_a_twin_goes_on_where_it_stopped(served: DiffusionEngine) -> None:
    """What a twin keeps follows it when others join and leave."""
    params = replace(
        PLAIN, interventions=(replace(BOTH, schedule="uniform"),), order="sae_stability", cache="dual", block_length=8
    )
    [(alone, _)] = tiny.run(served, params)
    request = served.admit(params)
    served.add([request])
    for row in range(3):
        served.step()
        served.add([served.admit(replace(params, row=1 + row, steps=2, max_tokens=8))])
    tiny.drain(served)
    assert request.response == alone.response


def test_a_row_is_read_apart_only_where_a_push_would_show(served: DiffusionEngine) -> None:
    one_layer = replace(EARLY, schedule=LOOP)
    late = replace(BOTH, layers=(2,), schedule="uniform")
    for interventions, more, reads, rows in (
        ((), {}, None, 1),
        ((EARLY,), {}, None, 1),
        ((one_layer,), {}, "the row, before its pushes", 1),
        ((BOTH,), {}, "unsteered twin", 2),
        ((BOTH,), {"cfg_scale": 1.0}, "unsteered twin", 3),
        ((BOTH,), {"measure_kl": True}, "unsteered twin", 2),
        ((BOTH, replace(EARLY, mandatory=True)), {"measure_kl": True}, "unsteered twin", 3),
        ((replace(EARLY, mandatory=True),), {"abort_when": WHOLE}, "unsteered twin", 2),
        ((late,), {"abort_when": SUM}, "the row, before its pushes", 1),
        ((replace(late, strength=0.0),), {"abort_when": SUM}, "the row, before its pushes", 1),
        ((replace(EARLY, strength=0.0),), {"abort_when": WHOLE}, "the row, before its pushes", 1),
        ((), {"abort_when": WHOLE}, "the row, before its pushes", 1),
        ((BOTH,), {"trace": TraceParams(("both",))}, "unsteered twin", 2),
        ((late,), {"trace": TraceParams(("both",))}, None, 1),
    ):
        admitted = served.admit(replace(PLAIN, interventions=interventions, **more))
        assert (admitted.plan["reads"], admitted.plan["rows_per_step"]) == (reads, rows)


def test_being_read_apart_changes_nothing_of_the_row_but_what_it_decides(served: DiffusionEngine) -> None:
    """A condition that is read apart and always holds leaves the tokens those of the push alone."""
    push = replace(BOTH, schedule="uniform")
    held = replace(push, when={"any": [ALWAYS, SUM]})
    [(request, result), (plain, other)] = tiny.run(
        served, replace(PLAIN, interventions=(held,)), replace(PLAIN, interventions=(push,))
    )
    assert request.response == plain.response
    assert result.receipt is not None and other.receipt is not None
    for site, same in zip(
        result.receipt["interventions"][0]["sites"], other.receipt["interventions"][0]["sites"], strict=True
    ):
        assert site == same
    assert (request.rows, plain.rows) == (2, 1)


def test_new_steering_begins_and_ends_being_read_apart(
    served: DiffusionEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = Seen(monkeypatch)
    params = replace(PLAIN, abort_when={"all": [WHOLE, {"progress": {"above": 1.0}}]})
    request = served.admit(params)
    served.add([request])
    counts = []
    for interventions in ((EARLY,), (), (EARLY,)):
        served.step()
        served.step()
        served.steer(request.id, served.admit(replace(params, interventions=interventions)))
        counts.append(request.rows)
    tiny.drain(served)
    assert counts == [2, 1, 2]
    gauges = request.gauges
    assert len(seen.values) == 8
    for _, canvas, values, _ in seen.values:
        meter = ReadoutBatch([(0, one) for one in gauges.values()], torch.device("cpu"))
        position = torch.arange(len(canvas) + -len(canvas) % 4)
        response = ((position >= request.start) & (position < request.stop))[None]
        states = (position - served.model.facts.shift).clamp(min=0)
        assert meter.read(unsteered(served, canvas), response, states).tolist() == [values[one] for one in gauges]


def test_a_refined_row_is_read_apart_in_every_round(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    served = probed("bert", tmp_path)
    seen = Seen(monkeypatch)
    archaic = Intervention(
        attribute="register/archaic", strength=2.0, when={"attribute": "topic/sports", "above": -9.0}
    )
    refine = Refine(rounds=2, span=5)
    [(request, result)] = tiny.run(
        served, replace(PLAIN, refine=refine, verdicts=("topic/sports",), interventions=(archaic,))
    )
    assert request.rows == 2
    layer, direction = 1, served.catalogue.attributes["topic/sports"].directions[1, "sae"]
    norm = served.catalogue.attributes["topic/sports"].sites[1].residual_norm
    assert len(seen.values) == len(request.made) > 8
    assert {reach for *_, reach in seen.values[8:]} == {
        (request.start + first, request.start + last) for first, last in spans_of(result)
    }
    for _, canvas, values, reach in seen.values:
        states = unsteered(served, canvas)[layer][0, slice(*reach)]
        expected = float((states * direction).sum(1).mean()) / norm
        assert list(values.values()) == [pytest.approx(expected, rel=1e-5)]


def spans_of(result: Result) -> list[list[int]]:
    assert result.receipt is not None
    return [one["span"] for one in result.receipt["refined"]["rounds"]]
