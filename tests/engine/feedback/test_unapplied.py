"""A push that is due and changes nothing ends its row; one of which nothing was due does not."""

import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from steerserve.config import EngineConfig
from steerserve.engine.api.events import Done, Event, Failed
from steerserve.engine.api.params import FeatureRef, GenerationParams, Intervention, Limits, VectorRef
from steerserve.engine.engine import DiffusionEngine
from steerserve.engine.forward.graphs.recorded import RecordedForward
from steerserve.engine.vllm.engine import VllmEngine
from steerserve.models import DiffusionLM
from steerserve.steering.plan import SteeringPlan
from steerserve.steering.site import Site
from tests import tiny
from tests.engine.flat_workers import FlatWorkers
from tests.engine.forward.test_graphs import graphed_over

PLAIN = GenerationParams(prompt="the king", max_tokens=12, steps=6, seed=3, ignore_eos=True)
VECTOR = VectorRef(1, tuple(float(i % 7 - 3) for i in range(tiny.HIDDEN)))
PUSH = Intervention(vector=VECTOR, strength=6.0, unit="raw")
OTHER = replace(PUSH, vector=replace(VECTOR, layer=2))
STEERED = replace(PLAIN, interventions=(PUSH, OTHER))

Break = Callable[[pytest.MonkeyPatch, DiffusionEngine], None]


def apply_does_nothing(patch: pytest.MonkeyPatch, served: DiffusionEngine) -> None:  # noqa: ARG001
    patch.setattr(Site, "apply", lambda _, hidden: hidden)


def apply_is_thrown_away(patch: pytest.MonkeyPatch, served: DiffusionEngine) -> None:  # noqa: ARG001
    apply = Site.apply

    def wasted(site: Site, hidden: Tensor) -> Tensor:
        apply(site, hidden)
        return hidden

    patch.setattr(Site, "apply", wasted)


def nothing_is_added(patch: pytest.MonkeyPatch, served: DiffusionEngine) -> None:  # noqa: ARG001
    patch.setattr(
        "steerserve.steering.site.combined",
        lambda weight, directions: torch.zeros(len(weight), weight.shape[2], directions.shape[2]),
    )


def the_plan_is_not_asked(patch: pytest.MonkeyPatch, served: DiffusionEngine) -> None:  # noqa: ARG001
    patch.setattr(SteeringPlan, "__call__", lambda _, layer, hidden: hidden)  # noqa: ARG005


def the_model_forgets_its_sites(patch: pytest.MonkeyPatch, served: DiffusionEngine) -> None:
    forward, resume = served.model.forward, served.model.resume

    def bare(tokens: Tensor, lengths: Any = None, sites: Any = None, sigma: Any = None, at: Any = None) -> Tensor:
        del sites
        return forward(tokens, lengths, None, sigma, at)

    patch.setattr(served.model, "forward", bare)
    patch.setattr(served.model, "resume", lambda tokens, memory, lengths, _: resume(tokens, memory, lengths, None))


AT_ONCE: list[Break] = [apply_does_nothing, the_plan_is_not_asked, the_model_forgets_its_sites]
"""The forward does not come by the site, which is known before its step is told."""
AT_THE_END: list[Break] = [apply_is_thrown_away, nothing_is_added]
"""It does, and the states stay as they are."""


def broken_after(served: DiffusionEngine, steps: int, breaks: Break, *rows: GenerationParams) -> list[list[Event]]:
    """The events of each row, where the hook stops working after so many steps."""
    requests = [served.admit(one) for one in rows]
    served.add(requests)
    events = [event for _ in range(steps) for event in served.step()]
    with pytest.MonkeyPatch.context() as patch:
        breaks(patch, served)
        events += tiny.drain(served)
    return [[event for event in events if event.request_id == request.id] for request in requests]


@pytest.mark.parametrize("cache", [None, "dual"])
@pytest.mark.parametrize("breaks", [*AT_ONCE, *AT_THE_END])
def test_a_row_whose_hook_stops_working_fails_and_its_neighbour_goes_on(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, breaks: Break, cache: str | None
) -> None:
    served = tiny.engine(tiny.bert(), tmp_path)
    beside = replace(PLAIN, row=1)
    expected = tiny.tokens_of(served, beside)
    for steps in (0, 2):
        caplog.clear()
        with caplog.at_level(logging.ERROR):
            mine, other = broken_after(served, steps, breaks, replace(STEERED, cache=cache, block_length=12), beside)
        failed = mine[-1]
        assert isinstance(failed, Failed)
        assert failed.unsteered and not failed.aborted and failed.limit is None
        assert "layer 1 did not change the states" in failed.message
        assert len(mine) == 1 + (steps if breaks in AT_ONCE else 5)
        assert "is not steered: its push at layer 1" in caplog.text
        assert isinstance(other[-1], Done) and list(other[-1].result.tokens) == expected


def test_one_layer_of_several_is_enough(tmp_path: Path) -> None:
    served = tiny.engine(tiny.bert(), tmp_path)

    def second_layer(patch: pytest.MonkeyPatch, _: DiffusionEngine) -> None:
        call = SteeringPlan.__call__
        patch.setattr(SteeringPlan, "__call__", lambda plan, at, hidden: hidden if at == 2 else call(plan, at, hidden))

    [events] = broken_after(served, 1, second_layer, STEERED)
    assert isinstance(events[-1], Failed) and "layer 2" in events[-1].message


def test_a_mandatory_push_that_is_lost_ends_the_row_before_anything_is_told(tmp_path: Path) -> None:
    served = tiny.engine(tiny.bert(), tmp_path)
    imposed = replace(PLAIN, interventions=(replace(PUSH, mandatory=True),))
    [events] = broken_after(served, 0, apply_does_nothing, imposed)
    assert [type(event) for event in events] == [Failed]


