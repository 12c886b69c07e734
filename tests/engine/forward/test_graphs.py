"""Recorded forwards against plain ones: on a CPU what is recorded simply runs again, over the same buffers."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from steerserve.config import EngineConfig
from steerserve.engine.admission.catalogue import Catalogue
from steerserve.engine.api.params import GenerationParams, Intervention, Limits, VectorRef
from steerserve.engine.engine import DiffusionEngine
from steerserve.engine.forward.graphs import graphed as graphs
from steerserve.engine.forward.graphs import recorded
from steerserve.engine.forward.graphs.graphed import GraphedLM, Recorder
from steerserve.engine.forward.graphs.recorded import GraphShape
from steerserve.engine.forward.packing import OVERHEAD
from steerserve.engine.request.request import Request
from steerserve.errors import SelfTestError
from steerserve.models import DiffusionLM
from steerserve.runtime.self_test import check_steering
from steerserve.steering.bounds import Bound
from steerserve.steering.plan import SteeringPlan
from steerserve.steering.push import Push
from tests import tiny
from tests.engine.alike import assert_alike
from tests.engine.forward.test_batch_invariance import rows
from tests.engine.mixed import mixed, row, watching

FAMILIES: dict[str, Callable[[], DiffusionLM]] = {
    "llada": tiny.llada,
    "dream": tiny.dream,
    "bert": tiny.bert,
    "mdlm": tiny.mdlm,
    "mdlm told the noise": lambda: tiny.mdlm(time_conditioning=True),
    "sedd": tiny.sedd,
    "a2d-qwen3": lambda: tiny.huggingface("a2d-qwen3"),
    "modernbert": lambda: tiny.huggingface("modernbert"),
}
EVERY_FAMILY = pytest.mark.parametrize("family", FAMILIES)
SCOPES: tuple[Any, ...] = (None, "all", "prompt", "response", "masked", "committed", (2, 7))


def again(work: Callable[[], None]) -> Callable[[], None]:
    return work


def graphed_over(model: DiffusionLM, recorder: Recorder = again) -> GraphedLM:
    return GraphedLM(model, recorder)


def along(layer: int, seed: int, **how: Any) -> Intervention:
    direction = torch.randn(tiny.HIDDEN, generator=torch.Generator().manual_seed(seed))
    fields: dict[str, Any] = {"strength": 6.0, "unit": "raw"} | how
    return Intervention(vector=VectorRef(layer, tuple(direction.tolist())), **fields)


def adding(count: int, seed: int = 0, **more: Any) -> list[GenerationParams]:
    """Rows that push by adding alone, all but a few of them; of many lengths, layers, scopes and schedules."""
    random, found = Random(seed), []
    late: dict[str, Any] = {"type": "window", "start": 0.3, "stop": 0.8}
    for i in range(count):
        pushes = tuple(
            along(layer, 10 * i + p, scope=random.choice(SCOPES), schedule=random.choice(["uniform", late]))
            for p, layer in enumerate(random.choices(range(3), k=random.choice([0, 1, 1, 2, 3])))
        )
        prompt = tuple(random.randrange(5, 90) for _ in range(random.randrange(1, 50)))
        new = random.choice([8, 16, 24])
        found.append(
            GenerationParams(
                prompt=prompt,
                max_tokens=new,
                steps=new // random.choice([1, 2, 4]),
                temperature=random.choice([0.0, 0.7]),
                seed=i,
                ignore_eos=i % 2 == 0,
                logprobs=i % 3 == 0,
                interventions=pushes,
                **more,
            )
        )
    return found


def both(model: DiffusionLM, folder: Path, **config: Any) -> tuple[DiffusionEngine, DiffusionEngine, GraphedLM]:
    """An engine over the model, and one over its recorded forwards."""
    graphed = graphed_over(model)
    return tiny.engine(model, folder / "plain", **config), tiny.engine(graphed, folder / "graphed", **config), graphed


@EVERY_FAMILY
def test_rows_of_many_lengths_and_pushes_say_the_same(tmp_path: Path, family: str) -> None:
    plain, served, graphed = both(FAMILIES[family](), tmp_path)
    ratios: dict[str, Any] = {"transfer": "euler", "order": "random"} if family == "sedd" else {}
    asked = adding(12, **ratios)
    expected = tiny.run(plain, *asked)
    assert len({tuple(request.response) for request, _ in expected}) > 8
    for (request, one), (other, result) in zip(tiny.run(served, *asked), expected, strict=True):
        assert request.response == other.response
        assert_alike(one, result)
    assert graphed.replays > 5


@pytest.mark.parametrize("family", ["llada", "dream", "bert"])
def test_rows_of_every_kind_say_the_same(tmp_path: Path, family: str) -> None:
    plain, served, graphed = both(FAMILIES[family](), tmp_path)
    limited = [replace(one, limits=Limits(max_kl=0.02)) for one in adding(2, 3)]
    twins = [*adding(3, 1), row(cfg_scale=1.0), row(measure_kl=True), *limited]
    for asked in (mixed(tiny.HIDDEN), watching(), rows(1, 12), twins):
        for (_, one), (_, other) in zip(tiny.run(served, *asked), tiny.run(plain, *asked), strict=True):
            assert_alike(one, other)
    assert graphed.replays


@pytest.mark.parametrize("family", ["llada", "dream", "bert"])
def test_rows_that_join_and_leave_say_the_same(tmp_path: Path, family: str) -> None:
    plain, served, graphed = both(FAMILIES[family](), tmp_path, max_rows=5)
    asked = adding(12, 2)
    said = []
    for engine in (plain, served):
        random, requests, events = Random(3), [engine.admit(params) for params in asked], []
        pending = list(requests)
        while pending or engine.waiting or engine.running:
            for _ in range(min(len(pending), random.randrange(3))):
                engine.add([pending.pop()])
            if len(pending) == 6 and not engine.aborted:
                engine.abort(engine.running[0].id if engine.running else pending[0].id)
            events += engine.step()
        found = tiny.results(events)
        said.append([(request.response, request.id in found) for request in requests])
    assert said[0] == said[1]
    assert graphed.replays > 10


def plan_of(pushes: list[list[Push]], length: int, progress: float = 0.0, **more: Any) -> SteeringPlan:
    plan = SteeringPlan(pushes, **more)
    scopes = torch.ones(len(pushes), 5, length, dtype=torch.bool)
    scopes[:, 3] = torch.arange(length) % 3 == 0
    plan.set_step(torch.full((len(pushes),), progress), scopes.to(more.get("device", "cpu")))
    return plan


def push(layer: int, seed: int, **changes: Any) -> Push:
    direction = tiny.unit(torch.randn(tiny.HIDDEN, generator=torch.Generator().manual_seed(seed)))
    fields: dict[str, Any] = {"op": "add", "strength": 5.0, "gains": torch.tensor([1.0, 0.0])} | changes
    return Push(layer=layer, direction=direction, **fields)


def canvas(count: int, length: int, seed: int = 0) -> Tensor:
    return torch.randint(5, tiny.VOCAB, (count, length), generator=torch.Generator().manual_seed(seed))


def sigmas(model: DiffusionLM, count: int) -> Tensor | None:
    return None if model.facts.sigma is None else torch.linspace(0.1, 0.9, count)


@EVERY_FAMILY
@torch.inference_mode()
def test_states_and_what_was_applied_are_those_of_the_plain_forward(family: str) -> None:
    model = FAMILIES[family]()
    graphed, tokens, lengths = graphed_over(model), canvas(3, 44), torch.tensor([44, 20, 31])
    sigma, inside = sigmas(model, 3), torch.arange(44) < lengths[:, None]
    for progress in (0.0, 0.9, 0.2):
        made = [[[push(1, 1, scope="masked"), push(2, 2)], [], [push(1, 3), push(1, 4), push(1, 5)]] for _ in range(2)]
        one, other = (plan_of(pushes, 44, progress) for pushes in made)
        states = graphed(tokens, lengths, one, sigma)
        assert states.shape == (3, 44, tiny.HIDDEN)
        torch.testing.assert_close(states[inside], model(tokens, lengths, other, sigma)[inside], rtol=1e-4, atol=1e-4)
        for plan in (one, other):
            plan.count()
            plan.flush()
        for ours, theirs in zip(sum(made[0], []), sum(made[1], []), strict=True):
            assert (ours.applied.positions, ours.applied.steps) == (theirs.applied.positions, theirs.applied.steps)
            assert ours.applied.gains == theirs.applied.gains
            assert ours.applied.ratio_sum == pytest.approx(theirs.applied.ratio_sum, rel=1e-4)
            assert ours.applied.ratio_max == pytest.approx(theirs.applied.ratio_max, rel=1e-4)
    assert graphed.replays == 3


@EVERY_FAMILY
@torch.inference_mode()
def test_a_row_without_a_push_has_the_bits_of_a_batch_without_any(family: str) -> None:
    model = FAMILIES[family]()
    graphed, tokens, sigma = graphed_over(model), canvas(3, 40), sigmas(model, 3)
    none = graphed(tokens, None, plan_of([[], [], []], 40), sigma)
    some = graphed(tokens, None, plan_of([[], [push(0, 1), push(2, 2)], []], 40), sigma)
    assert torch.equal(none[[0, 2]], some[[0, 2]])
    assert not torch.equal(none[1], some[1])
    # Pushed at no layer at this step: as if the plan had no pushes.
    assert torch.equal(none, graphed(tokens, None, plan_of([[], [push(0, 1)], []], 40, 0.9), sigma))


@torch.inference_mode()
def test_a_forward_leaves_the_states_of_the_one_before_alone() -> None:
    graphed = graphed_over(tiny.llada())
    first = graphed(canvas(2, 30, 1), None, plan_of([[push(1, 1)], []], 30))
    kept = first.clone()
    graphed(canvas(2, 33, 2), None, plan_of([[], [push(1, 2)]], 33))
    assert torch.equal(first, kept)


@torch.inference_mode()
def test_plans_that_take_turns_keep_their_own_steering() -> None:
    graphed, tokens = graphed_over(tiny.llada()), canvas(2, 30)
    one, other = plan_of([[push(1, 1)], []], 30), plan_of([[push(1, 2), push(1, 3)], [push(0, 4)]], 30)
    first = [graphed(tokens, None, plan) for plan in (one, other)]
    for plan, states in zip((one, other, one), (*first, first[0]), strict=True):
        assert torch.equal(graphed(tokens, None, plan), states)


def unfit() -> dict[str, tuple[list[list[Push]], dict[str, Any], int]]:
    """Pushes of one row, how the plan is made, and the length of the canvas, of what is not recorded."""
    return {
        "an operator that depends on the state": ([[push(1, 1, op="clamp")]], {}, 30),
        "a reading": ([[push(1, 1, op="read")]], {}, 30),
        "a bound": ([[push(1, 1, bound=Bound(0.1))]], {}, 30),
        "too many pushes": ([[push(1, seed) for seed in range(recorded.MOST_PUSHES + 1)]], {}, 30),
        "a layer that is kept": ([[push(1, 1)]], {"captures": frozenset({2})}, 30),
        "one that fits beside one that does not": ([[push(0, 1)], [push(1, 1, op="cap")]], {}, 30),
        "padding that costs more than launches": ([[push(1, 1)]] * 33, {}, 65),
        "too many rows": ([[push(1, 1)]] * (recorded.MOST_ROWS + 1), {}, 4),
    }


@pytest.mark.parametrize("what", unfit())
@torch.inference_mode()
def test_what_does_not_fit_is_left_to_the_plain_forward(what: str) -> None:
    model = tiny.llada()
    graphed, said = graphed_over(model), []
    for run in (graphed, model):
        pushes, more, length = unfit()[what]
        plan = plan_of(pushes, length, **more)
        said.append((run(canvas(len(pushes), length), None, plan), plan.readings().values(), plan.captured))
    assert graphed.replays == 0
    (states, read, kept), (expected, expected_read, expected_kept) = said
    assert torch.equal(states, expected) and list(read) == list(expected_read)
    assert kept.keys() == expected_kept.keys() and all(torch.equal(kept[one], expected_kept[one]) for one in kept)


def test_what_is_differentiated_or_read_by_others_is_not_recorded() -> None:
    model = tiny.llada()
    graphed, tokens = graphed_over(model), canvas(1, 30)
    assert torch.equal(graphed(tokens, None, plan_of([[]], 30)), model(tokens))
    with torch.inference_mode():
        assert torch.equal(graphed(tokens), model(tokens))
    assert graphed.replays == 0


@torch.inference_mode()
def test_those_used_last_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graphs, "KEPT", 2)
    made: list[Callable[[], None]] = []

    def counted(work: Callable[[], None]) -> Callable[[], None]:
        made.append(work)
        return work

    graphed = graphed_over(tiny.llada(), counted)
    for count, recordings in ((1, 1), (2, 2), (1, 2), (4, 3), (1, 3), (2, 4)):
        graphed(canvas(count, 30), None, plan_of([[push(1, 1)]] * count, 30))
        assert len(made) == recordings


@given(st.integers(1, 80), st.integers(1, 700), st.sampled_from([96, 512, 4096]))
def test_a_shape_holds_the_batch_and_wastes_little(count: int, width: int, longest: int) -> None:
    width = min(width, longest)
    shape = GraphShape.around(count, width, (1,), longest)
    if shape is None:
        # One or two rows are never padded with others; a third one is, which costs a whole canvas.
        assert count > 2 or count * width > recorded.MOST_TOKENS - OVERHEAD["cuda"]
        return
    assert count <= shape.rows <= recorded.MOST_ROWS and width <= shape.width <= longest
    assert shape.rows * shape.width <= min(recorded.MOST_TOKENS, count * width + OVERHEAD["cuda"])


# --- steering that a recording froze is found -----------------------------------------------------------------------


@EVERY_FAMILY
def test_the_self_test_goes_through_recorded_forwards(family: str) -> None:
    graphed = graphed_over(FAMILIES[family]())
    catalogue = Catalogue(graphed.facts, {}, {}, {}, graphed.defaults)
    check_steering(DiffusionEngine(graphed, tiny.tokenizer(), catalogue, EngineConfig()))
    assert graphed.replays == 1 + graphed.facts.num_layers


def once(work: Callable[[], None]) -> Callable[[], None]:
    """Records what the work came to, not the work."""
    work()
    return lambda: None


def test_a_recording_that_reads_no_buffer_is_refused_when_it_is_made(tmp_path: Path) -> None:
    with pytest.raises(SelfTestError, match="layer 0 did not move the states of a forward recorded for 2 x 64 tokens"):
        check_steering(tiny.engine(graphed_over(tiny.llada(), once), tmp_path))


class Elsewhere(GraphedLM):
    """Reads its canvas, but its steering from buffers that nobody writes to, as if a graph had kept the address of
    tensors that were replaced after its making."""

    def _recording(self, shape: GraphShape) -> Any:
        work, replay = super()._recording(shape)
        read = work.weights.clone().zero_()

        def frozen() -> None:
            written, work.weights = work.weights, read
            replay()
            work.weights = written

        return work, frozen


@pytest.mark.parametrize("family", ["llada", "dream", "bert"])
def test_a_recording_whose_steering_is_not_read_fails_the_self_test(tmp_path: Path, family: str) -> None:
    with pytest.raises(SelfTestError, match="layer 0 did not move the logits"):
        check_steering(tiny.engine(Elsewhere(FAMILIES[family](), again), tmp_path))


class Deaf(GraphedLM):
    """Records its last layer without its site."""

    def _recording(self, shape: GraphShape) -> Any:
        return super()._recording(replace(shape, layers=tuple(one for one in shape.layers if one != 2)))


def test_one_layer_without_its_site_fails_the_self_test(tmp_path: Path) -> None:
    with pytest.raises(SelfTestError, match="layer 2 did not move the logits"):
        check_steering(tiny.engine(Deaf(tiny.llada(), again), tmp_path))


def test_rows_of_a_recording_that_takes_no_steering_fail_and_are_never_answered(tmp_path: Path) -> None:
    served = tiny.engine(graphed_over(tiny.llada(), once), tmp_path)
    steered = served.admit(row(interventions=(along(1, 1),)))
    served.add([steered])
    events = served.step()
    assert tiny.terminal(events) == [steered.id] and not tiny.results(events)


class Reached(Exception):
    """The work was done."""


@EVERY_FAMILY
@torch.inference_mode()
def test_what_is_recorded_needs_no_values_on_the_host(family: str) -> None:
    """On the meta device there are none: anything that waits for a device, or whose shape depends on values, raises."""

    def reach(work: Callable[[], None]) -> Callable[[], None]:
        work()
        raise Reached

    model = FAMILIES[family]().to("meta")
    plan = SteeringPlan([[push(0, 1), push(0, 2)], [push(2, 3)]], "meta")
    plan.set_step(torch.zeros(2), torch.ones(2, 5, 30, dtype=torch.bool, device="meta"))
    sigma = None if model.facts.sigma is None else torch.ones(2, device="meta")
    tokens, lengths = (torch.ones(shape, dtype=torch.int64, device="meta") for shape in ((2, 30), (2,)))
    with pytest.raises(Reached):
        GraphedLM(model, reach)(tokens, lengths, plan, sigma)


def test_requests_are_steered_while_they_run(tmp_path: Path) -> None:
    said = []
    for served in both(tiny.llada(), tmp_path)[:2]:
        request: Request = served.admit(row(interventions=(along(1, 1),)))
        served.add([request])
        for _ in range(3):
            served.step()
        served.steer(request.id, served.admit(row(interventions=(along(2, 5, strength=9.0),))))
        tiny.drain(served)
        said.append(request.response)
    assert said[0] == said[1]
