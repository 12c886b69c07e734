"""`max_kl` is held on the KL that is measured: for every kind of push, over and over, and by no row for another."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from steerserve.engine.api.events import Committed, Done, Event, Failed, Result
from steerserve.engine.api.params import FeatureRef, GenerationParams, Intervention, Limits, VectorRef
from steerserve.engine.engine import DiffusionEngine
from steerserve.engine.forward import gains
from steerserve.engine.request.request import Request
from steerserve.errors import RequestError
from tests import tiny
from tests.engine import priced

PLAIN = GenerationParams(prompt="the king", max_tokens=12, steps=6, seed=3, temperature=1.0, ignore_eos=True)
ATTRIBUTE = Intervention(attribute="plain", strength=2.0, schedule="uniform")
FEATURE = Intervention(feature=FeatureRef("layer-1-mask", 7), strength=4.0, unit="raw")
CLAMP = replace(FEATURE, op="clamp", schedule=None)
VECTOR = Intervention(vector=VectorRef(1, tuple(range(1, tiny.HIDDEN + 1))), strength=9.0, unit="raw", scope="all")
PRICED = Intervention(attribute="topic/sports", strength=2.0, schedule="uniform")
NATS = Intervention(attribute="tone/warm", strength=0.5, unit="kl")
LOOP = Intervention(attribute="topic/sports", strength=4.0, schedule={"type": "feedback"})
LATE = replace(PRICED, schedule={"type": "window", "start": 0.3, "stop": 1.0})


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> DiffusionEngine:
    return priced.engine(tiny.bert(), tmp_path_factory.mktemp("priced"))


def run(served: DiffusionEngine, params: GenerationParams) -> tuple[Request, list[Event], Result]:
    request, events = tiny.solo(served, params)
    assert isinstance(events[-1], Done)
    return request, events, events[-1].result


def told(result: Result) -> dict[str, Any]:
    assert result.receipt is not None
    return result.receipt


def free_kl(served: DiffusionEngine, params: GenerationParams) -> float:
    found: float = told(run(served, replace(params, measure_kl=True))[2])["measured_kl"]
    return found


def log_probabilities(
    served: DiffusionEngine, canvas: list[int], site: Callable[[int, Tensor], Tensor] | None
) -> Tensor:
    model = served.model
    logits = model.head(model(torch.tensor([canvas]), sites=site)[0]).double()
    logits[:, [*model.facts.forbidden_ids, model.facts.eos_id]] = -torch.inf
    return logits.log_softmax(1)


def by_hand(served: DiffusionEngine, request: Request, events: list[Event], gains: list[float]) -> float:
    """Nats a token, from the committed canvases and the gain of each step, of a push of VECTOR."""
    push = request.pushes[0]
    response, total = [tiny.MASK] * request.params.max_tokens, 0.0
    for event in (event for event in events if isinstance(event, Committed)):
        weight = gains[event.step] * push.strength

        def site(layer: int, hidden: Tensor, weight: float = weight) -> Tensor:
            return hidden + weight * push.direction if layer == push.layer else hidden

        canvas = [*request.prompt_ids, *response]
        with torch.inference_mode():
            steered, plain = (log_probabilities(served, canvas, one) for one in (site, None))
        for position, token in zip(event.positions, event.tokens, strict=True):
            p, q = steered[request.start + position], plain[request.start + position]
            kept = p > -torch.inf
            total += float((p[kept].exp() * (p[kept] - q[kept])).sum())
            response[position] = token
    return total / request.params.max_tokens


@pytest.mark.parametrize(
    "pushes",
    [(ATTRIBUTE,), (FEATURE,), (CLAMP,), (VECTOR,), (NATS,), (LOOP,), (LATE, VECTOR)],
    ids=["attribute", "feature", "clamp", "vector", "nats", "feedback", "two"],
)
@pytest.mark.parametrize("share", [0.7, 0.03])
def test_the_measured_kl_is_within_the_limit(
    served: DiffusionEngine, pushes: tuple[Intervention, ...], share: float
) -> None:
    for seed in range(3):
        params = replace(PLAIN, interventions=pushes, seed=seed)
        limit = free_kl(served, params) * share
        _, _, result = run(served, replace(params, limits=Limits(max_kl=limit)))
        receipt = told(result)
        assert 0 < receipt["measured_kl"] <= limit
        cut = receipt["limits"]["clipped"]
        assert cut["kl_steps"] > 0
        assert result.forward_passes == receipt["forward_passes"] == result.steps + cut["kl_repeats"]
        assert cut["kl_repeats"] <= result.steps * (gains.MOST_TRIES - 1)
        assert all(one["clipped"] > 0 and one["applied"] for one in receipt["interventions"][-1:])


def test_the_measured_kl_is_that_of_the_committed_canvases_under_the_gains_of_the_receipt(
    served: DiffusionEngine,
) -> None:
    params = replace(PLAIN, interventions=(VECTOR,))
    limit = free_kl(served, params) / 4
    request, events, result = run(served, replace(params, limits=Limits(max_kl=limit)))
    receipt = told(result)
    gains = [strength / 9.0 for strength in receipt["interventions"][0]["strength_per_step"]]
    assert any(0 < gain < 1 for gain in gains)
    assert len(gains) == result.steps
    assert receipt["measured_kl"] == pytest.approx(by_hand(served, request, events, gains), rel=1e-4)
    assert receipt["limits"]["holds"] == {"max_kl": "measured_kl"}
    assert receipt["predicted_kl"] is None


@pytest.mark.parametrize("transfer", ["linear", {"type": "threshold", "value": 0.5}, "origin"])
@pytest.mark.parametrize("on_exceed", ["clip", "refuse"])
def test_a_limit_that_is_not_reached_changes_nothing(served: DiffusionEngine, transfer: Any, on_exceed: Any) -> None:
    order = "random" if transfer == "origin" else "confidence"
    params = replace(PLAIN, interventions=(VECTOR, LOOP), transfer=transfer, order=order, measure_kl=True)
    free, _, plain = run(served, params)
    spent = told(plain)["measured_kl"]
    request, _, result = run(served, replace(params, limits=Limits(max_kl=spent * 1.0001, on_exceed=on_exceed)))
    assert request.response == free.response
    assert told(result)["measured_kl"] == spent
    assert told(result)["interventions"] == told(plain)["interventions"]
    assert result.forward_passes == plain.forward_passes


def test_a_row_that_is_made_again_changes_no_other_and_is_what_it_is_alone(served: DiffusionEngine) -> None:
    revising = {"type": "remdm", "eta": 0.05, "schedule": "cap"}
    asked = [
        replace(PLAIN, interventions=(VECTOR,), limits=Limits(max_kl=0.05), row=0),
        replace(PLAIN, interventions=(ATTRIBUTE,), row=1, logprobs=True),
        replace(PLAIN, interventions=(PRICED,), limits=Limits(max_kl=0.002), row=2, order="sae_stability"),
        replace(PLAIN, interventions=(LATE,), limits=Limits(max_kl=0.001), transfer=revising, order="random", row=3),
        replace(PLAIN, cfg_scale=1.0, interventions=(FEATURE,), row=4),
        replace(PLAIN, max_tokens=24, interventions=(FEATURE,), limits=Limits(max_delta=0.05), row=5),
    ]
    alone = [run(served, params) for params in asked]
    assert all(told(result)["limits"]["clipped"]["kl_repeats"] > 0 for _, _, result in (alone[0], alone[2], alone[3]))
    together = tiny.run(served, *asked)
    for (lone, _, plain), (request, result) in zip(alone, together, strict=True):
        assert request.response == lone.response
        assert result.logprobs == plain.logprobs
        one, other = told(result), told(plain)
        assert one["measured_kl"] == (other["measured_kl"] and pytest.approx(other["measured_kl"], rel=1e-9))
        for name in ("predicted_kl", "forward_passes", "limits"):
            assert one[name] == other[name]
        for mine, its in zip(one["interventions"], other["interventions"], strict=True):
            assert mine["strength_per_step"] == its["strength_per_step"]
            for site, same in zip(mine["sites"], its["sites"], strict=True):
                assert (site["positions_touched"], site["positions_clipped"]) == (
                    same["positions_touched"],
                    same["positions_clipped"],
                )


def test_a_limit_that_refuses_ends_the_row_before_it_commits_more(served: DiffusionEngine) -> None:
    params = replace(PLAIN, interventions=(VECTOR,))
    free, committed, result = run(served, replace(params, measure_kl=True))
    nats = [one.kl for one in free.made]
    assert None not in nats
    limit = sum(one for one in nats[:3] if one is not None) / 12 * 1.001
    row, beside = served.admit(replace(params, limits=Limits(limit, on_exceed="refuse"))), served.admit(PLAIN)
    served.add([row, beside])
    events = [event for event in tiny.drain(served) if event.request_id == row.id]
    assert [type(event) for event in events] == [Committed] * 3 + [Failed]
    assert isinstance(events[-1], Failed)
    assert events[-1].limit == "limits.max_kl" and "measured nats" in events[-1].message
    mine = [event.tokens for event in events[:3] if isinstance(event, Committed)]
    assert mine == [event.tokens for event in committed[:3] if isinstance(event, Committed)]
    assert beside.response == tiny.tokens_of(served, PLAIN)


def test_changes_while_it_runs_do_not_begin_the_limit_anew(served: DiffusionEngine) -> None:
    limit = free_kl(served, replace(PLAIN, interventions=(VECTOR,))) / 2
    params = replace(PLAIN, interventions=(VECTOR,), limits=Limits(max_kl=limit))
    for changed in ((replace(VECTOR, strength=30.0),), (), (LATE,)):
        request = served.admit(params)
        served.add([request])
        events = served.step() + served.step()
        spent = request.measured_nats / 12
        assert 0 < spent < limit
        served.steer(request.id, served.admit(replace(params, interventions=changed)))
        receipt = told(tiny.results(events + tiny.drain(served))[request.id])
        assert spent <= receipt["measured_kl"] <= limit
        assert (receipt["measured_kl"] > spent) == bool(changed)


def test_what_takes_the_place_of_pushes_that_were_lowered_begins_as_asked(served: DiffusionEngine) -> None:
    """What the first came to says nothing of the second, and of each the receipt tells whether it was lowered."""
    limit = free_kl(served, replace(PLAIN, interventions=(VECTOR,))) / 4
    weak = replace(VECTOR, strength=0.02)
    for first, second in ((VECTOR, weak), (weak, VECTOR)):
        params = replace(PLAIN, interventions=(first,), limits=Limits(max_kl=limit))
        request = served.admit(params)
        served.add([request])
        events = served.step() + served.step()
        served.steer(request.id, served.admit(replace(params, interventions=(second,))))
        before, after = told(tiny.results(events + tiny.drain(served))[request.id])["interventions"]
        strong, other = (before, after) if first is VECTOR else (after, before)
        assert min(strong["strength_per_step"]) < VECTOR.strength and strong["clipped"] == 1
        assert set(other["strength_per_step"]) == {weak.strength} and other["clipped"] == 0


def test_a_push_that_was_off_while_another_was_lowered_was_not(served: DiffusionEngine) -> None:
    late = replace(ATTRIBUTE, schedule={"type": "window", "start": 0.99, "stop": 1.0})
    _, _, result = run(served, replace(PLAIN, interventions=(late, VECTOR), limits=Limits(max_kl=1e-3)))
    assert [one["clipped"] for one in told(result)["interventions"]] == [0, 1]


def test_a_row_that_was_pushed_before_it_was_measured_has_no_measured_kl(served: DiffusionEngine) -> None:
    request = served.admit(replace(PLAIN, interventions=(VECTOR,)))
    served.add([request])
    events = served.step()
    served.steer(request.id, served.admit(replace(PLAIN, interventions=(VECTOR,), limits=Limits(max_kl=1e-3))))
    receipt = told(tiny.results(events + tiny.drain(served))[request.id])
    assert receipt["measured_kl"] is None
    assert request.measured_nats / 12 <= 1e-3
    assert receipt["limits"]["clipped"]["kl_steps"] > 0


def test_what_is_not_the_caller_s_own_is_pushed_on_where_the_limit_is_spent(served: DiffusionEngine) -> None:
    imposed = replace(ATTRIBUTE, mandatory=True)
    _, _, result = run(served, replace(PLAIN, interventions=(VECTOR, imposed), limits=Limits(max_kl=1e-3)))
    own, other = told(result)["interventions"]
    assert max(own["strength_per_step"]) < 9.0 / 2
    assert other["strength_per_step"] == [2.0] * 6
    assert (own["clipped"], other["clipped"]) == (1, 0)


@pytest.mark.parametrize(("changes", "said"), [({"cfg_scale": 1.0}, "without guidance"), ({"cache": "dual"}, "cache")])
def test_a_limit_is_refused_where_the_kl_cannot_be_measured(
    served: DiffusionEngine, tmp_path: Path, changes: dict[str, Any], said: str
) -> None:
    params = replace(PLAIN, interventions=(VECTOR,), limits=Limits(max_kl=1.0))
    with pytest.raises(RequestError, match=said) as error:
        served.admit(replace(params, **changes))
    assert error.value.param == ("cache" if "cache" in changes else "limits.max_kl")
    ratios = tiny.engine(tiny.sedd(), tmp_path)
    with pytest.raises(RequestError, match="predicts ratios") as error:
        ratios.admit(replace(params, transfer="analytic", order="random", ignore_eos=None))
    assert error.value.param == "limits.max_kl"


def test_a_push_that_is_not_a_number_is_given_up(served: DiffusionEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a check of the loop: whatever the measure says, it ends, and what is committed is what is not pushed."""
    seen: list[float] = []

    def broken(found: float) -> Callable[..., list[float]]:
        def measure(batch: Any, plans: Any, *_: Any) -> list[float]:
            seen.append(found)
            return [found if gains.pushing(request, plans) else 0.0 for request in batch.requests]

        return measure

    for found, more in ((float("nan"), 1), (float("inf"), 1), (1e9, 6 * (gains.MOST_TRIES - 1))):
        monkeypatch.setattr("steerserve.engine.sampling.predictions.divergence", broken(found))
        request, _, result = run(served, replace(PLAIN, interventions=(VECTOR,), limits=Limits(max_kl=0.1)))
        assert request.response == tiny.tokens_of(served, PLAIN)
        assert told(result)["measured_kl"] == 0
        assert 6 < result.forward_passes <= 6 + more


def test_a_row_that_ends_early_has_its_kl_over_the_whole_response(served: DiffusionEngine) -> None:
    """So that it compares with the limit and the prediction, which are over it too."""
    whole = replace(PLAIN, interventions=(VECTOR,), measure_kl=True)
    half = replace(whole, abort_when={"progress": {"at_least": 0.5}})
    [(full, _), (ended, result)] = tiny.run(served, whole, half)
    receipt = told(result)
    assert 0 < len(ended.made) < len(full.made)
    spent = sum(one.kl or 0.0 for one in full.made[: len(ended.made)])
    assert receipt["measured_kl"] > 0
    assert receipt["measured_kl"] == pytest.approx(spent / PLAIN.max_tokens, rel=1e-5)