@pytest.mark.parametrize("cfg_scale", [0.0, 1.0])
def test_a_recorded_forward_that_does_not_steer_fails_its_rows(tmp_path: Path, cfg_scale: float) -> None:
    """Its sites run where no Python does: what they changed is told by buffers of the recording."""
    graphed = graphed_over(tiny.bert())
    served = tiny.engine(graphed, tmp_path)
    row = replace(STEERED, cfg_scale=cfg_scale)
    tiny.run(served, row)

    def replays_plainly(patch: pytest.MonkeyPatch, _: DiffusionEngine) -> None:
        patch.setattr(RecordedForward, "__call__", lambda _, layer, hidden: hidden)  # noqa: ARG005

    replays = graphed.replays
    [events] = broken_after(served, 2, replays_plainly, row)
    assert graphed.replays > replays
    assert isinstance(events[-1], Failed) and events[-1].unsteered
    [events] = broken_after(served, 2, lambda *_: None, row)
    assert isinstance(events[-1], Done)


@pytest.mark.parametrize("family", ["llada", "dream"])
@pytest.mark.parametrize("breaks", [*AT_ONCE, *AT_THE_END])
def test_a_worker_that_does_not_steer_fails_its_rows(tmp_path: Path, family: str, breaks: Break) -> None:
    model: DiffusionLM = getattr(tiny, family)()
    catalogue = tiny.catalogue(model, tmp_path)
    served = VllmEngine(
        model, tiny.tokenizer(), catalogue, EngineConfig(max_rows=8), FlatWorkers(model, catalogue.saes, 1)
    )
    mine, other = broken_after(served, 2, breaks, STEERED, replace(PLAIN, row=1))
    assert isinstance(mine[-1], Failed) and mine[-1].unsteered
    assert isinstance(other[-1], Done)


@pytest.mark.parametrize("written", [0, 12])
@pytest.mark.parametrize("breaks", [*AT_ONCE, *AT_THE_END])
def test_a_prompt_that_is_not_scored_under_its_pushes_fails_its_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, written: int, breaks: Break
) -> None:
    """The hook stops working when the response is written, where there is one, and the first places are scored."""
    served = tiny.engine(tiny.bert(), tmp_path, max_rows=2)
    asked = replace(PLAIN, prompt="the king won and lost", max_tokens=written, logprobs=True, prompt_logprobs=True)
    steered = replace(asked, interventions=(replace(PUSH, scope="all"), OTHER))
    requests = [served.admit(steered), served.admit(replace(asked, row=1))]
    served.add(requests)
    events: list[Event] = []
    while served.batcher.unfinished:
        events += served.step()
    breaks(monkeypatch, served)
    events += tiny.drain(served)
    [mine, other] = [[one for one in events if one.request_id == request.id] for request in requests]
    assert isinstance(mine[-1], Failed) and mine[-1].unsteered and "layer 1" in mine[-1].message
    assert isinstance(other[-1], Done) and other[-1].result.prompt is not None


@pytest.mark.parametrize(
    "interventions",
    [
        (replace(PUSH, strength=0.0),),
        (replace(PUSH, schedule={"type": "window", "start": 0.96, "stop": 0.99}),),
        (replace(PUSH, when={"progress": {"above": 1.0}}),),
        (replace(PUSH, scope="committed", schedule={"type": "window", "start": 0.0, "stop": 0.1}),),
        (replace(PUSH, strength=1e-30),),
        (PUSH, replace(PUSH, strength=-6.0)),
        (replace(PUSH, strength=6e5), replace(PUSH, strength=-6e5)),
        (replace(PUSH, op="cap", strength=1e6),),
        (Intervention(feature=FeatureRef("layer-1-mask", 0), op="multiply", strength=1.0),),
    ],
)
def test_what_nothing_was_due_of_is_no_failure(tmp_path: Path, interventions: tuple[Intervention, ...]) -> None:
    served = tiny.engine(tiny.bert(), tmp_path)
    [(request, result)] = tiny.run(served, replace(PLAIN, interventions=interventions))
    assert result.receipt is not None
    assert [one["applied"] for one in result.receipt["interventions"]] == [False] * len(interventions)
    assert request.response == tiny.tokens_of(served, PLAIN)


@pytest.mark.parametrize(
    "changes",
    [
        {"limits": Limits(max_delta=1e-12)},
        {"control": "random"},
        {"control": "sign_flip"},
        {"interventions": (replace(PUSH, scope="prompt"),), "prompt": ""},
        {"interventions": (PUSH, replace(PUSH, strength=-5.999999))},
        {"interventions": (replace(PUSH, op="project_out", strength=1.0, unit=None),) * 2},
    ],
)
def test_limits_controls_and_empty_scopes_are_no_failure(tmp_path: Path, changes: dict[str, Any]) -> None:
    served = tiny.engine(tiny.bert(), tmp_path)
    [(_, result)] = tiny.run(served, replace(STEERED, **changes))
    assert result.receipt is not None


def test_half_precision_loses_small_pushes_and_no_row(tmp_path: Path) -> None:
    served = tiny.engine(tiny.bert().bfloat16(), tmp_path)
    applied = []
    for strength in (1e-30, 1e-6, 1e-4, 1e-2, 1.0, 30.0):
        [(_, result)] = tiny.run(served, replace(PLAIN, interventions=(replace(PUSH, strength=strength),)))
        assert result.receipt is not None
        applied.append(result.receipt["interventions"][0]["applied"])
    assert (applied[0], applied[-1]) == (False, True)
