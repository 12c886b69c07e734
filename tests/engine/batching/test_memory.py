"""Steps that do not fit into memory are split: nothing is lost, and nobody else's row fails."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from steerserve.engine.api.events import Failed
from steerserve.engine.api.params import GenerationParams, Intervention
from steerserve.models import Sites
from steerserve.models.families.bert import BertDiffusionLM
from tests import tiny

PLAIN = GenerationParams(prompt="the king", max_tokens=8, steps=4, temperature=1.0, ignore_eos=True)
PUSH = Intervention(attribute="topic/sports", strength=2.0, schedule="uniform")


class Small(BertDiffusionLM):
    """Takes so many rows of so many tokens at once, and no more."""

    tokens_that_fit = 10**9
    largest = 0

    def forward(
        self,
        tokens: Tensor,
        lengths: Tensor | None = None,
        sites: Sites | None = None,
        sigma: Tensor | None = None,
        at: Tensor | None = None,
    ) -> Tensor:
        if tokens.numel() > self.tokens_that_fit:
            raise torch.OutOfMemoryError("out of memory")
        self.largest = max(self.largest, tokens.shape[0])
        return super().forward(tokens, lengths, sites, sigma, at)


def small() -> Small:
    model = Small(tiny.BERT)
    tiny.randomise(model, 0)
    return model


def test_rows_that_do_not_fit_together_run_apart_and_come_out_the_same(tmp_path: Path) -> None:
    model = small()
    served = tiny.engine(model, tmp_path)
    asked = [replace(PLAIN, seed=seed, interventions=(PUSH,) if seed % 2 else ()) for seed in range(9)]
    alone = [tiny.tokens_of(served, params) for params in asked]
    model.tokens_that_fit, model.largest = 3 * 16, 0
    found = tiny.run(served, *asked)
    assert [request.response for request, _ in found] == alone
    assert model.largest <= 3
    assert all(result.steps == result.forward_passes == 4 for _, result in found)
    model.tokens_that_fit = 10**9
    assert [request.response for request, _ in tiny.run(served, *asked)] == alone
    assert model.largest == 9


def test_a_row_that_does_not_fit_alone_fails_and_its_neighbours_go_on(tmp_path: Path) -> None:
    model = small()
    served = tiny.engine(model, tmp_path)
    model.tokens_that_fit = 2 * 16
    large = [served.admit(replace(PLAIN, max_tokens=80, steps=5)) for _ in range(4)]
    little = [served.admit(replace(PLAIN, seed=seed)) for seed in range(4)]
    served.add([one for pair in zip(large, little, strict=True) for one in pair])
    events = tiny.drain(served)
    failed = {event.request_id: event for event in events if isinstance(event, Failed)}
    assert set(failed) == {request.id for request in large}
    assert {event.message for event in failed.values()} == {"out of memory"}
    assert set(tiny.results(events)) == {request.id for request in little}
    assert sorted(tiny.terminal(events)) == sorted(request.id for request in [*large, *little])


def test_a_batch_that_cannot_be_made_ends_its_rows_and_not_the_engine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    served = tiny.engine(small(), tmp_path)
    request = served.admit(PLAIN)
    served.add([request])
    with monkeypatch.context() as patch:
        patch.setattr("steerserve.engine.engine.Batch", lambda *_: 1 / 0)
        events = served.step()
    assert [type(event) for event in events] == [Failed]
    [(_, result)] = tiny.run(served, PLAIN)
    assert result.steps == 4
