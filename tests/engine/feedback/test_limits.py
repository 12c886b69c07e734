"""Limits: what they scale, lower, clip and refuse, and what they leave alone."""

import math
from dataclasses import replace

import pytest
import torch

from steerserve.engine.api.events import Committed, Done, Failed, Steered
from steerserve.engine.api.params import GenerationParams, Intervention, Limits, VectorRef
from steerserve.engine.engine import DiffusionEngine
from steerserve.engine.forward.batch import Batch
from steerserve.engine.runners.packed import PackedRunner
from steerserve.errors import RequestError
from tests import tiny
from tests.engine import priced

PLAIN = GenerationParams(prompt="the king", max_tokens=12, steps=6, seed=3, ignore_eos=True)
SPORTS = Intervention(attribute="topic/sports", strength=0.8, schedule="optimal")
ARCHAIC = Intervention(attribute="register/archaic", strength=0.5)
VECTOR = Intervention(vector=VectorRef(1, tuple(range(1, tiny.HIDDEN + 1))), strength=9.0, unit="raw", scope="all")
THRESHOLD = {"type": "threshold", "value": 0.5}
CLIPPED = {"kl_steps": 0, "kl_repeats": 0, "predicted_kl_scale": 1.0, "predicted_kl_steps": 0, "delta_positions": 0}


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> DiffusionEngine:
    return priced.engine(tiny.bert(), tmp_path_factory.mktemp("priced"))


def test_a_limit_on_predicted_kl_scales_the_whole_schedule(served: DiffusionEngine) -> None:
    free = replace(PLAIN, interventions=(SPORTS, ARCHAIC))
    [(asked, _)] = tiny.run(served, free)
    predicted = asked.plan["predicted_kl"]
    [(request, result)] = tiny.run(served, replace(free, limits=Limits(max_predicted_kl=predicted / 4)))
    assert request.plan["predicted_kl"] == pytest.approx(predicted / 4)
    assert [one.strength for one in request.pushes] == pytest.approx([one.strength / 2 for one in asked.pushes])
    assert result.receipt is not None
    receipt = result.receipt
    assert receipt["predicted_kl"] == pytest.approx(predicted / 4)
    assert receipt["limits"]["clipped"] == CLIPPED | {"predicted_kl_scale": pytest.approx(0.5)}
    assert [one["clipped"] for one in receipt["interventions"]] == [1, 2]
    nats = Intervention(attribute="tone/warm", strength=0.04, unit="kl")
    request = served.admit(replace(PLAIN, interventions=(nats,), limits=Limits(max_predicted_kl=0.01)))
    told = request.plan["interventions"][0]
    assert (told["strength"], told["predicted_kl"]) == (pytest.approx(0.01), pytest.approx(0.01))
    with pytest.raises(RequestError, match="predicted to cost") as error:
        served.admit(replace(free, limits=Limits(max_predicted_kl=predicted / 4, on_exceed="refuse")))
    assert error.value.param == "limits.max_predicted_kl"


def test_a_limit_that_is_not_reached_changes_nothing(served: DiffusionEngine) -> None:
    free = replace(PLAIN, interventions=(SPORTS, ARCHAIC))
    for params in (free, replace(free, transfer=THRESHOLD)):
        plain, events = tiny.solo(served, params)
        for clip in ("clip", "refuse"):
            limits = Limits(1000.0, 1000.0, 1000.0, clip)
            limited, same = tiny.solo(served, replace(params, limits=limits))
            assert limited.response == plain.response
            assert isinstance(same[-1], Done) and same[-1].result.receipt is not None
            assert same[-1].result.receipt["limits"]["clipped"] == CLIPPED
            assert isinstance(events[-1], Done) and events[-1].result.receipt is not None
            assert same[-1].result.receipt["predicted_kl"] == events[-1].result.receipt["predicted_kl"]


