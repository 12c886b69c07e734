"""Steering that is changed while a row runs, against rows whose schedule says the same from the start."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from steerserve.engine.api.events import Done, Event, Steered
from steerserve.engine.api.params import GenerationParams, Intervention
from steerserve.engine.engine import TorchEngine
from tests import tiny

# A step commits two of sixteen: progress before step k is k / 8, on a border of the slices that gains are compiled on.
PLAIN = GenerationParams(prompt="the king", max_tokens=16, steps=8, seed=3, transfer="linear", ignore_eos=True)
PUSH = Intervention(attribute="topic/sports", strength=20.0, schedule="uniform")
OTHER = Intervention(attribute="register/archaic", strength=15.0, schedule="uniform", scope="all")


@pytest.fixture
def served(tmp_path: Path) -> TorchEngine:
    return tiny.engine(tiny.bert(), tmp_path)


def windowed(push: Intervention, first: float, end: float) -> Intervention:
    return replace(push, schedule={"type": "window", "start": first / 8, "stop": end / 8})


def changed(
    served: TorchEngine, before: GenerationParams, step: int, *after: Intervention
) -> tuple[list[int], dict[str, Any], list[Event]]:
    """A row whose interventions become `after` once `step` steps are made: its response, receipt and events."""
    request = served.admit(before)
    served.add([request])
    events = [event for _ in range(step) for event in served.step()]
    assert served.steer(request.id, served.admit(replace(before, interventions=after))) == step
    events += tiny.drain(served)
    [done] = [event for event in events if isinstance(event, Done)]
    assert done.result.receipt is not None
    return request.response, done.result.receipt, events


@pytest.mark.parametrize("step", [0, 1, 3, 7])
def test_new_interventions_hold_from_the_next_step(served: TorchEngine, step: int) -> None:
    response, receipt, events = changed(served, PLAIN, step, PUSH)
    reference = replace(PLAIN, interventions=(windowed(PUSH, step, 8),))
    [(same, result)] = tiny.run(served, reference)
    assert response == same.response
    assert result.receipt is not None
    [told], [expected] = receipt["interventions"], result.receipt["interventions"]
    for name in ("positions_touched", "steps_touched", "delta_ratio_mean", "delta_ratio_max"):
        assert told["sites"][0][name] == pytest.approx(expected["sites"][0][name])
    assert told["strength_per_step"] == [20.0] * (8 - step)
    assert told.get("from_step", 0) == step
    assert [(one.step, one.interventions[0]["name"]) for one in events if isinstance(one, Steered)] == [
        (step, "topic/sports")
    ]


def test_one_intervention_gives_way_to_another(served: TorchEngine) -> None:
    before = replace(PLAIN, interventions=(PUSH,))
    response, receipt, _ = changed(served, before, 2, OTHER)
    [(same, _)] = tiny.run(served, replace(PLAIN, interventions=(windowed(PUSH, 0, 2), windowed(OTHER, 2, 8))))
    assert response == same.response
    assert response not in (tiny.tokens_of(served, before), tiny.tokens_of(served, PLAIN))
    first, second = receipt["interventions"]
    assert (first["name"], first["from_step"], first["until_step"]) == ("topic/sports", 0, 2)
    assert (second["name"], second["from_step"]) == ("register/archaic", 2)
    assert "until_step" not in second
    assert first["strength_per_step"] == [20.0] * 2
    assert second["strength_per_step"] == [15.0] * 6
    assert first["sites"][0]["steps_touched"] == 2
    assert [site["steps_touched"] for site in second["sites"]] == [6, 6]


def test_no_interventions_end_the_steering(served: TorchEngine) -> None:
    response, receipt, _ = changed(served, replace(PLAIN, interventions=(PUSH,)), 3)
    [(same, _)] = tiny.run(served, replace(PLAIN, interventions=(windowed(PUSH, 0, 3),)))
    assert response == same.response
    assert [(one["name"], one["until_step"]) for one in receipt["interventions"]] == [("topic/sports", 3)]


def test_twice_changed_keeps_both_in_the_receipt(served: TorchEngine) -> None:
    request = served.admit(replace(PLAIN, interventions=(PUSH,)))
    served.add([request])
    served.step()
    served.steer(request.id, served.admit(replace(PLAIN, interventions=(OTHER,))))
    served.steer(request.id, served.admit(PLAIN))
    served.step()
    served.step()
    served.steer(request.id, served.admit(replace(PLAIN, interventions=(PUSH,))))
    [done] = [event for event in tiny.drain(served) if isinstance(event, Done)]
    assert done.result.receipt is not None
    told = [(one["name"], one["from_step"], one.get("until_step")) for one in done.result.receipt["interventions"]]
    assert told == [("topic/sports", 0, 1), ("topic/sports", 3, None)]
    assert request.response == tiny.tokens_of(
        served, replace(PLAIN, interventions=(windowed(PUSH, 0, 1), windowed(PUSH, 3, 8)))
    )


def test_rows_beside_it_do_not_change(served: TorchEngine) -> None:
    others = [replace(PLAIN, row=1), replace(PLAIN, row=2, interventions=(PUSH,))]
    alone = [tiny.tokens_of(served, params) for params in others]
    requests = [served.admit(params) for params in (PLAIN, *others)]
    served.add(requests)
    served.step()
    assert served.steer(requests[0].id, served.admit(replace(PLAIN, interventions=(OTHER,)))) == 1
    tiny.drain(served)
    assert [request.response for request in requests[1:]] == alone


def test_a_waiting_row_is_steered_before_it_starts(tmp_path: Path) -> None:
    served = tiny.engine(tiny.bert(), tmp_path, max_rows=1)
    first, second = served.admit(PLAIN), served.admit(replace(PLAIN, row=1))
    served.add([first, second])
    served.step()
    steered = replace(PLAIN, row=1, interventions=(PUSH,))
    assert served.steer(second.id, served.admit(steered)) == 0
    tiny.drain(served)
    assert second.response == tiny.tokens_of(served, steered)


def test_rows_that_are_gone_are_not_steered(served: TorchEngine) -> None:
    request, _ = tiny.solo(served, PLAIN)
    other = served.admit(PLAIN)
    assert served.steer(request.id, other) is None
    assert served.steer("nobody", other) is None
    aborted = served.admit(PLAIN)
    served.add([aborted])
    served.step()
    served.abort(aborted.id)
    assert served.steer(aborted.id, other) is None
