"""Generations through vLLM are what the torch engine makes of the same checkpoint, tensor parallel or not."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from steerserve.engine.api.params import GenerationParams
from steerserve.engine.engine import DiffusionEngine
from steerserve.engine.forward.batch import Batch
from steerserve.engine.runners.packed import PackedRunner
from steerserve.engine.vllm.client import VllmClient
from steerserve.engine.vllm.engine import VllmEngine, first_logits
from steerserve.engine.vllm.reply import unpack
from steerserve.engine.vllm.runner import VllmRunner, vllm_batches
from steerserve.engine.vllm.task import RowTask, to_parameters
from steerserve.errors import SelfTestError
from steerserve.runtime.self_test import check_steering
from tests import tiny
from tests.engine.alike import assert_alike
from tests.engine.mixed import mixed, row, watching
from tests.vllm import made

STRENGTH = 10.0
CASES = {
    "llada": ("llada", 1, ()),
    # So few tokens a batch that a step of sixteen rows is made in several, at the borders that vLLM's scheduler finds.
    "llada in several batches": ("llada", 2, (f"max_num_batched_tokens={tiny.CONTEXT}",)),
    "dream": ("dream", 1, (f"max_num_batched_tokens={tiny.CONTEXT}",)),
    "dream on two ranks": ("dream", 2, ()),
}


@dataclass(frozen=True)
class Pair:
    """One checkpoint in both engines."""

    torch: DiffusionEngine
    vllm: VllmEngine


@pytest.fixture(scope="module", params=CASES)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    family, ranks, extra = CASES[request.param]
    folder = tmp_path_factory.mktemp("vllm")
    model, saes = made.write_model(folder / "model", family), made.write_saes(folder / "saes")
    engine = made.vllm_engine(model, saes, ranks, extra)
    yield Pair(made.torch_engine(model, saes), engine)
    engine.close()


def test_sixteen_rows_of_every_kind_are_what_the_torch_engine_makes(pair: Pair) -> None:
    rows = mixed(made.HIDDEN, STRENGTH)
    found = tiny.run(pair.vllm, *rows)
    for (_, one), (_, other) in zip(found, tiny.run(pair.torch, *rows), strict=True):
        assert_alike(one, other)
    assert found[0][1].tokens != found[1][1].tokens, "the steering makes no difference"


def test_conditions_and_readings_by_position_are_what_the_torch_engine_makes(pair: Pair) -> None:
    rows = watching(STRENGTH)
    found = tiny.run(pair.vllm, *rows)
    for (_, one), (_, other) in zip(found, tiny.run(pair.torch, *rows), strict=True):
        assert_alike(one, other)


def test_rows_that_join_and_leave_between_steps_are_the_same(pair: Pair) -> None:
    rows = mixed(made.HIDDEN, STRENGTH)[:6]
    told = []
    for engine in (pair.vllm, pair.torch):
        requests = [engine.admit(one) for one in rows]
        engine.add(requests[:3])
        events = engine.step()
        engine.abort(requests[0].id)
        engine.add(requests[3:][::-1])
        events += tiny.drain(engine)
        done = tiny.results(events)
        told.append([done[request.id] for request in requests[1:]])
    for one, other in zip(*told, strict=True):
        assert_alike(one, other)


def test_logits_agree_steered_or_not(pair: Pair) -> None:
    rows = mixed(made.HIDDEN, STRENGTH)[:8]
    reference, own = logits_of_torch(pair.torch, rows), logits_of_vllm(pair.vllm, rows)
    assert len(own) == len(reference)
    for expected, found in zip(reference, own, strict=True):
        torch.testing.assert_close(found.float(), expected, atol=1e-4, rtol=0)


def test_a_row_is_bit_for_bit_the_same_whether_or_not_its_neighbour_is_steered(pair: Pair) -> None:
    plain, beside = row(logprobs=True, top_logprobs=5), row(prompt="the team")
    steered = replace(beside, interventions=mixed(made.HIDDEN, STRENGTH)[2].interventions)
    [(_, one), (_, other)] = tiny.run(pair.vllm, plain, beside)
    [(_, again), (_, pushed)] = tiny.run(pair.vllm, plain, steered)
    assert again == one
    assert pushed.tokens != other.tokens


def test_strength_zero_is_no_steering(pair: Pair) -> None:
    pushes = tuple(replace(one, strength=0.0) for one in mixed(made.HIDDEN)[1].interventions)
    [(_, one), (_, other)] = tiny.run(pair.vllm, row(logprobs=True), row(logprobs=True, interventions=pushes))
    assert (one.tokens, one.logprobs) == (other.tokens, other.logprobs)


def test_the_self_test_passes_and_fails_once_the_sites_are_removed(pair: Pair) -> None:
    """The last test of an engine: nothing is steered in it any more."""
    check_steering(pair.vllm, first_logits)
    assert isinstance(pair.vllm.workers, VllmClient)
    pair.vllm.workers.call("remove_sites")
    with pytest.raises(SelfTestError, match="layer 0 did not move the logits"):
        check_steering(pair.vllm, first_logits)


def logits_of_torch(engine: DiffusionEngine, rows: list[GenerationParams]) -> list[Tensor]:
    """Logits [masked positions, vocabulary] of each row at its first step."""
    batch = Batch([engine.admit(one) for one in rows], engine.model.facts, engine.device, engine.dtype)
    runner = PackedRunner(batch, engine.model)
    row, position = batch.candidates()
    with torch.inference_mode():
        runner.begin()
        hidden = runner.forward()
        logits = engine.model.head(hidden[row, batch.state(position)])
    return [logits[row == i] for i in range(len(rows))]


def logits_of_vllm(engine: VllmEngine, rows: list[GenerationParams]) -> list[Tensor]:
    """The same: every token's log-probability, and the log of the mass by which it was divided."""
    vocabulary = engine.model.facts.vocab_size
    asked: list[RowTask] = []
    [(batch, runner)] = vllm_batches([engine.admit(one) for one in rows], engine.model.facts, engine.workers, set())
    assert isinstance(runner, VllmRunner)
    runner.begin()
    for task in runner.tasks(*batch.candidates()):
        asked.append(replace(task, needs=("mass",), alternatives=vocabulary, only=None))
    canvases = [request.canvas for request in batch.requests]
    sent = [to_parameters(task, {name: runner.vectors[name] for name in task.directions()}, []) for task in asked]
    replies = [
        unpack(data, task)
        for data, task in zip(engine.workers.run(list(zip(canvases, sent, strict=True))), asked, strict=True)
    ]
    return [torch.zeros_like(one.logprobs).scatter(1, one.tokens, one.logprobs) + one.measures for one in replies]