@pytest.mark.parametrize("transfer", [THRESHOLD, "origin", {"type": "entropy_bound", "value": 1.0}])
def test_a_limit_holds_where_the_steps_depend_on_the_run(served: DiffusionEngine, transfer: object) -> None:
    order = "random" if transfer == "origin" else "confidence"
    params = replace(PLAIN, transfer=transfer, order=order, interventions=(SPORTS,))  # type: ignore[arg-type]
    predicted = served.admit(params).plan["predicted_kl"]
    lowered = 0
    for seed in range(6):
        for share in (0.9, 0.3):
            limit = predicted * share
            _, events = tiny.solo(served, replace(params, seed=seed, limits=Limits(max_predicted_kl=limit)))
            assert isinstance(events[-1], Done) and events[-1].result.receipt is not None
            receipt = events[-1].result.receipt
            assert 0 < receipt["predicted_kl"] <= limit * (1 + 1e-6)
            lowered += receipt["limits"]["clipped"]["predicted_kl_steps"]
    assert lowered > 0


def test_changes_while_it_runs_do_not_begin_a_budget_anew(served: DiffusionEngine) -> None:
    warm = Intervention(attribute="tone/warm", strength=0.02, unit="kl")
    params = replace(PLAIN, interventions=(warm,), limits=Limits(max_predicted_kl=0.02))
    request = served.admit(params)
    served.add([request])
    events = served.step() + served.step()
    served.steer(request.id, served.admit(replace(params, interventions=(replace(warm, strength=0.05),))))
    events += tiny.drain(served)
    receipt = tiny.results(events)[request.id].receipt
    assert receipt is not None
    assert receipt["predicted_kl"] == pytest.approx(0.02)
    # Within the limit by itself, and not after what has been spent.
    params = replace(params, limits=Limits(max_predicted_kl=0.02, on_exceed="refuse"))
    served.add([request := served.admit(params)])
    events = served.step() + served.step() + served.step()
    late = replace(warm, strength=0.038, schedule={"type": "window", "start": 0.5, "stop": 1.0})
    served.steer(request.id, served.admit(replace(params, interventions=(late,))))
    events += tiny.drain(served)
    assert isinstance(events[-1], Failed)
    assert (events[-1].limit, "max_predicted_kl" in events[-1].message) == ("limits.max_predicted_kl", True)


def test_unknown_costs_cannot_be_limited(served: DiffusionEngine) -> None:
    for push, control in (
        (Intervention(attribute="plain", strength=0.1), None),
        (VECTOR, None),
        (SPORTS, "random"),
        (SPORTS, "matched_norm"),
    ):
        params = replace(PLAIN, interventions=(push,), limits=Limits(max_predicted_kl=1.0), control=control)  # type: ignore[arg-type]
        with pytest.raises(RequestError, match="calibrated cost") as error:
            served.admit(params)
        assert error.value.param == "limits.max_predicted_kl"
    served.admit(replace(PLAIN, interventions=(SPORTS,), limits=Limits(max_predicted_kl=1.0), control="sign_flip"))


def test_bad_limits_are_refused_by_name(served: DiffusionEngine) -> None:
    for limits, at in (
        (Limits(max_kl=0.0), "max_kl"),
        (Limits(max_predicted_kl=math.nan), "max_predicted_kl"),
        (Limits(max_delta=-1.0), "max_delta"),
        (Limits(max_delta=math.inf), "max_delta"),
        (Limits(max_predicted_kl=1.0, on_exceed="stop"), "on_exceed"),  # type: ignore[arg-type]
    ):
        with pytest.raises(RequestError) as error:
            served.admit(replace(PLAIN, limits=limits))
        assert error.value.param == f"limits.{at}"


def states(served: DiffusionEngine, params: GenerationParams) -> tuple[torch.Tensor, torch.Tensor]:
    """The states before and after layer 1's push, of the first forward of a row: [length, hidden] each."""
    request = served.admit(params)
    batch = Batch([request], served.model.facts, served.device, served.dtype)
    runner = PackedRunner(batch, served.model)
    site, kept = runner.packed.parts[0].plan.sites[1], []
    apply = site.apply

    def watched(hidden: torch.Tensor) -> torch.Tensor:
        kept.append(hidden)
        kept.append(apply(hidden))
        return kept[1]

    site.apply = watched  # type: ignore[method-assign]
    with torch.inference_mode():
        runner.begin()
        runner.forward()
    length = len(request.canvas)
    return kept[0][0, :length], kept[1][0, :length]


