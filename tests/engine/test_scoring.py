"""Log-probabilities of prompts equal the model's own, a masked position at a time, computed straight."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from steerserve.engine.api.events import Done, Failed, Result, Scored
from steerserve.engine.api.params import GenerationParams, Intervention, Limits, Refine
from steerserve.engine.engine import DiffusionEngine
from steerserve.engine.request.request import Request
from steerserve.errors import RequestError
from tests import tiny

ASKED = GenerationParams(
    prompt="the king won and lost the match",
    max_tokens=0,
    logprobs=True,
    top_logprobs=3,
    prompt_logprobs=True,
)
PUSH = Intervention(vector=None, attribute="register/archaic", strength=0.3, scope="all", schedule="uniform")


def straight(served: DiffusionEngine, prompt: tuple[int, ...], place: int) -> torch.Tensor:
    """Log-probabilities [vocabulary] at one masked place of a prompt, on a canvas of its own."""
    model = served.model
    canvas = torch.tensor([prompt])
    canvas[0, place] = tiny.MASK
    sigma = None if model.facts.sigma is None else model.facts.sigma.total(torch.ones(1, dtype=torch.float64)).float()
    states = model(canvas, None, None, sigma) if sigma is not None else model(canvas)
    logits = model.head(states[0, max(0, place - model.facts.shift)][None]).float()[0]
    logits[tiny.MASK] = -torch.inf
    return logits.double().log_softmax(0)


def scores(result: Result) -> list[float | None]:
    assert result.prompt is not None
    return [None if one is None else one.logprob for one in result.prompt]


@pytest.mark.parametrize("family", ["bert", "llada", "dream", "mdlm"])
def test_each_is_the_models_own_of_the_masked_token(tmp_path: Path, family: str) -> None:
    served = tiny.engine(getattr(tiny, family)(), tmp_path)
    [(request, result)] = tiny.run(served, ASKED)
    first = served.model.facts.bos_id is not None
    assert result.prompt is not None and len(result.prompt) == len(request.prompt_ids)
    assert result.prompt[: first + 1] == (None,) * (first + 1)
    for place, one in list(enumerate(result.prompt))[first + 1 :]:
        with torch.inference_mode():
            expected = straight(served, request.prompt_ids, place)
        assert one is not None and one.token == request.prompt_ids[place]
        assert one.logprob == pytest.approx(float(expected[one.token]), abs=1e-4)
        values, ids = expected.topk(3)
        assert [token for token, _ in one.top_logprobs] == ids.tolist()
        assert [value for _, value in one.top_logprobs] == pytest.approx(values.tolist(), abs=1e-4)
        # Whether the token is the likeliest is told by equality, as harnesses ask for it.
        assert (one.logprob == one.top_logprobs[0][1]) == (one.token == one.top_logprobs[0][0])
    assert (result.steps, result.text, result.tokens, result.finish_reason) == (0, "", (), "length")
    assert result.forward_passes == len(request.prompt_ids) - first - 1 == request.plan["prompt_passes"]


def alone(served: DiffusionEngine, request: Request, place: int) -> float:
    """What a response of one token in that place is given at its only step."""
    ids = request.prompt_ids[1:]
    one = replace(ASKED, prompt=ids[: place - 1], suffix=ids[place:], max_tokens=1, prompt_logprobs=False)
    one = replace(one, top_logprobs=tiny.VOCAB, interventions=request.params.interventions, ignore_eos=False)
    [(_, result)] = tiny.run(served, one)
    assert result.top_logprobs is not None
    return dict(result.top_logprobs[0])[request.prompt_ids[place]]


def test_the_rows_own_pushes_are_in_them(tmp_path: Path) -> None:
    served = tiny.engine(replace_nothing_forbidden(tiny.bert()), tmp_path)
    [(_, plain), (request, pushed)] = tiny.run(served, ASKED, replace(ASKED, interventions=(PUSH,)))
    assert scores(plain) != scores(pushed)
    [(_, imposed)] = tiny.run(served, replace(ASKED, interventions=(replace(PUSH, mandatory=True),)))
    assert scores(imposed) == scores(pushed)
    for place in (2, 4, len(request.prompt_ids) - 1):
        one = (pushed.prompt or ())[place]
        assert one is not None and one.logprob == pytest.approx(alone(served, request, place), abs=1e-4)
    assert plain.receipt is None and pushed.receipt is not None
    told = pushed.receipt["prompt"]
    length = len(request.prompt_ids)
    assert told == {"forward_passes": length - 2, "positions_touched": (length - 2) * length * len(pushes(request))}


def test_a_receipt_of_scores_alone_has_the_pushes_that_they_were_made_under(tmp_path: Path) -> None:
    served = tiny.engine(tiny.bert(), tmp_path, max_rows=3)
    off = replace(PUSH, attribute="topic/sports", scope="committed")
    asked = replace(ASKED, interventions=(PUSH, off), transfer={"type": "threshold", "value": 0.5})
    [(request, result), (_, plain)] = tiny.run(served, asked, replace(asked, interventions=()))
    told, passes, length = result.receipt, request.plan["prompt_passes"], len(request.prompt_ids)
    assert plain.receipt is None and told is not None
    on, other = told["interventions"]
    assert (on["applied"], other["applied"]) == (True, False)
    assert [site["positions_touched"] for site in on["sites"]] == [passes * length] * 2
    assert [site["steps_touched"] for site in on["sites"]] == [passes] * 2
    assert all(0 < site["delta_ratio_mean"] <= site["delta_ratio_max"] for site in on["sites"])
    assert told["prompt"] == {"forward_passes": passes, "positions_touched": 2 * passes * length}
    assert (told["steps"], told["forward_passes"], told["approximate"]) == (0, 0, [])
    assert (told["predicted_kl"], told["measured_kl"], on["predicted_kl"], told["reads"]) == (None, None, None, None)
    fed = replace(PUSH, attribute="topic/sports", strength=0.3, scope=None, schedule={"type": "feedback"})
    [(_, result)] = tiny.run(served, replace(ASKED, interventions=(PUSH, fed)))
    assert result.receipt is not None and result.receipt["reads"] is None
    assert result.receipt["interventions"][1]["applied"] and "feedback" not in result.receipt["interventions"][1]


def test_every_receipt_tells_the_forward_passes_of_the_prompt(tmp_path: Path) -> None:
    """Also of a row that pushes nothing, and has a receipt for something else."""
    served = tiny.engine(tiny.bert(), tmp_path)
    writes = replace(ASKED, max_tokens=6, seed=5)
    never = {"progress": {"above": 1.0}}
    for asked in (replace(writes, abort_when=never), replace(writes, transfer={"type": "threshold", "value": 0.5})):
        [(request, result)] = tiny.run(served, asked)
        assert result.receipt is not None
        passes = request.plan["prompt_passes"]
        assert result.receipt["prompt"] == {"forward_passes": passes, "positions_touched": 0}
        assert result.receipt["forward_passes"] + passes == result.forward_passes


def pushes(request: Request) -> list[Any]:
    return [push for one in request.interventions for push in one.pushes]


def replace_nothing_forbidden(model: Any) -> Any:
    model.facts = replace(model.facts, forbidden_ids=(tiny.MASK,))
    return model


def test_chunks_change_nothing_and_other_rows_go_on(tmp_path: Path) -> None:
    model = tiny.bert()
    wide, narrow = tiny.engine(model, tmp_path), tiny.engine(model, tmp_path, max_rows=2)
    writes = replace(ASKED, max_tokens=6, ignore_eos=True, seed=5)
    plain = replace(writes, prompt_logprobs=False)
    [(_, one), (_, two)] = tiny.run(wide, ASKED, writes)
    assert scores(one) == scores(two)
    rows = [narrow.admit(params) for params in (ASKED, writes, plain)]
    narrow.add(rows)
    events = tiny.drain(narrow)
    found = tiny.results(events)
    assert [scores(found[row.id]) for row in rows[:2]] == [scores(one), scores(two)]
    assert found[rows[1].id].tokens == found[rows[2].id].tokens == two.tokens
    assert found[rows[1].id].forward_passes == found[rows[2].id].forward_passes + rows[1].plan["prompt_passes"]
    assert tiny.terminal(events).index(rows[2].id) < tiny.terminal(events).index(rows[1].id)


def test_what_cannot_be_scored_is_refused_by_field(tmp_path: Path) -> None:
    served = tiny.engine(tiny.bert(), tmp_path, max_steps=32)
    writes = replace(ASKED, max_tokens=4)
    for params, field in (
        (replace(writes, limits=Limits(max_delta=0.1)), "limits"),
        (replace(writes, cache="prefix"), "cache"),
        (replace(writes, cfg_scale=1.0), "cfg_scale"),
        (replace(ASKED, prompt=(7,) * 34), "prompt"),
        (replace(ASKED, refine=Refine(), verdicts=("register/archaic",)), "refine"),
        (replace(ASKED, measure_kl=True), "measure_kl"),
        (replace(ASKED, interventions=(Intervention(attribute="nobody", strength=1.0),)), "interventions[0].attribute"),
        (replace(writes, interventions=(replace(PUSH, scope=(1, 3)),)), "interventions[0].scope"),
        (replace(ASKED, max_tokens=-1), "max_tokens"),
    ):
        with pytest.raises(RequestError) as refused:
            served.admit(params)
        assert refused.value.param == field, refused.value
    assert served.admit(replace(ASKED, prompt=(7,) * 33)).plan["prompt_passes"] == 32


def test_prompts_without_a_token_to_score_end_at_once(tmp_path: Path) -> None:
    served = tiny.engine(tiny.bert(), tmp_path)
    for prompt in ((), (7,)):
        [(request, result)] = tiny.run(served, replace(ASKED, prompt=prompt))
        assert result.prompt == (None,) * len(request.prompt_ids) and result.forward_passes == 0
    with pytest.raises(RequestError, match="max_tokens must be a whole number from 1"):
        served.admit(replace(ASKED, prompt_logprobs=False))


def test_aborting_and_failing_ends_the_row_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    served = tiny.engine(tiny.bert(), tmp_path, max_rows=1)
    gone, stays = (served.admit(ASKED) for _ in range(2))
    served.add([gone, stays])
    served.step()
    served.abort(gone.id)
    events = tiny.drain(served)
    assert [type(event) for event in events] == [Failed, Done]
    assert events[0] == Failed(gone.id, "aborted", aborted=True)
    calls = 0

    def lost(*_: Any) -> Any:
        nonlocal calls
        calls += 1
        raise torch.OutOfMemoryError if calls < 3 else RuntimeError("secret detail")

    wide = tiny.engine(served.model, tmp_path)
    broken, writes = wide.admit(ASKED), wide.admit(replace(ASKED, max_tokens=4, prompt_logprobs=False))
    wide.add([broken, writes])
    monkeypatch.setattr("steerserve.engine.prompt_scoring.scores", lost)
    events = tiny.drain(wide)
    assert tiny.terminal(events).count(broken.id) == 1 and calls == 3
    assert Failed(broken.id, "the step failed") in events
    assert writes.id in tiny.results(events)


def test_the_end_token_is_told_beside_the_tokens(tmp_path: Path) -> None:
    served = tiny.engine(tiny.bert(), tmp_path)
    ended = 0
    for seed in range(20):
        asked = replace(ASKED, max_tokens=12, prompt_logprobs=False, temperature=2.0, seed=seed)
        [(request, result)] = tiny.run(served, asked)
        assert (result.end is not None) == (tiny.EOS in request.response)
        if result.end is not None:
            ended += 1
            place = request.response.index(tiny.EOS)
            assert result.end == Scored(tiny.EOS, request.logprobs[place], request.top_logprobs[place])
    assert ended
