"""One by one, all together, joining late, beside rows that are aborted: the same tokens."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import pytest

from steerserve.engine.api.params import FeatureRef, GenerationParams, Intervention, Limits, TraceParams, VectorRef
from steerserve.engine.engine import DiffusionEngine
from steerserve.models import DiffusionLM
from tests import tiny
from tests.engine.loops import rounded

ORDERS: tuple[Any, ...] = (
    "random",
    "confidence",
    "margin",
    "entropy",
    "sae_stability",
    {"type": "sae_stability", "sae": "layer-1-mask", "weight": 0.9},
)
TRANSFERS: tuple[Any, ...] = (
    "linear",
    "cosine",
    {"type": "threshold", "value": 0.4},
    {"type": "entropy_bound", "value": 1.0},
)
SCHEDULES: tuple[Any, ...] = (
    None,
    "uniform",
    {"type": "window", "start": 0.1, "stop": 0.6},
    {"type": "piecewise", "preset": "ramp_down"},
)
SCOPES: tuple[Any, ...] = (None, "all", "prompt", "response", "masked", "committed", (0, 2))


def vector(random: Random) -> VectorRef:
    return VectorRef(random.randrange(3), tuple(random.gauss(0, 1) for _ in range(tiny.HIDDEN)))


def push(random: Random) -> Intervention:
    shared: dict[str, Any] = {"schedule": random.choice(SCHEDULES), "scope": random.choice(SCOPES)}
    match random.randrange(4):
        case 0:
            return Intervention(attribute="topic/sports", strength=random.uniform(-1, 2), **shared)
        case 1:
            kind: Any = random.choice(["sae", "diff_means"])
            op: Any = random.choice(["clamp", "cap"])
            return Intervention(attribute="register/archaic", op=op, strength=0.5, direction=kind, **shared)
        case 2:
            feature = FeatureRef(random.choice(["layer-1-mask", "layer-2-visible"]), random.randrange(1, tiny.FEATURES))
            op = random.choice(["add", "boost", "multiply", "project_out", "clamp"])
            return Intervention(feature=feature, op=op, strength=random.uniform(0.2, 1.5), **shared)
        case _:
            return Intervention(vector=vector(random), op="add", unit="raw", strength=random.uniform(1, 9), **shared)


def rows(seed: int, count: int = 32) -> list[GenerationParams]:
    """Rows that differ in everything a request may say."""
    random = Random(seed)
    made = []
    for i in range(count):
        block = random.choice([2, 3, 5, 8])
        blocks = random.choice([1, 2, 3])
        steps = blocks * random.randrange(1, 3 * block)
        made.append(
            GenerationParams(
                prompt=tuple(random.randrange(5, tiny.VOCAB) for _ in range(random.randrange(1, 40))),
                suffix=tuple(random.randrange(5, tiny.VOCAB) for _ in range(random.choice([0, 0, 4]))),
                max_tokens=block * blocks,
                block_length=block,
                steps=steps,
                order=ORDERS[i % len(ORDERS)],
                transfer=TRANSFERS[i // 2 % len(TRANSFERS)],
                temperature=random.choice([0.0, 0.5, 1.0, 2.0]),
                top_p=random.choice([1.0, 1.0, 0.8]),
                seed=random.randrange(4),
                row=i,
                ignore_eos=random.random() < 0.5,
                logprobs=random.random() < 0.5,
                stop=("king",) if i % 5 == 0 else (),
                interventions=tuple(push(random) for _ in range(random.choice([0, 1, 1, 2, 3]))),
                trace=TraceParams(("register/archaic", "topic/sports"), positions=i % 2 == 0) if i % 7 == 3 else None,
            )
        )
    return made


def told(served: DiffusionEngine, params: GenerationParams) -> tuple[Any, ...]:
    """All that a row says when it runs alone."""
    [(request, result)] = tiny.run(served, params)
    return request.response, result.tokens, result.text, result.steps, result.finish_reason, result.receipt


MODELS = pytest.mark.parametrize("family", ["bert", "llada", "lladamoe", "a2d-qwen3", "modernbert", "gpt2"])


def build(family: str) -> DiffusionLM:
    own = {"bert": tiny.bert, "llada": tiny.llada, "lladamoe": tiny.lladamoe}
    return own[family](5) if family in own else tiny.huggingface(family, 5)


def assert_alike(served: DiffusionEngine, got: Sequence[tuple[Any, Any]]) -> None:
    for request, result in got:
        said = (
            request.response,
            result.tokens,
            result.text,
            result.steps,
            result.finish_reason,
            rounded(result.receipt),
        )
        assert told(served, request.params) == said, request.params


@MODELS
def test_one_by_one_and_all_together(tmp_path: Path, family: str) -> None:
    served = tiny.engine(build(family), tmp_path)
    asked = [replace(one, limits=Limits(max_kl=0.05)) if i % 4 == 1 else one for i, one in enumerate(rows(1))]
    got = tiny.run(served, *asked)
    assert len({tuple(request.response) for request, _ in got}) > 28
    assert any(result.forward_passes > result.steps for _, result in got)
    assert_alike(served, got)


@MODELS
def test_receipts_traces_and_logprobs_are_those_of_the_row_alone(tmp_path: Path, family: str) -> None:
    served = tiny.engine(build(family), tmp_path)
    for request, together in tiny.run(served, *rows(2, 16)):
        [(_, alone)] = tiny.run(served, request.params)
        # Sums of ratios are added up in another order; everything else is equal.
        assert alone.receipt == rounded(together.receipt)
        assert together.logprobs == alone.logprobs
        assert together.trace == tuple(replace(t, request_id=together.trace[0].request_id) for t in alone.trace)


@pytest.mark.parametrize("seed", [3, 4])
def test_rows_that_join_at_different_steps(tmp_path: Path, seed: int) -> None:
    served = tiny.engine(build("bert"), tmp_path, max_rows=12)
    random = Random(seed)
    requests = [served.admit(params) for params in rows(seed)]
    pending, events = list(requests), []
    while pending or served.waiting or served.running:
        for _ in range(min(len(pending), random.randrange(4))):
            served.add([pending.pop()])
        events += served.step()
    found = tiny.results(events)
    assert_alike(served, [(request, found[request.id]) for request in requests])


def test_rows_beside_aborted_ones(tmp_path: Path) -> None:
    served = tiny.engine(build("bert"), tmp_path)
    requests = [served.admit(params) for params in rows(6)]
    served.add(requests)
    events = []
    for step, request in enumerate(requests[::3]):
        if step % 2:
            served.abort(request.id)
        events += served.step()
    events += tiny.drain(served)
    assert sorted(tiny.terminal(events)) == sorted(request.id for request in requests)
    found = tiny.results(events)
    assert len(found) < len(requests)
    assert_alike(served, [(request, found[request.id]) for request in requests if request.id in found])


def test_rows_in_another_order(tmp_path: Path) -> None:
    served = tiny.engine(build("bert"), tmp_path)
    asked = rows(7)
    forth = {request.params.row: request.response for request, _ in tiny.run(served, *asked)}
    back = {request.params.row: request.response for request, _ in tiny.run(served, *reversed(asked))}
    assert forth == back


def test_the_rows_reach_steps_that_commit_nothing() -> None:
    """Otherwise the tests above would not show that such steps are harmless."""
    assert any(
        params.transfer == "cosine" and params.steps is not None and params.steps > 2 * params.max_tokens
        for params in rows(1)
    )