def test_a_bound_holds_at_every_position_for_all_pushes_together(served: DiffusionEngine) -> None:
    free = replace(PLAIN, interventions=(VECTOR, replace(SPORTS, strength=3.0, schedule="uniform")))
    before, wide = states(served, free)
    ratios = (wide - before).norm(dim=1) / before.norm(dim=1)
    limit = float(ratios.median())
    same, bounded = states(served, replace(free, limits=Limits(max_delta=limit)))
    assert torch.equal(before, same)
    over = ratios > limit
    assert 0 < int(over.sum()) < len(over)
    now = (bounded - before).norm(dim=1) / before.norm(dim=1)
    torch.testing.assert_close(now[over], torch.full_like(now[over], limit), rtol=1e-4, atol=0)
    assert torch.equal(bounded[~over], wide[~over])
    # Scaled, not turned.
    torch.testing.assert_close(
        torch.nn.functional.cosine_similarity(bounded - before, wide - before), torch.ones(len(over))
    )


def test_the_receipt_counts_the_positions_that_were_clipped(served: DiffusionEngine) -> None:
    free = replace(PLAIN, interventions=(VECTOR,))
    [(request, plain)] = tiny.run(served, free)
    assert plain.receipt is not None
    site = plain.receipt["interventions"][0]["sites"][0]
    assert (site["positions_clipped"], plain.receipt["interventions"][0]["clipped"]) == (0, 0)
    [(_, result)] = tiny.run(served, replace(free, limits=Limits(max_delta=0.05)))
    assert result.receipt is not None
    told = result.receipt["interventions"][0]
    assert told["clipped"] == 1
    assert told["sites"][0]["positions_clipped"] == told["sites"][0]["positions_touched"] == 6 * len(request.canvas)
    assert told["sites"][0]["delta_ratio_max"] == pytest.approx(0.05, rel=1e-4)
    assert result.receipt["limits"]["clipped"]["delta_positions"] == 6 * len(request.canvas)


def test_rows_without_a_bound_are_what_they_are_alone(served: DiffusionEngine) -> None:
    steered = replace(PLAIN, interventions=(VECTOR, SPORTS), row=1)
    bounded = replace(PLAIN, interventions=(VECTOR,), row=2, limits=Limits(max_delta=0.05))
    alone = [tiny.tokens_of(served, one) for one in (PLAIN, steered, bounded)]
    beside = tiny.run(served, PLAIN, steered, bounded)
    assert [request.response for request, _ in beside] == alone
    [(_, lone)] = tiny.run(served, steered)
    assert lone.receipt == beside[1][1].receipt


@pytest.mark.parametrize("cfg_scale", [0.0, 1.0])
def test_a_row_over_a_bound_that_refuses_ends_there_alone(served: DiffusionEngine, cfg_scale: float) -> None:
    limits = Limits(max_delta=0.05, on_exceed="refuse")
    late = replace(VECTOR, schedule={"type": "window", "start": 0.5, "stop": 1.0})
    over = served.admit(replace(PLAIN, interventions=(late,), limits=limits, cfg_scale=cfg_scale))
    plain = served.admit(replace(PLAIN, row=1))
    served.add([over, plain])
    events = tiny.drain(served)
    assert sorted(tiny.terminal(events)) == sorted([over.id, plain.id])
    mine = [event for event in events if event.request_id == over.id]
    assert len([event for event in mine if isinstance(event, Committed)]) == 3
    failed = mine[-1]
    assert isinstance(failed, Failed)
    assert (failed.limit, failed.aborted) == ("limits.max_delta", False)
    assert "max_delta" in failed.message and "layer 1" in failed.message and "0.05" in failed.message
    assert plain.response == tiny.tokens_of(served, replace(PLAIN, row=1))


def test_a_row_that_a_change_puts_over_a_bound_is_told_of_the_change_first(served: DiffusionEngine) -> None:
    limits = Limits(max_delta=0.01, on_exceed="refuse")
    row = served.admit(replace(PLAIN, limits=limits))
    served.add([row])
    served.step()
    loud = Intervention(attribute="topic/sports", strength=50.0, schedule="uniform")
    assert served.steer(row.id, served.admit(replace(PLAIN, limits=limits, interventions=(loud,)))) == 1
    assert [type(event) for event in served.step()] == [Steered, Failed]


