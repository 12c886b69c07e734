"""Memory may run out at any operation of a step: what is told is what was done, and what failed changes nothing."""

from collections.abc import Callable, Mapping
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.overrides import TorchFunctionMode

from steerserve.config import EngineConfig
from steerserve.engine.api.events import Committed, Event, Failed, Result, Revised, Trace
from steerserve.engine.api.params import GenerationParams, Intervention, Limits, TraceParams
from steerserve.engine.engine import DiffusionEngine, StepResult
from steerserve.engine.forward.batch import Batch
from steerserve.engine.request.request import Request
from steerserve.engine.runners.packed import PackedRunner
from steerserve.engine.runners.runner import ModelRunner
from steerserve.engine.vllm.engine import VllmEngine
from steerserve.models.families.llada import LladaDiffusionLM
from tests import tiny
from tests.engine import priced
from tests.engine.flat_workers import FlatWorkers

PLAIN = GenerationParams(prompt="the king", max_tokens=12, steps=8, temperature=1.0, ignore_eos=True)
PUSH = Intervention(attribute="topic/sports", strength=2.0, schedule="uniform")
ARCHAIC = Intervention(attribute="register/archaic", strength=2.0, schedule="uniform")
IDS = replace(PLAIN, prompt=(9, 10), steps=6, interventions=(PUSH,))
HALF = {"progress": {"at_least": 0.5}}
ABOVE = {"attribute": "register/archaic", "above": 0.0}
LOOP = {"type": "feedback", "gain": 2.0, "hold": 8.0, "lead": 0.25, "rate": 0.3, "release": 2}
EDITING = {"type": "joint_threshold", "value": 0.4, "editing_threshold": 0.1, "max_post_steps": 2}
REVISING = {"type": "remdm", "schedule": "cap", "eta": 0.4}


def far(folder: Path) -> DiffusionEngine:
    """An engine whose forward passes others make."""
    model = tiny.llada()
    catalogue = tiny.catalogue(model, folder)
    return VllmEngine(model, tiny.tokenizer(), catalogue, EngineConfig(), FlatWorkers(model, catalogue.saes))


ROWS: dict[str, tuple[Callable[[Path], DiffusionEngine], list[GenerationParams]]] = {
    "steered": (
        lambda folder: tiny.engine(tiny.bert(), folder),
        [
            replace(PLAIN, interventions=(PUSH,), order="sae_stability", trace=TraceParams(("topic/sports",), 3)),
            replace(PLAIN, row=1, interventions=(ARCHAIC,), limits=Limits(max_kl=0.05), max_tokens=8),
            replace(PLAIN, row=2, logprobs=True, top_logprobs=2, transfer="cosine", order="random", cfg_scale=0.5),
        ],
    ),
    "watched": (
        lambda folder: tiny.engine(tiny.bert(), folder),
        [
            replace(PLAIN, remask_when={"condition": HALF, "span": "response"}, interventions=(PUSH,)),
            replace(PLAIN, row=1, interventions=(replace(PUSH, when=ABOVE), ARCHAIC), measure_kl=True),
            replace(PLAIN, row=2, interventions=(replace(PUSH, schedule=LOOP),)),
        ],
    ),
    "priced": (
        lambda folder: priced.engine(tiny.llada(1), folder),
        [
            replace(IDS, limits=Limits(max_predicted_kl=0.01), transfer={"type": "threshold", "value": 0.3}, steps=12),
            replace(IDS, row=1, limits=Limits(max_kl=0.05, max_predicted_kl=0.02), max_tokens=24),
            replace(IDS, row=2, temperature=0.0),
        ],
    ),
    "revising": (
        lambda folder: tiny.engine(tiny.mdlm(), folder),
        [
            replace(PLAIN, prompt=(9, 10 + row), row=row, steps=12, transfer=REVISING, order="random")
            for row in range(3)
        ],
    ),
    "editing": (
        lambda folder: tiny.engine(tiny.bert(), folder),
        [
            replace(PLAIN, prompt=(9, 10 + row), row=row, max_tokens=6, transfer=EDITING, temperature=0.0)
            for row in range(2)
        ],
    ),
    "cached": (
        lambda folder: priced.engine(tiny.llada(1), folder),
        [
            replace(IDS, cache="dual", block_length=4, temperature=0.0),
            replace(IDS, row=1, cache="prefix", block_length=6, max_tokens=24, steps=8),
            replace(IDS, row=2, cache="dual", order="sae_stability", interventions=(PUSH, ARCHAIC)),
            replace(IDS, row=3, max_tokens=20, steps=8),
        ],
    ),
    "far": (
        far,
        [
            replace(IDS, order="sae_stability", interventions=(PUSH, ARCHAIC)),
            replace(IDS, row=1, interventions=(replace(PUSH, when=ABOVE),), trace=TraceParams(("topic/sports",), 2)),
            replace(IDS, row=2, logprobs=True, top_logprobs=2),
        ],
    ),
}


