"""A window pushes at the steps whose progress lies inside it and at no other: as planned, and as applied."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from steerserve.config import EngineConfig
from steerserve.engine.api.params import GenerationParams, Intervention
from steerserve.engine.engine import TorchEngine
from steerserve.engine.vllm.engine import VllmEngine
from tests import tiny
from tests.engine import priced
from tests.engine.flat_workers import FlatWorkers

LENGTH = 80
PLAIN = GenerationParams(prompt="the king", max_tokens=LENGTH, steps=LENGTH, seed=3, temperature=1.0, ignore_eos=True)
SPORTS = Intervention(attribute="topic/sports", strength=0.3)
# At most a slice of 1/64 wide, over a border of slices, and wide with borders inside of slices.
WINDOWS = [(0.0, 0.002), (0.0, 0.013), (0.012, 0.026), (0.0126, 0.03), (0.1, 0.33), (0.98, 1.0), (0.0, 1.0)]


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> TorchEngine:
    return priced.engine(tiny.bert(), tmp_path_factory.mktemp("priced"))


def within(start: float, stop: float, **how: Any) -> GenerationParams:
    schedule = {"type": "window", "start": start, "stop": stop}
    return replace(PLAIN, interventions=(replace(SPORTS, schedule=schedule),), **how)


def expected(start: float, stop: float) -> list[float]:
    return [0.3 if start <= i / LENGTH < stop else 0.0 for i in range(LENGTH)]


def applied(engine: Any, params: GenerationParams) -> tuple[list[float], list[float], dict[str, Any]]:
    """Strengths per step as planned, and as applied; the receipt."""
    [(request, result)] = tiny.run(engine, params)
    assert result.receipt is not None
    [planned], [told] = request.plan["interventions"], result.receipt["interventions"]
    return planned["strength_per_step"], told["strength_per_step"], result.receipt


@pytest.mark.parametrize(("start", "stop"), WINDOWS)
def test_the_plan_and_the_run_push_at_the_steps_inside(served: TorchEngine, start: float, stop: float) -> None:
    planned, made, receipt = applied(served, within(start, stop))
    assert planned == made == pytest.approx(expected(start, stop))
    assert any(planned)
    [site] = receipt["interventions"][0]["sites"]
    assert site["steps_touched"] == sum(strength > 0 for strength in planned)


@pytest.mark.parametrize(("start", "stop"), WINDOWS[:4])
def test_the_predicted_kl_is_that_of_the_steps_inside(served: TorchEngine, start: float, stop: float) -> None:
    _, _, receipt = applied(served, within(start, stop))
    costs, nats = priced.COSTS["topic/sports"], 0.0
    for i, strength in enumerate(expected(start, stop)):
        nats += len(costs) * costs[int(i / LENGTH * len(costs))] * strength**2 / 2 / LENGTH
    assert receipt["predicted_kl"] == pytest.approx(nats)
    assert served.admit(within(start, stop)).plan["predicted_kl"] == pytest.approx(nats)


def test_of_a_run_whose_steps_are_not_known_the_slices_are_counted_whole(served: TorchEngine) -> None:
    plan = served.admit(within(0.002, 0.003, transfer={"type": "threshold", "value": 0.9})).plan
    assert plan["predicted_kl"] == pytest.approx(priced.COSTS["topic/sports"][0] * 0.3**2 / 2)
    assert plan["interventions"][0]["strength_per_step"] is None


def test_a_window_between_two_steps_pushes_nowhere_and_says_so(served: TorchEngine) -> None:
    planned, made, receipt = applied(served, within(0.001, 0.012))
    assert not any(planned) and not any(made)
    assert "no step falls where the schedule pushes: not applied" in receipt["interventions"][0]["notes"]


def test_rows_side_by_side_keep_to_their_own_windows(served: TorchEngine) -> None:
    rows = [replace(PLAIN, row=9), *(within(*window, row=i) for i, window in enumerate(WINDOWS))]
    found = tiny.run(served, *rows)
    for window, (_, result) in zip(WINDOWS, found[1:], strict=True):
        assert result.receipt is not None
        assert result.receipt["interventions"][0]["strength_per_step"] == pytest.approx(expected(*window))
    for place in (0, 2, 5):
        assert found[place][0].response == tiny.tokens_of(served, rows[place])


def test_a_cache_and_the_workers_of_vllm_keep_to_the_same_steps(served: TorchEngine, tmp_path: Path) -> None:
    model = tiny.dream()
    catalogue = tiny.catalogue(model, tmp_path)
    far = VllmEngine(model, tiny.tokenizer(), catalogue, EngineConfig(), FlatWorkers(model, catalogue.saes))
    start, stop = 0.1, 0.33
    for engine, params in ((served, within(start, stop, cache="dual", block_length=16)), (far, within(start, stop))):
        planned, made, _ = applied(engine, params)
        assert planned == made == pytest.approx(expected(start, stop))


def test_an_operator_with_a_target_goes_all_the_way_at_the_steps_inside(served: TorchEngine) -> None:
    schedule = {"type": "window", "start": 0.0, "stop": 0.013}
    push = Intervention(attribute="topic/sports", op="clamp", strength=1.0, unit="raw", schedule=schedule)
    planned, made, _ = applied(served, replace(PLAIN, interventions=(push,)))
    assert planned == made == [1.0, 1.0] + [0.0] * (LENGTH - 2)