def test_what_is_not_the_caller_s_own_is_neither_limited_nor_counted(served: DiffusionEngine) -> None:
    imposed = replace(VECTOR, mandatory=True)
    params = replace(PLAIN, interventions=(SPORTS, imposed), limits=Limits(max_predicted_kl=1e-4, max_delta=0.01))
    request, events = tiny.solo(served, params)
    own, other = request.interventions
    assert other.pushes[0].strength == 9.0
    assert isinstance(events[-1], Done) and events[-1].result.receipt is not None
    receipt = events[-1].result.receipt
    assert receipt["predicted_kl"] == pytest.approx(1e-4)
    assert receipt["interventions"][1]["sites"][0]["positions_clipped"] == 0
    [alone] = [one.pushes[0] for one in tiny.solo(served, replace(PLAIN, interventions=(imposed,)))[0].interventions]
    assert other.pushes[0].applied.ratio_max == pytest.approx(alone.applied.ratio_max, rel=0.5)
    assert own.pushes[0].strength < 0.8 * 6.0


def test_a_limit_holds_for_what_the_run_decides(served: DiffusionEngine) -> None:
    loop = replace(SPORTS, schedule={"type": "feedback"}, strength=2.0)
    free = replace(PLAIN, interventions=(loop, ARCHAIC))
    _, events = tiny.solo(served, free)
    assert isinstance(events[-1], Done) and events[-1].result.receipt is not None
    spent = events[-1].result.receipt["predicted_kl"]
    most = served.admit(free).plan["predicted_kl"]
    assert 0 < spent <= most
    request, events = tiny.solo(served, replace(free, limits=Limits(max_predicted_kl=spent / 3)))
    assert request.plan["predicted_kl"] == pytest.approx(spent / 3)
    assert isinstance(events[-1], Done) and events[-1].result.receipt is not None
    receipt = events[-1].result.receipt
    assert 0 < receipt["predicted_kl"] <= spent / 3 * (1 + 1e-6)
    assert receipt["limits"]["clipped"]["predicted_kl_steps"] > 0
    assert receipt["limits"]["clipped"]["predicted_kl_scale"] == 1
    fed = receipt["interventions"][0]
    assert fed["feedback"]["gains"] == pytest.approx([one / 2.0 for one in fed["strength_per_step"]], abs=2e-6)
    _, events = tiny.solo(served, replace(free, limits=Limits(max_predicted_kl=spent / 3, on_exceed="refuse")))
    assert isinstance(events[-1], Failed)
    assert events[-1].limit == "limits.max_predicted_kl"


def test_a_limit_holds_where_tokens_are_written_again(served: DiffusionEngine) -> None:
    again = {"condition": {"progress": {"at_least": 0.5}}, "span": "block", "times": 2}
    remdm = {"type": "remdm", "eta": 0.2, "schedule": "cap"}
    for params in (
        replace(PLAIN, interventions=(ARCHAIC,), remask_when=again),
        replace(PLAIN, interventions=(ARCHAIC,), transfer=remdm, order="random", steps=24),
    ):
        request, events = tiny.solo(served, params)
        assert request.plan["predicted_kl"] is None
        assert isinstance(events[-1], Done) and events[-1].result.receipt is not None
        spent = events[-1].result.receipt["predicted_kl"]
        limited, events = tiny.solo(served, replace(params, limits=Limits(max_predicted_kl=spent / 2)))
        assert limited.plan["predicted_kl"] == pytest.approx(spent / 2)
        assert isinstance(events[-1], Done) and events[-1].result.receipt is not None
        assert 0 < events[-1].result.receipt["predicted_kl"] <= spent / 2 * (1 + 1e-6)


def test_a_limit_below_what_was_spent_lowers_nothing_where_nothing_is_pushed(served: DiffusionEngine) -> None:
    before = replace(PLAIN, interventions=(SPORTS,), limits=Limits(max_predicted_kl=1.0))
    late = replace(SPORTS, schedule={"type": "window", "start": 0.9, "stop": 1.0})
    request, beside = served.admit(before), served.admit(PLAIN)
    served.add([request, beside])
    events = [event for _ in range(3) for event in served.step()]
    assert request.budget is not None and request.budget.spent > 1e-4
    served.steer(request.id, served.admit(replace(before, interventions=(late,), limits=Limits(max_predicted_kl=1e-4))))
    events += tiny.drain(served)
    assert set(tiny.results(events)) == {request.id, beside.id}
