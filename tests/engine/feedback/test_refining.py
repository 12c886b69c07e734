"""Texts that are bettered after their first draft, against rounds written down by hand, and beside all else rows do."""

import math
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from steerserve.engine.api.events import WORDLESS, Committed, Done, Event, Failed, Result, Revised, Steered
from steerserve.engine.api.params import GenerationParams, Intervention, Limits, Refine, TraceParams
from steerserve.engine.api.text import continuation
from steerserve.engine.api.variants import baseline_of
from steerserve.engine.engine import DiffusionEngine
from steerserve.engine.request.request import Request
from tests import tiny
from tests.engine.loops import rounded
from tests.engine.outputs.test_verdicts import ARCHAIC, by_hand, with_probe
from tests.engine.test_lost_memory import Subject, rebuilt

PLAIN = GenerationParams(
    prompt="the king",
    max_tokens=12,
    steps=6,
    seed=3,
    transfer="linear",
    ignore_eos=True,
    verdicts=(ARCHAIC,),
    refine=Refine(rounds=6, span=4),
)
PUSH = Intervention(attribute="topic/sports", strength=2.0, schedule="uniform", scope="masked")
LOOP: dict[str, Any] = {"type": "feedback", "gain": 2.0, "hold": 0.01, "lead": 0.25, "rate": 0.3, "release": 2}


@pytest.fixture
def served(tmp_path: Path) -> DiffusionEngine:
    return probed("bert", tmp_path)


def probed(family: str, folder: Path) -> DiffusionEngine:
    """An engine with a probe that is sure of little, so that scores can be told apart."""
    served = with_probe(getattr(tiny, family)(2), folder, 1)
    attributes = {
        name: replace(one, probe=replace(one.probe, weights=one.probe.weights / 8))
        for name, one in served.catalogue.attributes.items()
        if one.probe is not None
    }
    return DiffusionEngine(
        served.model, served.tokenizer, replace(served.catalogue, attributes=attributes), served.config
    )


def solo(served: DiffusionEngine, params: GenerationParams) -> tuple[Request, list[Event], Result, dict[str, Any]]:
    """A row alone: itself, its events, its result, and what its receipt says of its refinement."""
    request, events = tiny.solo(served, params)
    done = events[-1]
    assert isinstance(done, Done)
    assert done.result.receipt is not None
    return request, events, done.result, done.result.receipt["refined"]


def likelihood(log_odds: float) -> float:
    return -math.log1p(math.exp(-log_odds))


def drafts(events: list[Event], request: Request) -> list[tuple[list[int], list[int]]]:
    """The whole responses that a row's events come by: of each draft, and what was there once it had been judged."""
    found: dict[int, list[list[int]]] = {}
    for end, event in enumerate(events, 1):
        if isinstance(event, Committed) and event.request_id == request.id:
            tokens = rebuilt(events[:end], request)
            if tiny.MASK not in tokens:
                found.setdefault(event.step, []).append(tokens)
    return [(ones[0], ones[-1]) for ones in found.values()]


# by hand


def write(served: DiffusionEngine, canvas: list[int], push: Intervention | None) -> None:
    """Write what is masked of a canvas, the two surest tokens of each forward first."""
    model = served.model
    while model.facts.mask_id in canvas:
        masked = [place for place, token in enumerate(canvas) if token == model.facts.mask_id]
        opened = torch.tensor([token == model.facts.mask_id for token in canvas])[:, None]

        def site(layer: int, hidden: torch.Tensor, opened: torch.Tensor = opened) -> torch.Tensor:
            if push is None or layer != 1:
                return hidden
            attribute = served.catalogue.attributes["topic/sports"]
            size = (push.strength or 0.0) * attribute.sites[1].residual_norm
            return hidden + opened * size * attribute.directions[1, "sae"]

        hidden = model(torch.tensor([canvas]), None, site)
        logits = model.head(hidden)[0].double()
        logits[:, [*model.facts.forbidden_ids, *model.facts.end_ids]] = -math.inf
        best = logits.softmax(1).max(1)
        at = {place: place - model.facts.shift for place in masked}
        for place in sorted(masked, key=lambda place: -float(best.values[at[place]]))[:2]:
            canvas[place] = int(best.indices[at[place]])
            assert canvas[place] != model.facts.mask_id


