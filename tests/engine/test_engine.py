"""Rows as their callers see them: events, blocks, text, ends, stops and log-probabilities."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from steerserve.engine import noise
from steerserve.engine.api.events import Done
from steerserve.engine.api.params import GenerationParams
from steerserve.engine.engine import DiffusionEngine
from steerserve.engine.request.request import Request
from steerserve.engine.sampling import sampler
from tests import tiny

PLAIN = GenerationParams(prompt="the king", max_tokens=12, steps=6, seed=3)


@pytest.fixture
def served(tmp_path: Path) -> DiffusionEngine:
    return tiny.engine(tiny.bert(), tmp_path)


def test_events_tell_the_whole_story(served: DiffusionEngine) -> None:
    request, events = tiny.solo(served, PLAIN)
    tokens, when = tiny.replayed(events, request)
    assert tokens == request.response
    assert tiny.MASK not in tokens
    assert [sum(1 for step in when.values() if step == i) for i in range(6)] == [2] * 6
    assert isinstance(events[-1], Done)
    assert tiny.terminal(events) == [request.id]
    result = events[-1].result
    assert result.steps == result.forward_passes == 6
    assert result.prompt_tokens == len(request.prompt_ids) == 3
    assert result.receipt is None
    assert result.logprobs is None


def test_blocks_are_finished_from_left_to_right(served: DiffusionEngine) -> None:
    request, events = tiny.solo(served, replace(PLAIN, block_length=4, steps=6, ignore_eos=True))
    _, when = tiny.replayed(events, request)
    assert [sorted(when, key=lambda p: (when[p], p))[i * 4] // 4 for i in range(3)] == [0, 1, 2]
    assert max(when[p] for p in range(4)) < min(when[p] for p in range(4, 8))
    assert max(when[p] for p in range(4, 8)) < min(when[p] for p in range(8, 12))


@pytest.mark.parametrize("transfer", ["linear", "cosine", {"type": "threshold", "value": 0.3}, "entropy_bound"])
@pytest.mark.parametrize("order", ["random", "confidence", "margin", "entropy", "sae_stability"])
def test_every_order_and_transfer_fills_the_canvas(served: DiffusionEngine, order: str, transfer: Any) -> None:
    request, events = tiny.solo(served, replace(PLAIN, order=order, transfer=transfer, steps=20, ignore_eos=True))
    tokens, _ = tiny.replayed(events, request)
    assert tiny.MASK not in tokens
    assert request.step <= 20


def test_a_random_order_is_drawn_from_its_own_stream(served: DiffusionEngine) -> None:
    request, events = tiny.solo(served, replace(PLAIN, order="random", temperature=0.0, ignore_eos=True))
    _, when = tiny.replayed(events, request)
    left = set(range(12))
    for step in range(6):
        position = torch.arange(12)
        fixed = torch.zeros_like(position)
        draws = noise.uniform(noise.keys(fixed + 3, fixed, fixed + step, position, noise.ORDER)).tolist()
        best = sorted(left, key=lambda p: -draws[p])[:2]
        assert sorted(best) == sorted(p for p, at in when.items() if at == step)
        left -= set(best)


@pytest.mark.parametrize("suffix", ["city then", (60, 61, 70)])
def test_a_suffix_is_seen_and_kept(served: DiffusionEngine, suffix: str | tuple[int, ...]) -> None:
    request, events = tiny.solo(served, replace(PLAIN, suffix=suffix, ignore_eos=True))
    ids = list(request.suffix_ids)
    assert ids
    assert request.canvas[request.stop :] == ids
    assert request.canvas[: request.start] == list(request.prompt_ids)
    assert isinstance(events[-1], Done)
    assert events[-1].result.prompt_tokens == len(request.prompt_ids) + len(ids)
    assert request.response != tiny.tokens_of(served, replace(PLAIN, ignore_eos=True))


def with_eos(served: DiffusionEngine, **changes: Any) -> list[tuple[Request, Any]]:
    """Rows of many seeds that drew an EOS somewhere."""
    asked = [replace(PLAIN, seed=seed, temperature=2.0, **changes) for seed in range(256)]
    rows = tiny.run(served, *asked)
    return [(request, result) for request, result in rows if tiny.EOS in request.response]


def test_the_text_ends_at_the_first_end_token(tmp_path: Path) -> None:
    served = tiny.engine(tiny.bert(), tmp_path, max_rows=64)
    ended = with_eos(served)
    assert len(ended) >= 5
    for request, result in ended:
        cut = request.response.index(tiny.EOS)
        if tiny.MASK in request.response[:cut]:
            continue
        assert list(result.tokens) == request.response[:cut]
        assert result.finish_reason == "stop"
        assert tiny.EOS not in result.tokens


def test_stopping_at_an_end_token_is_the_text_of_running_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    served = tiny.engine(tiny.bert(), tmp_path, max_rows=64)
    early = with_eos(served, block_length=4, steps=12)
    monkeypatch.setattr("steerserve.engine.engine.is_finished", lambda request, *_: request.steps_left <= 0)
    late = with_eos(served, block_length=4, steps=12)
    texts = {request.params.seed: result.text for request, result in late}
    assert any(request.step < 12 for request, _ in early)
    for request, result in early:
        assert result.text == texts[request.params.seed]


def test_the_first_stop_string_cuts_the_text_and_not_the_tokens(served: DiffusionEngine) -> None:
    whole = tiny.run(served, replace(PLAIN, ignore_eos=True))[0][1]
    stop = whole.text[5:7]
    request, events = tiny.solo(served, replace(PLAIN, ignore_eos=True, stop=("\n\n", stop)))
    assert isinstance(events[-1], Done)
    result = events[-1].result
    assert result.text == whole.text[: whole.text.index(stop)]
    assert stop not in result.text
    assert result.finish_reason == "stop"
    assert list(result.tokens) == list(whole.tokens)[: len(result.tokens)]
    assert request.step <= whole.steps


def test_a_stop_string_ends_the_row_once_it_is_settled(served: DiffusionEngine) -> None:
    params = replace(PLAIN, ignore_eos=True, block_length=3, steps=12)
    whole = tiny.run(served, params)[0][1]
    request, events = tiny.solo(served, replace(params, stop=(whole.text[1:3],)))
    assert isinstance(events[-1], Done)
    assert request.step < whole.steps
    assert events[-1].result.text == whole.text[: whole.text.index(whole.text[1:3])]


def test_text_goes_on_from_the_prompt(served: DiffusionEngine) -> None:
    for seed in range(6):
        [(request, result)] = tiny.run(served, replace(PLAIN, seed=seed, ignore_eos=True))
        whole = served.decode([*request.prompt_ids, *request.response])
        assert "the king" + result.text == whole
        first = tiny.PIECES[request.response[0]]
        assert result.text.startswith(first[2:] if first.startswith("##") else " ")


def test_logprobs_are_those_of_the_softmax_at_the_commitment(served: DiffusionEngine) -> None:
    request, events = tiny.solo(served, replace(PLAIN, logprobs=True, temperature=1.3, ignore_eos=True))
    tokens, when = tiny.replayed(events, request)
    assert isinstance(events[-1], Done)
    found = events[-1].result.logprobs
    assert found is not None
    assert len(found) == len(tokens)
    canvas = [*request.prompt_ids, *([tiny.MASK] * 12)]
    banned = [*served.model.facts.forbidden_ids, tiny.EOS]
    for step in range(6):
        logits = served.model.head(served.model(torch.tensor([canvas])))[0].double()
        logits[:, banned] = float("-inf")
        expected = logits.log_softmax(dim=1)
        now = [position for position, at in when.items() if at == step]
        for position in now:
            at = request.start + position
            assert found[position] == pytest.approx(float(expected[at, tokens[position]]), abs=1e-5)
        for position in now:
            canvas[request.start + position] = tokens[position]


def test_a_row_of_a_seed_is_its_own_sample_and_repeats(served: DiffusionEngine) -> None:
    first = tiny.tokens_of(served, PLAIN)
    assert tiny.tokens_of(served, PLAIN) == first
    assert tiny.tokens_of(served, replace(PLAIN, row=1)) != first
    assert tiny.tokens_of(served, replace(PLAIN, seed=4)) != first


def test_rows_that_need_no_candidates_draw_only_what_they_commit(
    served: DiffusionEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[int] = []
    original = sampler.draw

    def counted(model: Any, hidden: torch.Tensor, *rest: Any) -> sampler.Draw:
        drawn.append(len(hidden))
        return original(model, hidden, *rest)

    monkeypatch.setattr("steerserve.engine.sampling.predictions.draw", counted)
    blind = replace(PLAIN, order="random", ignore_eos=True)
    seeing = replace(PLAIN, order="confidence", ignore_eos=True)
    tiny.run(served, blind)
    assert drawn == [2] * 6
    drawn.clear()
    tiny.run(served, blind, seeing)
    assert drawn == [2 + 12 - 2 * step for step in range(6)]
