"""What goes wrong in one place stays there."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from steerserve.engine.api.events import Done, Failed
from steerserve.engine.api.params import GenerationParams, Intervention
from steerserve.engine.engine import MAX_FAILURES
from steerserve.errors import RequestError
from steerserve.models import Sites
from steerserve.models.families.bert import BertDiffusionLM
from tests import tiny

PLAIN = GenerationParams(prompt="the king", max_tokens=12, steps=6, seed=3)


class Faulty(BertDiffusionLM):
    """Raises at the forwards counted in `faults`."""

    faults: frozenset[int] = frozenset()
    forwards: int = 0

    def forward(
        self,
        tokens: Tensor,
        lengths: Tensor | None = None,
        sites: Sites | None = None,
        sigma: Tensor | None = None,
        at: Tensor | None = None,
    ) -> Tensor:
        self.forwards += 1
        if self.forwards in self.faults:
            raise RuntimeError("out of something")
        return super().forward(tokens, lengths, sites, sigma, at)


def faulty(*faults: int) -> Faulty:
    model = Faulty(tiny.BERT)
    tiny.randomise(model, 0)
    model.faults = frozenset(faults)
    return model


def test_a_step_that_fails_ends_its_rows_and_the_waiting_ones_run(tmp_path: Path) -> None:
    served = tiny.engine(faulty(2), tmp_path, max_rows=2)
    requests = [served.admit(replace(PLAIN, seed=i)) for i in range(4)]
    served.add(requests)
    events = tiny.drain(served)
    assert sorted(tiny.terminal(events)) == sorted(request.id for request in requests)
    assert [e.request_id for e in events if isinstance(e, Failed)] == [request.id for request in requests[:2]]
    alone = tiny.tokens_of(tiny.engine(tiny.bert(), tmp_path / "other"), replace(PLAIN, seed=3))
    assert requests[3].response == alone


def test_an_engine_that_fails_again_and_again_gives_up(tmp_path: Path) -> None:
    served = tiny.engine(faulty(*range(1, 100)), tmp_path, max_rows=1)
    served.add([served.admit(PLAIN) for _ in range(MAX_FAILURES)])
    for _ in range(MAX_FAILURES - 1):
        assert any(isinstance(event, Failed) for event in served.step())
    with pytest.raises(RuntimeError, match="out of something"):
        served.step()


@pytest.mark.parametrize("context", [90, 15, 17])
def test_a_canvas_may_fill_a_context_that_is_no_multiple_of_the_tile(tmp_path: Path, context: int) -> None:
    served = tiny.engine(tiny.bert(max_position_embeddings=context), tmp_path)
    params = replace(PLAIN, max_tokens=context - 3, steps=3, ignore_eos=True)
    [(request, result)] = tiny.run(served, params)
    assert len(request.canvas) == context
    assert len(result.tokens) == context - 3


def test_an_idle_engine_runs_nothing_and_holds_no_batch(tmp_path: Path) -> None:
    served = tiny.engine(tiny.bert(), tmp_path)
    tiny.run(served, PLAIN)
    assert served.running == []
    assert served.batches == []


def test_a_request_larger_than_the_queue_is_wrong_and_not_early(tmp_path: Path) -> None:
    served = tiny.engine(tiny.bert(), tmp_path, max_queue=2)
    with pytest.raises(RequestError, match="3 rows, but the queue holds 2"):
        served.add([served.admit(PLAIN) for _ in range(3)])
    assert not served.waiting


def test_an_attributes_strength_is_in_its_own_norm_whatever_else_is_loaded(tmp_path: Path) -> None:
    served = tiny.engine(tiny.bert(), tmp_path)
    loud = dict(served.catalogue.residual_norms) | {1: 60.0}
    served.catalogue = replace(served.catalogue, residual_norms=loud)
    request = served.admit(replace(PLAIN, interventions=(Intervention(attribute="topic/sports", strength=0.5),)))
    assert request.plan["interventions"][0]["sites"][0]["strength_hidden"] == pytest.approx(0.5 * 6.0)


@pytest.mark.parametrize(
    ("tokens", "steps", "transfer", "block"),
    [(10, 8, "linear", None), (64, 48, "linear", None), (8, 64, "linear", None), (32, 32, "cosine", None)]
    + [(24, 12, "linear", 8), (24, 12, "cosine", 12)],
)
def test_the_plan_predicts_the_strengths_that_are_applied(
    tmp_path: Path, tokens: int, steps: int, transfer: str, block: int | None
) -> None:
    served = tiny.engine(tiny.bert(), tmp_path)
    push = Intervention(
        attribute="topic/sports", strength=0.2, schedule={"type": "window", "start": 0.0, "stop": 0.5}, scope="all"
    )
    params = replace(
        PLAIN, max_tokens=tokens, steps=steps, transfer=transfer, block_length=block, ignore_eos=True,
        interventions=(push,),
    )  # fmt: skip
    [(request, result)] = tiny.run(served, params)
    assert result.receipt is not None
    [one] = result.receipt["interventions"]
    predicted = request.plan["interventions"][0]["strength_per_step"]
    assert one["strength_per_step"] == pytest.approx(predicted)
    assert len(predicted) == result.forward_passes
    assert one["sites"][0]["steps_touched"] == sum(strength != 0 for strength in predicted)


@pytest.mark.parametrize("transfer", ["entropy_bound", {"type": "threshold", "value": 0.5}])
def test_strengths_that_depend_on_the_model_are_not_predicted(tmp_path: Path, transfer: Any) -> None:
    served = tiny.engine(tiny.bert(), tmp_path)
    push = Intervention(attribute="topic/sports", strength=0.2)
    [(request, result)] = tiny.run(served, replace(PLAIN, transfer=transfer, interventions=(push,)))
    assert request.plan["interventions"][0]["strength_per_step"] is None
    assert result.receipt is not None
    assert len(result.receipt["interventions"][0]["strength_per_step"]) == result.steps


def test_steering_that_touched_nothing_is_said_to_be_not_applied(tmp_path: Path) -> None:
    served = tiny.engine(tiny.bert(), tmp_path)
    missed = Intervention(
        attribute="topic/sports", strength=0.2, schedule={"type": "window", "start": 0.6, "stop": 0.9}
    )
    [(request, result)] = tiny.run(served, replace(PLAIN, max_tokens=8, steps=2, interventions=(missed,)))
    assert result.receipt is not None
    [one] = result.receipt["interventions"]
    assert one["applied"] is False
    assert one["notes"] == request.plan["interventions"][0]["notes"] != []
    [(_, result)] = tiny.run(served, replace(PLAIN, interventions=(replace(missed, schedule="uniform"),)))
    assert result.receipt is not None
    assert result.receipt["interventions"][0]["applied"] is True


def test_a_response_longer_than_the_steps_allowed_takes_what_there_are(tmp_path: Path) -> None:
    served = tiny.engine(tiny.bert(), tmp_path, max_steps=10)
    assert served.admit(replace(PLAIN, steps=None)).steps == 10
    assert served.admit(replace(PLAIN, steps=None, block_length=3)).steps == 8
    with pytest.raises(RequestError, match="steps must be a whole number from 1 to 10, got 11"):
        served.admit(replace(PLAIN, steps=11))


def test_a_prompt_that_is_no_unicode_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="prompt is not valid Unicode"):
        tiny.engine(tiny.bert(), tmp_path).admit(replace(PLAIN, prompt="a\udcff"))


def test_the_prompts_scope_ends_where_the_response_begins(tmp_path: Path) -> None:
    served = tiny.engine(tiny.bert(), tmp_path)
    push = Intervention(attribute="topic/sports", strength=0.2, schedule="uniform", scope="prompt")
    [(request, result)] = tiny.run(
        served, replace(PLAIN, suffix="the ship won", steps=1, ignore_eos=True, interventions=(push,))
    )
    assert result.receipt is not None
    assert result.receipt["interventions"][0]["sites"][0]["positions_touched"] == len(request.prompt_ids)


def test_a_row_whose_result_cannot_be_made_still_gets_its_answer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    served = tiny.engine(tiny.bert(), tmp_path)
    request = served.admit(PLAIN)
    served.add([request])

    def broken(*_: Any) -> str:
        raise RuntimeError("no text")

    monkeypatch.setattr(served, "_text", broken)
    events = tiny.drain(served)
    assert tiny.terminal(events) == [request.id]
    assert not any(isinstance(event, Done) for event in events)