@pytest.mark.parametrize(
    ("family", "push", "absent"),
    [
        ("bert", None, False),
        ("bert", PUSH, True),
        ("llada", None, True),
        ("llada", PUSH, False),
        ("dream", None, False),
    ],
)
def test_the_engine_does_what_straight_rounds_do(
    family: str, push: Intervention | None, absent: bool, tmp_path: Path
) -> None:
    served = probed(family, tmp_path)
    refine = Refine(rounds=8, span=5, absent=(ARCHAIC,) if absent else ())
    pushes = () if push is None else (push,)
    params = replace(PLAIN, temperature=0.0, order="confidence", refine=refine, interventions=pushes)
    request, events, result, receipt = solo(served, params)
    prompt, mask = list(request.prompt_ids), request.mask_id
    sign = -1 if absent else 1

    def score(canvas: list[int]) -> float:
        text = continuation(served.decode, tuple(prompt), canvas[len(prompt) :])
        return likelihood(sign * by_hand(served, text))

    with torch.inference_mode():
        canvas = [*prompt, *([mask] * 12)]
        write(served, canvas, push)
        found = [(canvas[len(prompt) :],) * 2]
        best = score(canvas)
        assert receipt["first_score"] == pytest.approx(best, abs=1e-4)
        for one in receipt["rounds"]:
            first, last = one["span"]
            assert last - first == 5
            tried = list(canvas)
            tried[len(prompt) + first : len(prompt) + last] = [mask] * 5
            write(served, tried, push)
            assert one["score"] == pytest.approx(score(tried), abs=1e-4)
            assert one["kept"] == (score(tried) > best + 1e-7)
            if one["kept"]:
                canvas, best = tried, score(tried)
            found.append((tried[len(prompt) :], canvas[len(prompt) :]))
    assert request.response == canvas[len(prompt) :]
    assert drafts(events, request) == found
    assert receipt["score"] == pytest.approx(best, abs=1e-4)
    # Five of twelve are written in the last three of six steps: two, two and one.
    assert result.steps == 6 + 8 * 3
    assert result.verdicts == pytest.approx({ARCHAIC: by_hand(served, result.text)}, abs=1e-4)


# what it tells

SAMPLERS: list[dict[str, Any]] = [
    {"order": "confidence", "temperature": 0.0},
    {"order": "random", "block_length": 4},
    {"order": "margin", "transfer": "cosine", "block_length": 6},
    {"order": "confidence", "transfer": {"type": "threshold", "value": 0.3}, "block_length": 4},
    {"order": "random", "transfer": {"type": "ddpm"}, "block_length": 6},
    {"order": "random", "transfer": "origin", "steps": 4},
    {"order": "sae_stability", "steps": 12},
    {"order": {"type": "sae_attribute", "attribute": "topic/sports"}, "block_length": 6},
    {"order": "random", "max_tokens": 10, "steps": 20, "block_length": 5},
    {"order": "random", "steps": 8, "suffix": "and then", "refine": Refine(rounds=6, span=1)},
    {"transfer": {"type": "entropy_bound", "value": 1.0}, "refine": Refine(rounds=6)},
    {"transfer": "linear", "block_length": 1, "steps": 12, "refine": Refine(rounds=3, span=12)},
]


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_round_changes_its_stretch_alone_and_is_kept_where_the_text_is_better(
    served: DiffusionEngine, sampler: dict[str, Any]
) -> None:
    params = replace(PLAIN, temperature=1.0, logprobs=True, top_logprobs=2)
    params = replace(params, **sampler)
    assert params.refine is not None
    request, events, result, receipt = solo(served, params)
    (best, _), *others = drafts(events, request)
    assert best == tiny.tokens_of(served, replace(params, refine=None))

    def score(tokens: list[int]) -> float:
        return likelihood(by_hand(served, continuation(served.decode, request.prompt_ids, tokens)))

    assert receipt["first_score"] == pytest.approx(score(best), abs=1e-4)
    scores = [receipt["first_score"]]
    for one, (draft, left) in zip(receipt["rounds"], others, strict=True):
        first, last = one["span"]
        assert 0 <= first < last <= params.max_tokens
        assert last - first == (params.refine.span or 4)
        assert draft[:first] + draft[last:] == best[:first] + best[last:]
        assert one["score"] == pytest.approx(score(draft), abs=1e-4)
        assert one["kept"] == (one["score"] > max(scores))
        scores.append(one["score"])
        best = draft if one["kept"] else best
        assert left == best
    assert rebuilt(events, request) == request.response == list(result.tokens) == best
    assert len(receipt["rounds"]) == params.refine.rounds
    assert receipt["kept"] == sum(one["kept"] for one in receipt["rounds"])
    assert receipt["score"] == max(scores)
    assert receipt["judging_passes"] == params.refine.rounds + 1
    assert result.receipt is not None
    assert result.forward_passes == result.receipt["forward_passes"] + receipt["judging_passes"]
    ending = request.blocks if request.transfer.ending != "none" else 0
    assert result.steps <= request.plan["max_steps"] + ending
    assert request.steps_left == 0
    assert (request.plan["revises"], request.plan["revised_within"]) == (True, params.max_tokens)
    last_said = {
        position: value
        for event in events
        if isinstance(event, Committed) and event.logprobs is not None
        for position, value in zip(event.positions, event.logprobs, strict=True)
    }
    assert result.logprobs == tuple(last_said[i] for i in range(params.max_tokens))
    assert result.top_logprobs is not None
    told_steps = [one.step for one in events if isinstance(one, Committed | Revised)]
    assert told_steps == sorted(told_steps)
    assert told_steps[-1] < result.steps


