"""Memory may run out at any operation of a step: what was told is what was done, and rows come out the same."""

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode

from steerserve.engine.api.events import Committed, Event, Failed, Result, Revised, Trace
from steerserve.engine.api.params import GenerationParams, Intervention, Limits, TraceParams
from steerserve.engine.engine import DiffusionEngine
from steerserve.engine.request.request import Request
from steerserve.engine.runners.packed import PackedRunner
from steerserve.models import DiffusionLM
from tests import tiny

PLAIN = GenerationParams(prompt="the king", max_tokens=12, steps=8, temperature=1.0, ignore_eos=True)
PUSH = Intervention(attribute="topic/sports", strength=2.0, schedule="uniform")
PRICED = Intervention(attribute="register/archaic", strength=2.0, schedule="uniform")
HALF = {"progress": {"at_least": 0.5}}
REVISING = {"type": "remdm", "schedule": "cap", "eta": 0.4}

ROWS: dict[str, tuple[Callable[[], DiffusionLM], list[GenerationParams]]] = {
    "steered": (
        tiny.bert,
        [
            replace(PLAIN, interventions=(PUSH,), order="sae_stability", trace=TraceParams(("topic/sports",), 3)),
            replace(PLAIN, row=1, interventions=(PRICED,), limits=Limits(max_kl=0.5), max_tokens=8),
            replace(PLAIN, row=2, logprobs=True, top_logprobs=2, transfer="cosine", order="random", cfg_scale=0.5),
        ],
    ),
    "rewritten": (
        tiny.bert,
        [
            replace(PLAIN, remask_when={"condition": HALF, "span": "response"}, interventions=(PUSH,)),
            replace(PLAIN, row=1, interventions=(replace(PUSH, when=HALF),)),
            replace(
                PLAIN, row=2, interventions=(PRICED,), limits=Limits(max_predicted_kl=0.3), transfer="entropy_bound"
            ),
        ],
    ),
    "revising": (
        tiny.mdlm,
        [
            replace(PLAIN, prompt=(9, 10 + row), row=row, steps=12, transfer=REVISING, order="random")
            for row in range(3)
        ],
    ),
    "cached": (
        tiny.llada,
        [
            replace(PLAIN, prompt=(9, 10), cache="dual", block_length=4, steps=6, interventions=(PUSH,)),
            replace(PLAIN, prompt=(9, 11), cache="prefix", block_length=6, steps=6),
            replace(PLAIN, prompt=(9, 12), row=1, max_tokens=20, steps=8),
        ],
    ),
}
SPOTS = 8
"""Calls of a run at which memory runs out, each in a run of its own."""
KINDS = pytest.mark.parametrize("kind", list(ROWS))


class Failing(TorchFunctionMode):
    """Counts the calls to torch, and raises at those counted in `at`."""

    def __init__(self, *at: int) -> None:
        super().__init__()
        self.at, self.calls = frozenset(at), 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls += 1
        if self.calls in self.at:
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


def run(served: DiffusionEngine, asked: list[GenerationParams], *at: int) -> tuple[list[Request], list[Event], int]:
    """Requests and events of a run in which memory runs out at these of its calls to torch; how many calls it made."""
    requests = [served.admit(params) for params in asked]
    served.batcher.room = len(asked)
    served.add(requests)
    with Failing(*at) as calls:
        events = tiny.drain(served)
    return requests, events, calls.calls


def check_told(
    requests: list[Request], events: list[Event], expected: list[tuple[list[int], tuple[Any, ...]]], at: int
) -> None:
    """What was told of a run in which memory ran out at this call is what was done, and what would have been else."""
    assert sorted(tiny.terminal(events)) == sorted(one.id for one in requests), at
    results = tiny.results(events)
    # A row that runs alone when memory runs out ends there.
    assert len(results) >= len(requests) - 1, at
    for request, (response, result) in zip(requests, expected, strict=True):
        assert rebuilt(events, request) == request.response, at
        if request.id in results:
            assert request.response == response, at
            assert told(results[request.id]) == result, at


@KINDS
def test_what_was_told_is_what_was_done_wherever_memory_runs_out(tmp_path: Path, kind: str) -> None:
    build, asked = ROWS[kind]
    served = tiny.engine(build(), tmp_path, max_rows=8)
    requests, events, calls = run(served, asked)
    expected = [(request.response, told(tiny.results(events)[request.id])) for request in requests]
    for at in range(1 + calls // 50, calls, calls // SPOTS):
        requests, events, _ = run(served, asked, at)
        check_told(requests, events, expected, at)
        for request in requests:
            steps = Counter(one.step for one in events if isinstance(one, Trace) and one.request_id == request.id)
            assert set(steps.values()) <= {1}, at


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
