"""Measured KL: against the distributions computed by hand, without a change to any token."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from steerserve.engine.api.events import Committed, Done
from steerserve.engine.api.params import GenerationParams, Intervention, VectorRef
from steerserve.engine.engine import TorchEngine
from steerserve.errors import RequestError
from steerserve.models import DiffusionLM
from tests import tiny
from tests.engine import priced

PLAIN = GenerationParams(prompt="the king", max_tokens=12, steps=6, seed=3, ignore_eos=True)
WARM = Intervention(attribute="tone/warm", strength=0.6)
MEASURED = replace(PLAIN, interventions=(WARM,), measure_kl=True)


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> TorchEngine:
    return priced.engine(tiny.bert(), tmp_path_factory.mktemp("priced"))


def log_probabilities(model: DiffusionLM, canvas: list[int], delta: Tensor | None, heat: float) -> Tensor:
    """Of every position's token [length, vocabulary], with delta [length, hidden] added to layer 2's output."""

    def site(layer: int, hidden: Tensor) -> Tensor:
        return hidden + delta if layer == 2 and delta is not None else hidden

    logits = model.head(model(torch.tensor([canvas]), sites=site)[0]).double()
    forbidden = [*model.facts.forbidden_ids, *model.facts.end_ids]
    logits[:, forbidden] = -torch.inf
    return (logits / heat).log_softmax(1)


@pytest.mark.parametrize("temperature", [0.0, 0.5, 1.0])
def test_the_measured_kl_is_that_of_the_two_predictions(served: TorchEngine, temperature: float) -> None:
    request, events = tiny.solo(served, replace(MEASURED, temperature=temperature))
    direction = served.catalogue.attributes["tone/warm"].directions[2, "sae"]
    response, total = [tiny.MASK] * 12, 0.0
    for event in events:
        if not isinstance(event, Committed):
            continue
        canvas = [*request.prompt_ids, *response]
        delta = torch.zeros(len(canvas), tiny.HIDDEN)
        for i, token in enumerate(canvas):
            if token == tiny.MASK:
                delta[i] = 0.6 * 7.0 * direction
        with torch.inference_mode():
            steered, plain = (log_probabilities(served.model, canvas, one, temperature or 1.0) for one in (delta, None))
        for position, token in zip(event.positions, event.tokens, strict=True):
            p, q = steered[request.start + position], plain[request.start + position]
            total += sum(float(a.exp() * (a - b)) for a, b in zip(p, q, strict=True) if a > -torch.inf)
            response[position] = token
    assert isinstance(events[-1], Done) and events[-1].result.receipt is not None
    assert total > 0
    assert events[-1].result.receipt["measured_kl"] == pytest.approx(total / 12, rel=1e-4)


@pytest.mark.parametrize("transfer", ["linear", "origin", {"type": "remdm", "eta": 0.05, "schedule": "cap"}])
def test_measuring_changes_no_token_and_no_neighbour(served: TorchEngine, transfer: object) -> None:
    order = "confidence" if transfer == "linear" else "random"
    rows = [
        replace(one, transfer=transfer, order=order, row=row)  # type: ignore[arg-type]
        for row, one in enumerate((PLAIN, MEASURED, replace(PLAIN, cfg_scale=1.5), replace(MEASURED, measure_kl=False)))
    ]
    alone = [tiny.solo(served, replace(one, measure_kl=False)) for one in rows]
    beside = tiny.run(served, *rows)
    for (lone, events), (request, result) in zip(alone, beside, strict=True):
        assert request.response == lone.response
        last = events[-1]
        assert isinstance(last, Done)
        told, asked = result.receipt, last.result.receipt
        assert (told is None) == (asked is None)
        if told is not None and asked is not None:
            for name in ("predicted_kl", "steps", "forward_passes"):
                assert told[name] == asked[name]
            for one, same in zip(told["interventions"], asked["interventions"], strict=True):
                assert one["strength_per_step"] == same["strength_per_step"]
                assert one["sites"][0]["positions_touched"] == same["sites"][0]["positions_touched"]
    assert [request.rows for request, _ in beside] == [1, 2, 2, 1]
    own = beside[1][1].receipt
    assert own is not None and own["measured_kl"] > 0


def test_what_is_not_the_caller_s_own_is_in_both(served: TorchEngine) -> None:
    imposed = Intervention(attribute="topic/sports", strength=2.0, mandatory=True)
    nothing = replace(WARM, strength=0.0)
    for own, rows in ((nothing, 1), (replace(WARM, strength=1e-6), 2)):
        [(request, result)] = tiny.run(served, replace(MEASURED, interventions=(own, imposed)))
        assert request.rows == rows
        assert result.receipt is not None
        assert result.receipt["measured_kl"] == pytest.approx(0.0, abs=1e-6)


def test_no_kl_is_measured_where_it_would_not_be_that_of_the_run(served: TorchEngine, tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="without guidance") as error:
        served.admit(replace(MEASURED, cfg_scale=1.0))
    assert error.value.param == "measure_kl"
    ratios = tiny.engine(tiny.sedd(), tmp_path)
    push = Intervention(vector=VectorRef(1, tuple(range(1, tiny.HIDDEN + 1))), strength=1.0, unit="raw")
    params = replace(MEASURED, interventions=(push,), transfer="analytic", order="random", ignore_eos=None)
    with pytest.raises(RequestError, match="predicts ratios"):
        ratios.admit(params)


def test_a_push_in_nats_is_measured_as_so_many(tmp_path: Path) -> None:
    """With a cost computed from the model itself, along a run, a small push in nats comes to what was asked."""
    plain = priced.engine(tiny.bert(), tmp_path / "plain")
    direction = plain.catalogue.attributes["tone/warm"].directions[2, "sae"]
    small = 0.02
    slices: list[list[float]] = [[] for _ in range(8)]
    for seed in range(3):
        request, events = tiny.solo(plain, replace(PLAIN, max_tokens=16, steps=8, seed=seed))
        response = [tiny.MASK] * 16
        for event in events:
            if not isinstance(event, Committed):
                continue
            canvas = [*request.prompt_ids, *response]
            delta = torch.zeros(len(canvas), tiny.HIDDEN)
            delta[[i for i, token in enumerate(canvas) if token == tiny.MASK]] = small * 7.0 * direction
            with torch.inference_mode():
                steered, base = (log_probabilities(plain.model, canvas, one, 1.0) for one in (delta, None))
            for position, token in zip(event.positions, event.tokens, strict=True):
                p, q = steered[request.start + position], base[request.start + position]
                kept = p > -torch.inf
                slices[event.step].append(float((p[kept].exp() * (p[kept] - q[kept])).sum()))
                response[position] = token
    # KL = K c a^2 / 2 for a token of the slice.
    cost = tuple(2 * sum(one) / len(one) / small**2 / 8 for one in slices)
    fine = tuple(cost[k // 8] / 8 for k in range(64))
    served = priced.engine(tiny.bert(), tmp_path / "priced", warm=fine)
    asked = 2e-4
    measured, predicted = [], []
    for seed in range(3):
        push = replace(WARM, strength=asked, unit="kl")
        [(_, result)] = tiny.run(served, replace(MEASURED, max_tokens=16, steps=8, seed=seed, interventions=(push,)))
        assert result.receipt is not None
        measured.append(result.receipt["measured_kl"])
        predicted.append(result.receipt["predicted_kl"])
    assert predicted == pytest.approx([asked] * 3, rel=1e-6)
    assert sum(measured) / 3 == pytest.approx(asked, rel=0.15)