def test_rounds_try_and_keep_something(served: DiffusionEngine) -> None:
    """Else what is said of them here says nothing."""
    found = [solo(served, replace(PLAIN, seed=seed))[3] for seed in range(4)]
    assert 0 < sum(one["kept"] for one in found) < 4 * 6
    assert len({tuple(one["span"]) for receipt in found for one in receipt["rounds"]}) > 4
    assert all(one["score"] > one["first_score"] for one in found if one["kept"])


@pytest.mark.parametrize(
    ("family", "revising", "order"),
    [
        ("bert", {"type": "remdm", "eta": 0.3, "schedule": "cap"}, "random"),
        ("mdlm", {"type": "remdm", "eta": 0.3, "schedule": "rescale"}, "random"),
        ("bert", {"type": "joint_threshold", "value": 0.3, "editing_threshold": 0.1}, "confidence"),
    ],
)
def test_a_transfer_that_takes_tokens_back_is_held_to_its_steps(
    family: str, revising: dict[str, Any], order: str, tmp_path: Path
) -> None:
    served = probed(family, tmp_path)
    params = replace(PLAIN, transfer=revising, order=order, block_length=6, temperature=1.0)
    request, events, result, receipt = solo(served, params)
    assert rebuilt(events, request) == request.response
    assert request.mask_id not in request.response
    assert len(receipt["rounds"]) == 6
    assert result.receipt is not None and result.receipt["revised"] == request.revised > 0
    assert result.steps <= request.plan["max_steps"] + request.blocks


@pytest.mark.parametrize("family", ["mdlm", "sedd"])
def test_models_that_are_told_their_noise_refine_too(family: str, tmp_path: Path) -> None:
    served = probed(family, tmp_path)
    transfer = "analytic" if family == "sedd" else "ddpm"
    params = replace(PLAIN, prompt=(9, 10), temperature=1.0, transfer=transfer, order="random", ignore_eos=False)
    request, _, result, receipt = solo(served, params)
    assert len(receipt["rounds"]) == 6
    assert result.steps <= request.plan["max_steps"] + request.blocks
    assert result.verdicts is not None
    assert receipt["score"] == pytest.approx(likelihood(result.verdicts[ARCHAIC]), rel=1e-5)


