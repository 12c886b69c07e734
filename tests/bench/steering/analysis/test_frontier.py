"""Frontiers and comparisons on records whose answers are known."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from bench.steering.analysis.comparison import equal_cost, equal_quality, leads
from bench.steering.analysis.directions import directions
from bench.steering.analysis.efficiency import efficiency, measured_gain, predicted_gain
from bench.steering.analysis.frontier import Frontier, frontiers
from bench.steering.analysis.statistics import halves, resamples
from schedulers import CommitmentProfile

ROWS = 60


def record(
    method: str, factor: float, share: float, loss: float, shift: float, kl: float, task: str = "a/x"
) -> dict[str, Any]:
    """A cell whose first rows have the target, and whose figures are the same in every row but for common noise."""
    noise = np.random.default_rng(0).normal(0, 1, size=ROWS)
    order = np.random.default_rng(1).permutation(ROWS)
    has = "".join("1" if place < round(share * ROWS) else "0" for place in order)
    return {
        "experiment": "single",
        "task": task,
        "method": method,
        "factor": factor,
        "peak": factor,
        "self_bleu": 0.1,
        "rows": {
            "nats": [round(100 * 50 * loss)] * ROWS,
            "bytes": [50] * ROWS,
            "distinct_2": [900] * ROWS,
            "odds": {"a/x": [round(100 * (shift + one)) for one in noise], "b/y": [0] * ROWS},
            "has": {"a/x": has, "b/y": "1" * ROWS if factor > 1 else "0" * ROWS},
        }
        | ({} if method == "none" else {"kl": [round(100_000 * kl)] * 10}),
    }


def linear(method: str, gain: float, factors: tuple[float, ...], cost: float = 1.0) -> list[dict[str, Any]]:
    """The first-order world: shifts of gain * factor and a KL of cost * factor^2 / 2."""
    return [
        record(method, f, min(1.0, 0.2 + 0.2 * gain * f), 1 + 0.05 * f, gain * f, cost * f * f / 2) for f in factors
    ]


@pytest.fixture
def found() -> dict[tuple[str, str], Frontier]:
    unsteered = record("none", 0.0, 0.2, 1.0, 0.0, 0.0)
    return frontiers([unsteered, *linear("uniform", 1.0, (0.5, 1.0, 2.0, 4.0)), *linear("best", 1.5, (0.5, 1.0, 2.0))])


def test_a_frontier_starts_at_the_unsteered_rows(found: dict[tuple[str, str], Frontier]) -> None:
    one, index = found["a/x", "uniform"], resamples(ROWS, 0)
    assert one.factors.tolist() == [0, 0.5, 1, 2, 4]
    assert one.shares(index)[0] == pytest.approx([0.2, 0.3, 0.4, 0.6, 1.0], abs=0.01)
    assert one.ratios(index)[0] == pytest.approx([1, 1.025, 1.05, 1.1, 1.2])
    assert one.shifts(index)[0] == pytest.approx([0, 0.5, 1, 2, 4], abs=0.01)
    assert one.off_target.tolist() == [0, 0, 0, 1, 1]


def test_a_lead_is_over_each_rival_on_the_rows_of_both(found: dict[tuple[str, str], Frontier]) -> None:
    told = leads(found, ["a/x"], ["best", "absent"], ["uniform", "best", "absent"], 1.10)
    assert set(told) == {"uniform", "best"} and set(told["uniform"]) == {"best"}
    whole = equal_quality(found, ["a/x"], ["uniform", "best"], 1.10)["best"]
    assert told["uniform"]["best"] == {name: whole[name] for name in ("lead", "lead_interval", "p", "rows")}
    assert told["best"]["best"]["lead"] == 0


def test_the_best_share_is_taken_where_the_loss_ratio_still_holds(found: dict[tuple[str, str], Frontier]) -> None:
    even, odd = halves(ROWS)
    share, ratio, factor = found["a/x", "uniform"].best(1.1, even[None], odd[None])
    assert factor[0] == pytest.approx(2.0, abs=0.06)
    assert ratio[0] == pytest.approx(1.1, abs=0.005)
    assert share[0] == pytest.approx(0.6, abs=0.1)
    assert found["a/x", "uniform"].best(1.0, even[None], odd[None])[2][0] == 0.0


def test_a_strength_at_which_texts_repeat_themselves_is_not_of_equal_quality() -> None:
    dull = linear("dull", 1.0, (0.5, 1.0, 2.0))
    for one, distinct in zip(dull, (900, 850, 300), strict=True):
        one["rows"]["distinct_2"] = [distinct] * ROWS
    frontier = frontiers([record("none", 0, 0.2, 1, 0, 0), *dull])["a/x", "dull"]
    even, odd = halves(ROWS)
    # 90 % of 900 is 810, on the way from 850 at strength 1 to 300 at 2.
    assert frontier.best(1.25, even[None], odd[None])[2][0] == pytest.approx(1.05, abs=0.03)


def test_at_equal_quality_the_lead_is_the_difference_of_shares(found: dict[tuple[str, str], Frontier]) -> None:
    told = equal_quality(found, ["a/x"], ["uniform", "best", "absent"], 1.1)
    assert set(told) == {"uniform", "best"}
    # Both reach the loss ratio at strength 2: shares 0.6 and 0.8.
    assert told["best"]["share"] == pytest.approx(0.8, abs=0.02)
    assert told["best"]["lead"] == pytest.approx(0.2, abs=0.03)
    low, high = told["best"]["lead_interval"]
    assert low <= told["best"]["lead"] <= high
    assert told["best"]["p"] < 0.05
    assert "lead" not in told["uniform"]


def test_at_equal_cost_strengths_are_where_the_costs_meet(found: dict[tuple[str, str], Frontier]) -> None:
    cheap = {**found, **frontiers([record("none", 0, 0.2, 1, 0, 0), *linear("cheap", 1.0, (1.0, 2.0, 4.0), cost=0.25)])}
    told = equal_cost(cheap, ["a/x"], ["uniform", "best", "cheap"], "kl")
    # Uniform's middle strength is 1; a fourth of the cost allows twice the strength.
    assert told["uniform"]["strength"] == pytest.approx(1.0)
    assert told["cheap"]["strength"] == pytest.approx(2.0, abs=0.02)
    assert told["cheap"]["share"] == pytest.approx(0.6, abs=0.02)
    assert told["cheap"]["lead"] == pytest.approx(0.2, abs=0.02)
    assert equal_cost(cheap, ["a/x"], ["cheap"], "peak")["cheap"]["strength"] == pytest.approx(1.0)


def test_tasks_with_different_numbers_of_rows_count_alike(found: dict[tuple[str, str], Frontier]) -> None:
    worse = [record("none", 0, 0.2, 1, 0, 0), *linear("best", 0.5, (0.5, 1.0, 2.0))]
    other = {("a/z", method): one for (_, method), one in found.items()}
    other["a/z", "best"] = frontiers(worse)["a/x", "best"].first(ROWS // 3)
    both, tasks = {**found, **other}, ["a/x", "a/z"]
    alone = [equal_cost(both, [task], ["best"], "kl")["best"] for task in tasks]
    told = equal_cost(both, tasks, ["best"], "kl")["best"]
    assert told["tasks"] == 2
    for name in ("share", "lead", "loss_ratio"):
        assert told[name] == pytest.approx((alone[0][name] + alone[1][name]) / 2)
    quality = equal_quality(both, tasks, ["uniform", "best"], 1.1)["best"]
    each = [equal_quality(both, [task], ["uniform", "best"], 1.1)["best"] for task in tasks]
    assert quality["lead"] == pytest.approx((each[0]["lead"] + each[1]["lead"]) / 2)
    assert quality["rows"] == ROWS // 3
    assert 0 < told["p"] <= 1 and 0 < quality["p"] <= 1


def test_a_lead_is_of_the_rows_that_both_have(found: dict[tuple[str, str], Frontier]) -> None:
    """Strengths are chosen on these rows too, and every draw is of the same rows for both."""
    first, one = ROWS // 3, found["a/x", "uniform"]
    # All later texts have the target, so that a method without these rows would look worse than it is.
    long = replace(one, has=np.where(np.arange(ROWS) >= first, 1.0, one.has))
    short, best = long.first(first), found["a/x", "best"].first(first)
    for uniform, same in ((long, short), (short, long)):
        methods = {"uniform": uniform, "same": same, "best": best}
        told = equal_quality({("a/x", name): each for name, each in methods.items()}, ["a/x"], list(methods), 1.1)
        assert abs(told["uniform"]["share"] - told["same"]["share"]) > 0.1
        assert (told["same"]["lead"], told["same"]["lead_interval"], told["same"]["p"]) == (0.0, (0.0, 0.0), 1.0)
        alone = {("a/x", "uniform"): short, ("a/x", "best"): best}
        among = equal_quality(alone, ["a/x"], ["uniform", "best"], 1.1)
        for name in ("lead", "lead_interval", "p"):
            assert told["best"][name] == among["best"][name]
        assert among["best"]["lead"] == among["best"]["share"] - among["uniform"]["share"]


def test_at_equal_cost_a_lead_is_of_the_rows_that_both_have(found: dict[tuple[str, str], Frontier]) -> None:
    one = found["a/x", "uniform"]
    uniform = replace(one, has=np.where(np.arange(ROWS) >= ROWS // 3, 1.0, one.has))
    both = {("a/x", "uniform"): uniform, ("a/x", "same"): uniform.first(ROWS // 3)}
    for matched in ("kl", "peak"):
        told = equal_cost(both, ["a/x"], ["uniform", "same"], matched)["same"]
        assert (told["lead"], told["p"]) == (pytest.approx(0.0), 1.0)
        assert told["lead_interval"] == pytest.approx((0.0, 0.0))


def test_directions_are_compared_on_the_rows_that_both_have(found: dict[tuple[str, str], Frontier]) -> None:
    means = frontiers([record("none", 0, 0.2, 1, 0, 0), *linear("difference of means, uniform", 1.5, (0.5, 1.0, 2.0))])
    flipped = frontiers([record("none", 0, 0.2, 1, 0, 0), record("sign flipped", 1.0, 0.1, 1.0, -2.0, 0.5)])
    short = {key: one.first(ROWS // 2) for key, one in means.items()}
    told = directions({**found, **short, **flipped}, ["a/x"])["a/x"]
    assert told["uniform"]["lead"] == pytest.approx(told["uniform"]["sae"] - told["uniform"]["diff_means"])
    assert told["uniform"]["lead"] < 0
    assert "commitment" not in told
    assert told["shift"]["sign flipped"][0] == pytest.approx(-2.0, abs=0.01)


def test_a_control_is_beside_its_push_on_the_same_rows(found: dict[tuple[str, str], Frontier]) -> None:
    push = found["a/x", "uniform"]
    later = replace(push, odds=push.odds + np.where(np.arange(ROWS) >= ROWS // 3, push.factors[:, None], 0.0))
    both = {("a/x", "commitment"): later, ("a/x", "random direction"): push.first(ROWS // 3)}
    shift = directions(both, ["a/x"])["a/x"]["shift"]
    assert shift["commitment"] == shift["random direction"]
    assert directions({("a/x", "commitment"): later}, ["a/x"])["a/x"]["shift"]["commitment"][0] > 1.5


def test_a_method_that_does_not_reach_the_cost_is_left_out(found: dict[tuple[str, str], Frontier]) -> None:
    weak = frontiers([record("none", 0, 0.2, 1, 0, 0), *linear("weak", 1.0, (0.2, 0.4))])
    assert "weak" not in equal_cost({**found, **weak}, ["a/x"], ["weak"], "kl")


def test_the_measured_gain_is_rho_where_the_first_order_holds(found: dict[tuple[str, str], Frontier]) -> None:
    told = measured_gain(found["a/x", "best"], found["a/x", "uniform"])
    assert told["cost"] == "measured"
    assert told["shift_ratio"] == pytest.approx(1.5, abs=0.02)
    assert told["root_kl_ratio"] == pytest.approx(1.5, abs=0.02)
    low, high = told["shift_ratio_interval"]
    assert low <= 1.5 + 0.02 and high >= 1.5 - 0.02


def gains_of_six(*, lost: int | None = None) -> dict[str, Any]:
    """The efficiencies of six attributes of which each gains what is predicted, but for one that loses by `optimal`."""
    random = np.random.default_rng(3)
    records, profiles, gains = [record("none", 0.0, 0.2, 1.0, 0.0, 0.0)], {}, {}
    for number in range(6):
        sensitivity = random.uniform(0.05, 1, size=64) ** (1 + number)
        cost = random.uniform(0.2, 2, size=64)
        profile = CommitmentProfile(
            tuple(np.linspace(0, 1, 65)), sensitivity=tuple(sensitivity), cost=tuple(cost)
        )  # the curve is not read where both were measured
        best = sensitivity / cost
        best *= np.sqrt(cost.sum() / (cost * best**2).sum())
        task = f"a/{number}"
        assert predicted_gain(best.tolist(), profile) == pytest.approx(profile.efficiency())
        assert predicted_gain([1.0] * 64, profile) == pytest.approx(1.0)
        profiles[task], gains[task, "optimal"] = profile, best.tolist()
        for method, gain in (("uniform", 1.0), ("optimal", -0.5 if number == lost else profile.efficiency())):
            for one in linear(method, gain, (0.5, 1.0, 2.0)):
                one["rows"]["odds"][task] = one["rows"]["odds"]["a/x"]
                one["rows"]["has"][task] = one["rows"]["has"]["a/x"]
                records.append(one | {"task": task})
        for name in ("odds", "has"):
            records[0]["rows"][name][task] = records[0]["rows"][name]["a/x"]
    return efficiency(frontiers(records), ["uniform", "optimal"], gains, profiles)


def test_gains_of_many_attributes_recover_the_predicted_rhos() -> None:
    told = gains_of_six()
    assert len(told["points"]) == 6
    for point in told["points"]:
        assert point["shift_ratio"] == pytest.approx(point["rho"], rel=0.02)
        assert point["predicted"] == pytest.approx(point["rho"])
    assert told["correlation"]["optimal"]["root_kl_ratio"]["pearson"] > 0.99
    assert told["correlation"]["all"]["shift_ratio"]["points"] == 6


def test_a_schedule_that_loses_has_no_logarithm_and_takes_no_other_point_away() -> None:
    one = gains_of_six(lost=2)["correlation"]["optimal"]["shift_ratio"]
    assert (one["points"], one["of"]) == (5, 6)
    # The five that gain what is predicted agree perfectly; in the order of all six one is out of place.
    assert one["pearson"] > 0.99 and one["pearson_interval"][0] > 0.9
    assert one["spearman"] < 0.99