class Failing(TorchFunctionMode):
    """Counts the calls to torch, and raises at the one counted in `at`."""

    def __init__(self, at: int = 0) -> None:
        super().__init__()
        self.at, self.calls, self.counts = at, 0, True

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls += self.counts
        if self.calls == self.at and self.counts:
            raise torch.OutOfMemoryError("out of memory")
        return func(*args, **(kwargs or {}))


def rebuilt(events: list[Event], request: Request) -> list[int]:
    """The response as what was told builds it."""
    tokens = [tiny.MASK] * request.params.max_tokens
    for event in events:
        if isinstance(event, Committed) and event.request_id == request.id:
            for position, token in zip(event.positions, event.tokens, strict=True):
                assert tokens[position] == tiny.MASK, "committed twice"
                tokens[position] = token
        if isinstance(event, Revised) and event.request_id == request.id:
            for position in event.positions:
                assert tokens[position] != tiny.MASK, "revised without a token"
                tokens[position] = tiny.MASK
    return tokens


def told(result: Result) -> tuple[Any, ...]:
    """What a result says that does not name its row; shares of the state to the digits that do not depend on the rows
    beside it."""
    receipt = dict(result.receipt or {})
    ours = [one | {"sites": [_rounded(site) for site in one["sites"]]} for one in receipt.pop("interventions", [])]
    trace = [(one.step, one.progress, one.values) for one in result.trace]
    return replace(result, receipt=None, trace=()), receipt, ours, trace


def _rounded(site: dict[str, Any]) -> dict[str, Any]:
    return site | {name: pytest.approx(site[name]) for name in ("delta_ratio_mean", "delta_ratio_max")}