@pytest.mark.parametrize("transfer", ["linear", "cosine", {"type": "ddpm"}])
@pytest.mark.parametrize("block", [4, 12])
def test_gaps_where_a_model_drew_its_own_mask_cost_no_steps(
    transfer: Any, block: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    served = probed("llada", tmp_path)
    model = served.model
    head, mask, gaps = type(model).head, model.facts.mask_id, 0

    def often_a_mask(self: Any, hidden: torch.Tensor) -> torch.Tensor:
        logits = head(self, hidden).clone()
        logits[..., mask] = logits.logsumexp(-1) - 1.0
        return logits

    monkeypatch.setattr(type(model), "head", often_a_mask)
    for seed in range(2):
        params = replace(PLAIN, seed=seed, temperature=1.0, transfer=transfer, block_length=block, order="random")
        request, events, result, receipt = solo(served, params)
        ending = request.blocks if request.transfer.ending != "none" else 0
        assert result.steps <= request.plan["max_steps"] + ending
        assert [token for token in rebuilt(events, request) if token != tiny.MASK] == list(result.tokens)
        assert all(one["span"][1] - one["span"][0] <= 4 for one in receipt["rounds"])
        gaps += request.masked
    assert gaps


# ends


def test_a_draft_is_judged_by_its_text_up_to_its_end(served: DiffusionEngine) -> None:
    """With end tokens and a stop string, whichever comes first in each draft."""
    found = set()
    for seed in range(40):
        params = replace(PLAIN, seed=seed, ignore_eos=False, temperature=2.0, stop=("k",))
        request, events, result, receipt = solo(served, params)
        assert rebuilt(events, request) == request.response
        ends = [i for i, token in enumerate(request.response) if token == tiny.EOS]
        assert list(result.tokens) == request.response[: ends[0] if ends else 12]
        assert "k" not in result.text
        whole = continuation(served.decode, request.prompt_ids, result.tokens)
        assert result.finish_reason == ("stop" if ends or result.text != whole else "length")
        assert result.verdicts is not None
        expected = by_hand(served, result.text) if result.text.strip() else WORDLESS
        assert result.verdicts[ARCHAIC] == pytest.approx(expected, abs=1e-4)
        if expected != WORDLESS:
            assert receipt["score"] == pytest.approx(likelihood(expected), abs=1e-4)
        found.add(result.finish_reason)
    assert found == {"stop", "length"}


def test_nothing_behind_the_end_of_the_text_is_written_anew(served: DiffusionEngine) -> None:
    """Where a stop string, of several tokens, stands in the first draft; what it is spelled with may be."""
    cut, rewritten = 0, 0
    for seed in range(3):
        params = replace(PLAIN, seed=seed, ignore_eos=False, temperature=2.0)
        [(_, first)] = tiny.run(served, replace(params, refine=None))
        middle = len(first.text) // 2
        request, events, _, receipt = solo(served, replace(params, stop=(first.text[middle : middle + 4],)))

        def closed(tokens: list[int], request: Request = request) -> bool:
            text = continuation(served.decode, request.prompt_ids, tokens)
            return tiny.EOS in tokens or request.params.stop[0] in text

        (best, _), *others = drafts(events, request)
        for one, (_, left) in zip(receipt["rounds"], others, strict=True):
            length = next((n for n in range(12) if closed(best[:n])), 12)
            start, end = one["span"]
            assert end - start == min(4, length)
            assert end <= length
            cut += length < 12
            rewritten += end == length < 12
            best = left
    assert 0 < rewritten < cut


def test_a_text_without_words_is_worse_than_any(served: DiffusionEngine) -> None:
    [(_, first)] = tiny.run(served, replace(PLAIN, refine=None, temperature=1.0))
    stop = first.text.strip()[:1]
    refine = Refine(rounds=8, span=6, absent=(ARCHAIC,))
    *_, result, receipt = solo(served, replace(PLAIN, temperature=1.0, stop=(stop,), refine=refine))
    assert receipt["first_score"] is None
    judged = [one for one in receipt["rounds"] if one["score"] is not None]
    assert judged[0]["kept"]
    assert not any(one["kept"] for one in receipt["rounds"] if one["score"] is None)
    assert receipt["judging_passes"] == len(judged)
    assert result.text.strip()


def test_a_row_of_which_nothing_is_written_has_nothing_to_refine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    served = probed("llada", tmp_path)
    model = served.model
    head, mask = type(model).head, model.facts.mask_id

    def only_masks(self: Any, hidden: torch.Tensor) -> torch.Tensor:
        return head(self, hidden).index_fill(-1, torch.tensor([mask]), 1e4)

    monkeypatch.setattr(type(model), "head", only_masks)
    request, _, result, receipt = solo(served, PLAIN)
    assert (result.tokens, receipt["rounds"], result.verdicts) == ((), [], {ARCHAIC: WORDLESS})
    assert request.steps_left == 0


# beside others


def test_refined_rows_are_the_same_alone_and_in_any_batch(served: DiffusionEngine) -> None:
    rows = [
        replace(PLAIN, interventions=(PUSH,)),
        replace(PLAIN, row=1, refine=Refine(rounds=3, span=7), max_tokens=24, steps=8, block_length=6),
        replace(PLAIN, row=2, refine=None),
        replace(PLAIN, row=3, order="sae_stability", steps=12, prompt="the team won the match then", temperature=1.0),
        replace(PLAIN, row=4, refine=Refine(9, 2, (ARCHAIC,)), order="random", logprobs=True),
        replace(PLAIN, row=5, refine=None, verdicts=(), interventions=(PUSH,), transfer="cosine"),
        replace(PLAIN, row=6, interventions=(replace(PUSH, schedule=LOOP),)),
    ]
    alone = [tiny.run(served, params)[0] for params in rows]
    for seed in range(2):
        chance = random.Random(seed)
        requests = [served.admit(params) for params in rows]
        gone = served.admit(replace(PLAIN, row=9, refine=Refine(20)))
        pending, events = [gone, *requests], []
        while pending or served.waiting or served.running:
            for _ in range(min(len(pending), chance.randrange(3))):
                served.add([pending.pop(0)])
            events += served.step()
            if gone.step == 9:
                served.abort(gone.id)
        assert gone.refinement is not None and gone.refinement.best is not None
        assert Failed(gone.id, "aborted", aborted=True) in events
        for request, (other, expected) in zip(requests, alone, strict=True):
            found = tiny.results(events)[request.id]
            assert rebuilt(events, request) == request.response == other.response
            assert found.verdicts == expected.verdicts
            assert (found.forward_passes, found.logprobs) == (expected.forward_passes, expected.logprobs)
            assert found.receipt == rounded(expected.receipt)


def test_the_twin_without_steering_is_not_refined() -> None:
    assert baseline_of(replace(PLAIN, interventions=(PUSH,))).refine is None


# beside all else that a row may ask for


def test_a_window_opens_again_for_each_round(served: DiffusionEngine) -> None:
    """A condition on progress holds where a schedule over the same slice pushes, from a round's first forward on."""
    when = {"progress": {"at_least": 0.5, "below": 0.75}}
    params = replace(PLAIN, refine=Refine(rounds=4, span=6))
    window = replace(PUSH, schedule={"type": "window", "start": 0.5, "stop": 0.75})
    asked = [replace(params, interventions=(one,)) for one in (replace(PUSH, when=when), window)]
    (request, result), (same, its) = tiny.run(served, *asked)
    assert result.receipt is not None and its.receipt is not None
    [found], [expected] = result.receipt["interventions"], its.receipt["interventions"]
    assert found["strength_per_step"] == expected["strength_per_step"]
    assert sum(found["strength_per_step"]) > 4.0
    assert found["sites"] == expected["sites"]
    assert request.response == same.response


def test_a_loop_that_let_go_pushes_again_in_each_round(served: DiffusionEngine) -> None:
    fed = replace(PLAIN, temperature=1.0, interventions=(replace(PUSH, schedule=LOOP | {"hold": 100.0}),))
    *_, free, _ = solo(served, fed)
    assert free.receipt is not None
    read = sorted(free.receipt["interventions"][0]["feedback"]["readings"])
    loop = LOOP | {"hold": read[len(read) // 2], "release": 1}
    found = 0.0
    for seed in range(3):
        params = replace(fed, seed=seed, interventions=(replace(PUSH, schedule=loop),))
        _, _, result, _ = solo(served, replace(params, refine=Refine(rounds=6, span=6)))
        assert result.receipt is not None
        [one] = result.receipt["interventions"]
        told_of = one["feedback"]
        count = result.receipt["forward_passes"]
        assert len(told_of["gains"]) == len(told_of["readings"]) == len(one["strength_per_step"]) == count
        [(_, plain)] = tiny.run(served, replace(params, refine=None))
        assert plain.receipt is not None
        before = plain.receipt["interventions"][0]["feedback"]
        assert told_of["gains"][: len(before["gains"])] == before["gains"]
        assert told_of["let_go_at"] is not None or before["let_go_at"] is None
        if before["let_go_at"] is not None:
            found += sum(told_of["gains"][len(before["gains"]) :])
    assert found > 0


@pytest.mark.parametrize("positions", [(0, 3), (9, 12), (3, 9)])
@pytest.mark.parametrize("bound", [{"at_least": 0.7}, {"at_least": 1.0}, {"at_least": 0.0}])
def test_tokens_masked_again_in_a_round_are_written_and_those_of_its_stretch_too(
    served: DiffusionEngine, positions: tuple[int, int], bound: dict[str, float]
) -> None:
    active = {"attribute": "register/archaic", "above": 0.0}
    condition = {"all": [{"progress": bound}, active]}
    remask = {"condition": condition, "span": {"positions": list(positions)}, "times": 5}
    inside = 0
    for seed in range(2):
        params = replace(PLAIN, seed=seed, temperature=1.0, block_length=3, steps=12, remask_when=remask)
        request, events, result, receipt = solo(served, replace(params, refine=Refine(rounds=4, span=5)))
        assert rebuilt(events, request) == request.response
        assert tiny.MASK not in request.response
        assert len(receipt["rounds"]) == 4
        assert result.steps <= request.plan["max_steps"]
        assert result.receipt is not None
        inside += sum(one["step"] >= 12 for one in result.receipt["remasked"])
    # Where it always holds, all its times are over with the first draft.
    assert inside or bound != {"at_least": 0.7}


def test_a_row_may_end_itself_in_a_round(served: DiffusionEngine) -> None:
    """After a step its draft is at 4/12, 8/12 and 12/12, a stretch of seven at 4/7 and 7/7."""
    ending = replace(PLAIN, steps=3, abort_when={"progress": {"above": 0.5, "below": 0.6}})
    request, events, result, receipt = solo(served, replace(ending, refine=Refine(rounds=4, span=7)))
    assert (result.finish_reason, result.steps) == ("content_filter", 4)
    # A stretch of its best draft is masked by then: the answer is that draft, and streams are told so.
    draft = tiny.tokens_of(served, replace(ending, refine=None, abort_when=None))
    assert list(result.tokens) == rebuilt(events, request) == request.response == draft
    assert result.receipt is not None
    assert result.receipt["aborted"]["answer"] == "best_draft"
    assert result.receipt["aborted"]["behind_gap"] == []
    assert (receipt["rounds"], receipt["judging_passes"]) == ([], 1)
    assert result.forward_passes == 4 + 1
    assert result.verdicts is not None
    expected = by_hand(served, result.text) if result.text.strip() else WORDLESS
    assert result.verdicts[ARCHAIC] == pytest.approx(expected, abs=1e-4)


def test_a_row_that_ends_in_its_draft_counts_the_judging_of_what_it_answers(
    served: DiffusionEngine,
) -> None:
    half = {"progress": {"at_least": 0.5}}
    _, _, result, receipt = solo(served, replace(PLAIN, order="confidence", block_length=4, abort_when=half))
    assert result.verdicts is not None and result.finish_reason == "content_filter"
    assert (receipt["first_score"], receipt["judging_passes"]) == (None, 1)
    assert result.receipt is not None
    assert result.forward_passes == result.receipt["forward_passes"] + 1


def test_a_row_over_its_limit_at_the_end_of_its_draft_is_not_judged(served: DiffusionEngine) -> None:
    push = Intervention(attribute=ARCHAIC, strength=20.0, schedule={"type": "window", "start": 0.8, "stop": 1.0})
    params = replace(PLAIN, interventions=(push,), limits=Limits(max_delta=0.01, on_exceed="refuse"))
    request, events = tiny.solo(served, params)
    assert [event for event in events if isinstance(event, Done | Failed)] == [events[-1]]
    assert isinstance(events[-1], Failed) and events[-1].limit == "limits.max_delta"
    assert request.refinement is not None and request.refinement.best is None


@pytest.mark.parametrize("on_exceed", ["clip", "refuse"])
def test_limits_hold_over_all_rounds(served: DiffusionEngine, on_exceed: Any) -> None:
    push = Intervention(attribute=ARCHAIC, strength=0.3, schedule="uniform")
    params = replace(PLAIN, interventions=(push,), measure_kl=True, trace=TraceParams((ARCHAIC,), 2))
    _, _, free, _ = solo(served, params)
    assert free.receipt is not None
    spent = free.receipt["measured_kl"]
    assert spent > 0 and free.receipt["predicted_kl"] > 0
    assert [one.step for one in free.trace] == list(range(0, free.steps, 2))
    # The draft alone is within the limit.
    limits = Limits(max_kl=spent * 0.8, on_exceed=on_exceed)
    request, events = tiny.solo(served, replace(params, limits=limits))
    if on_exceed == "refuse":
        assert isinstance(events[-1], Failed) and events[-1].limit == "limits.max_kl"
        return
    result = tiny.results(events)[request.id]
    assert result.receipt is not None
    assert 0 < result.receipt["measured_kl"] <= spent * 0.8
    assert result.receipt["limits"]["clipped"]["kl_steps"] > 0
    assert len(result.receipt["refined"]["rounds"]) == 6


def test_guidance_goes_with_it(served: DiffusionEngine) -> None:
    request, events, _, receipt = solo(served, replace(PLAIN, cfg_scale=1.0, interventions=(PUSH,)))
    assert rebuilt(events, request) == request.response
    assert drafts(events, request)[0][0] == tiny.tokens_of(served, replace(request.params, refine=None))
    assert len(receipt["rounds"]) == 6


def test_what_is_pushed_may_change_in_a_round(served: DiffusionEngine) -> None:
    fed = replace(PUSH, schedule=LOOP)
    for before, after in (((), (PUSH,)), ((PUSH,), (fed,)), ((fed,), (fed,)), ((fed,), ())):
        params = replace(PLAIN, interventions=before)
        request = served.admit(params)
        served.add([request])
        events = [event for _ in range(7) for event in served.step()]
        assert request.refinement is not None and request.refinement.best is not None
        assert served.steer(request.id, served.admit(replace(params, interventions=after))) == 7
        events += tiny.drain(served)
        [result] = tiny.results(events).values()
        assert [event.step for event in events if isinstance(event, Steered)] == [7]
        assert rebuilt(events, request) == request.response
        assert result.receipt is not None
        assert len(result.receipt["refined"]["rounds"]) == 6
        told_for = [one["strength_per_step"] for one in result.receipt["interventions"]]
        assert [len(one) for one in told_for] == [7] * len(before) + [result.steps - 7] * len(after)
        assert request.plan["refine"] == {"rounds": 6, "span": 4, "round_steps": 2}


# memory

HALF = {"progress": {"at_least": 0.5}}
CROWD: list[GenerationParams] = [
    replace(PLAIN, refine=Refine(rounds=2, span=5), order="sae_stability", interventions=(PUSH,), temperature=1.0),
    replace(PLAIN, row=1, refine=Refine(rounds=3, span=3), interventions=(replace(PUSH, when=HALF),)),
    replace(PLAIN, row=2, refine=Refine(2, 5, (ARCHAIC,)), transfer="cosine", order="random", logprobs=True),
]


def test_a_step_that_does_not_fit_is_as_if_it_had_not_been_begun(served: DiffusionEngine) -> None:
    subject, chance = Subject(served, CROWD), random.Random(1)
    for _ in range(8):
        step = chance.randrange(len(subject.calls))
        subject.check(step, 1 + chance.randrange(subject.calls[step]))


@pytest.mark.parametrize(("which", "beside"), [(0, False), (0, True), (1, True), (2, False)])
def test_a_draft_whose_judging_did_not_fit_into_memory_is_judged_later(
    served: DiffusionEngine, which: int, beside: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    params = CROWD[0]
    assert params.refine is not None
    [(calm, expected)] = tiny.run(served, params)
    requests = [served.admit(params), *([served.admit(replace(PLAIN, row=7, refine=None))] if beside else [])]
    mine = requests[0].refinement
    assert mine is not None
    served.add(requests)
    forward: Any = type(served.model).forward
    failures = [True]

    def due() -> bool:
        return mine.best is not None and len(mine.made) == which - 1 if which else mine.best is None

    def judging(*rest: object, **named: object) -> object:
        if failures and requests[0].is_done and due():
            failures.pop()
            raise torch.OutOfMemoryError("out of memory")
        return forward(*rest, **named)

    monkeypatch.setattr(type(served.model), "forward", judging)
    events = tiny.drain(served)
    assert not failures
    result = tiny.results(events)[requests[0].id]
    assert rebuilt(events, requests[0]) == requests[0].response == calm.response
    assert result.verdicts == expected.verdicts
    assert result.receipt is not None and expected.receipt is not None
    assert result.receipt["refined"] == expected.receipt["refined"]