def state(value: Any) -> Any:
    """All that a value holds, to compare with later."""
    if isinstance(value, Tensor):
        return value.tolist()
    if is_dataclass(value) and not isinstance(value, type):
        return {field.name: state(getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, Mapping):
        return {key: state(one) for key, one in value.items()}
    return [state(one) for one in value] if isinstance(value, list | tuple) else value


class Subject:
    """An engine, rows that it runs, and what they come to where memory never runs out."""

    def __init__(self, engine: DiffusionEngine, asked: list[GenerationParams]) -> None:
        self.engine, self.asked = engine, asked
        self.calls: list[int] = []
        """Calls to torch that each step makes."""
        requests, events = self.start(), list[Event]()
        while engine.running or engine.waiting:
            with Failing() as counted:
                events += engine.step()
            self.calls.append(counted.calls)
        results = tiny.results(events)
        self.expected = [(one.response, told(results[one.id])) for one in requests]

    def start(self) -> list[Request]:
        """The rows, waiting."""
        requests = [self.engine.admit(params) for params in self.asked]
        self.engine.batcher.room = len(requests)
        self.engine.add(requests)
        return requests

    def check(self, step: int, at: int) -> None:
        """Let memory run out at one of the calls of a step."""
        engine, requests, events = self.engine, self.start(), list[Event]()
        for _ in range(step):
            events += engine.step()
        with pytest.MonkeyPatch.context() as patch, Failing(at) as memory:
            patch.setattr(engine, "_run", changing_nothing(engine._run, memory))
            events += engine.step()
        events += tiny.drain(engine)
        results = tiny.results(events)
        assert sorted(tiny.terminal(events)) == sorted(one.id for one in requests)
        # A row that runs alone when memory runs out ends there.
        assert len(results) >= len(requests) - 1
        for request, (response, result) in zip(requests, self.expected, strict=True):
            assert rebuilt(events, request) == request.response
            if request.id in results:
                assert request.response == response
                assert told(results[request.id]) == result
            steps = [one.step for one in events if isinstance(one, Trace) and one.request_id == request.id]
            assert len(steps) == len(set(steps))


def changing_nothing(run: Callable[..., StepResult], memory: Failing) -> Callable[..., StepResult]:
    """`DiffusionEngine._run`, checked to leave rows, canvases, receipts and caches as they are where it fails."""

    def now(batch: Batch, runner: ModelRunner) -> Any:
        memory.counts = False
        runner.flush()
        found = state(batch.requests), batch.canvas.tolist(), state(vars(batch.features))
        memory.counts = True
        return found

    def checked(batch: Batch, runner: ModelRunner) -> StepResult:
        before = now(batch, runner)
        try:
            return run(batch, runner)
        except torch.OutOfMemoryError:
            assert now(batch, runner) == before
            raise

    return checked


@pytest.fixture(scope="module", params=ROWS)
def subject(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Subject:
    build, asked = ROWS[request.param]
    return Subject(build(tmp_path_factory.mktemp("engine")), asked)


@settings(max_examples=12)
@given(data=st.data())
def test_a_step_that_does_not_fit_is_as_if_it_had_not_been_begun(subject: Subject, data: st.DataObject) -> None:
    step = data.draw(st.integers(0, len(subject.calls) - 1))
    subject.check(step, data.draw(st.integers(1, subject.calls[step])))


@pytest.mark.parametrize("method", ["forward", "head"])
def test_steering_may_change_behind_a_forward_that_did_not_fit(tmp_path: Path, method: str) -> None:
    served = priced.engine(tiny.llada(1), tmp_path)
    rows = [served.admit(replace(IDS, seed=seed)) for seed in range(2)]
    served.add(rows)
    plain, calls = getattr(LladaDiffusionLM, method), list[int]()

    def small(*given: Any) -> Tensor:
        calls.append(1)
        if len(calls) == 3:
            raise torch.OutOfMemoryError("out of memory")
        found: Tensor = plain(*given)
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LladaDiffusionLM, method, small)
        events = [event for _ in range(3) for event in served.step()]
    for row in rows:
        assert served.steer(row.id, served.admit(replace(row.params, interventions=(ARCHAIC,)))) == 2
    found = tiny.results(events + tiny.drain(served))
    for row in rows:
        receipt = found[row.id].receipt
        assert receipt is not None
        assert [len(one["strength_per_step"]) for one in receipt["interventions"]] == [
            found[row.id].forward_passes - 4,
            4,
        ]
        assert receipt["predicted_kl"] > 0


def test_a_row_that_has_ended_is_told_where_the_telling_did_not_fit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    served = tiny.engine(tiny.bert(), tmp_path)
    asked = [replace(PLAIN, max_tokens=4 * (1 + row), steps=4 * (1 + row)) for row in range(2)]
    alone = [tiny.tokens_of(served, params) for params in asked]
    flush, failures = PackedRunner.flush, [True]

    def failing(self: PackedRunner) -> None:
        if failures:
            failures.pop()
            raise torch.OutOfMemoryError("out of memory")
        flush(self)

    monkeypatch.setattr(PackedRunner, "flush", failing)
    found = tiny.run(served, *asked)
    assert not failures
    assert [(request.response, result.steps) for request, result in found] == [(alone[0], 4), (alone[1], 8)]


def test_where_memory_does_not_suffice_to_make_room_the_rows_end_and_not_the_engine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    served = tiny.engine(tiny.bert(), tmp_path)
    asked = [replace(PLAIN, row=row) for row in range(2)]
    requests = [served.admit(params) for params in asked]
    served.add(requests)
    served.step()
    with monkeypatch.context() as patch:
        for method in ("forward", "flush"):
            patch.setattr(PackedRunner, method, lambda *_: (_ for _ in ()).throw(torch.OutOfMemoryError()))
        events = served.step()
    assert [event for event in events if not isinstance(event, Committed)] == [
        Failed(request.id, "the step failed") for request in requests
    ]
    assert not served.running and not served.waiting
    assert all(result.finish_reason == "length" for _, result in tiny.run(served, *asked))


def test_a_row_that_went_away_ends_where_the_others_do_not_fit_any_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    served = tiny.engine(tiny.bert(), tmp_path)
    gone, stays = (served.admit(replace(PLAIN, row=row)) for row in range(2))
    served.add([gone, stays])
    served.step()
    served.abort(gone.id)
    with monkeypatch.context() as patch:
        patch.setattr(served, "batches_of", lambda _: (_ for _ in ()).throw(MemoryError()))
        assert [type(event) for event in served.step()] == [Failed, Failed]
    assert not served.waiting
    served.abort(gone.id)
    assert served.step() == []
