"""ReMDM's published loop, written down from its description, against the engine in distribution and step by step.

Loop: Wang et al. (arXiv 2503.00307, sections 3 and 4.1): at a step from time t to s every committed token is masked
again with probability sigma, and every mask takes a token of the model's prediction for the canvas before the step with
probability (alpha_s - (1 - sigma) alpha_t) / (1 - alpha_t); alpha = 1 - time; then MDLM's final noise removal.
"""

import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from torch import Tensor

from steerserve.engine.api.events import Committed, Done, Event, Revised, Steered
from steerserve.engine.api.params import GenerationParams, Intervention, Scope, TraceParams
from steerserve.engine.api.text import cut_at_stop
from steerserve.engine.engine import DiffusionEngine
from steerserve.engine.request.request import Request
from steerserve.errors import RequestError
from steerserve.models import DiffusionLM
from tests import tiny
from tests.engine.loops import (
    Canvas,
    assert_alone_as_together,
    drawn,
    each_by_itself,
    exact,
    logits_of,
    misfit,
    settled_responses,
)

START = (tiny.EOS, 5, tiny.MASK, tiny.MASK, tiny.MASK, 6)
"""Behind the BOS, which is the end of text too."""
RULES = [("cap", 0.5, 3, 0.2), ("rescale", 0.8, 3, 0.3), ("cap", 1.0, 4, 1e-5)]


def small(seed: int, conditioned: bool = False) -> DiffusionLM:
    """A model whose texts can be counted: eight tokens, one of them the mask, and as different at every noise level."""
    model = tiny.mdlm(seed, vocab_size=8, time_conditioning=conditioned)
    tiny.randomise(model, seed, 0.17 if conditioned else 0.4)
    return model


def noise(time: float) -> float:
    return -math.log1p(-(1 - 1e-3) * time)


def predicted(logits: Tensor) -> Tensor:
    logits = logits.clone()
    logits[:, tiny.MASK] = -math.inf
    return logits.softmax(1)


def sigma_of(schedule: str, eta: float, alpha_t: float, alpha_s: float) -> float:
    most = min(1.0, (1 - alpha_s) / alpha_t) if alpha_t > 0 else 1.0
    return min(eta, most) if schedule == "cap" else eta * most


def moved(
    canvas: Canvas, logits: Tensor, span: range, alpha_t: float, alpha_s: float, sigma: float
) -> Iterator[tuple[float, Canvas]]:
    """One step of the positions of span, each by itself."""
    x = predicted(logits)
    options = {}
    for i in span:
        if canvas[i] == tiny.MASK:
            q = x[i] * (alpha_s - (1 - sigma) * alpha_t) / (1 - alpha_t)
            q[tiny.MASK] = (1 - alpha_s - sigma * alpha_t) / (1 - alpha_t)
            options[i] = dict(enumerate(q.tolist()))
        else:
            options[i] = {canvas[i]: 1 - sigma, tiny.MASK: sigma}
    return each_by_itself(canvas, options)


def cleaned(canvas: Canvas, logits: Tensor, span: range) -> Iterator[tuple[float, Canvas]]:
    best = predicted(logits).argmax(1).tolist()
    yield 1.0, tuple(best[i] if i in span and token == tiny.MASK else token for i, token in enumerate(canvas))


def published(
    model: DiffusionLM, start: Canvas, rule: tuple[str, float, int, float], block: int, told: bool = False
) -> dict[Canvas, float]:
    """The exact distribution of the response that start leaves masked; steps and times are those of one block."""
    schedule, eta, steps, eps = rule
    length = start.count(tiny.MASK)
    times = [1 - (1 - eps) * i / steps for i in range(steps + 1)]
    stages: list[Any] = []
    for first in range(2, 2 + length, block):
        span = range(first, first + block)
        for now, after in zip(times, times[1:], strict=False):
            alphas = 1 - now, 1 - after
            chances = (span, *alphas, sigma_of(schedule, eta, *alphas))
            stages.append((noise(now) if told else 0.0, lambda canvas, logits, c=chances: moved(canvas, logits, *c)))
        stages.append((noise(eps) if told else 0.0, lambda canvas, logits, s=span: cleaned(canvas, logits, s)))
    return settled_responses(exact(model, start, stages), 2, length, tiny.EOS)


def ask(rule: tuple[str, float, int, float], **changes: Any) -> GenerationParams:
    schedule, eta, steps, eps = rule
    asked = GenerationParams(
        prompt=(5,), suffix=(6,), max_tokens=3, steps=steps, temperature=1.0, order="random",
        transfer={"type": "remdm", "eps": eps, "eta": eta, "schedule": schedule},
    )  # fmt: skip
    return replace(asked, **changes)


@pytest.mark.parametrize(("rule", "conditioned"), [(RULES[0], True), (RULES[1], False), (RULES[2], True)], ids=str)
def test_whole_texts_are_distributed_as_the_loop_distributes_them(
    tmp_path: Path, rule: tuple[str, float, int, float], conditioned: bool
) -> None:
    model = small(2, conditioned)
    served = tiny.engine(model, tmp_path, max_rows=400, max_queue=1200)
    counts = drawn(served, ask(rule), 1200)
    assert misfit(published(model, START, rule, 3, conditioned), counts) < 3.5
    # The counts would notice that nothing is masked again.
    never = (rule[0], 0.0, *rule[2:])
    assert misfit(published(model, START, never, 3, conditioned), counts) > 4


def test_each_block_is_a_loop_of_its_own(tmp_path: Path) -> None:
    model = small(3)
    served = tiny.engine(model, tmp_path, max_rows=400, max_queue=1200)
    start, rule = (tiny.EOS, 5, tiny.MASK, tiny.MASK, 6), ("cap", 0.9, 4, 0.1)
    counts = drawn(served, ask(rule, max_tokens=2, block_length=1, steps=8), 1200)
    assert misfit(published(model, start, rule, 1), counts) < 3.5
    assert misfit(published(model, start, rule, 2), counts) > 6


def random_request(random: Random, **changes: Any) -> GenerationParams:
    block, blocks = random.choice([(8, 1), (4, 3), (3, 2), (15, 1), (1, 4)])
    rule = (
        random.choice(["cap", "rescale"]),
        random.choice([0.1, 0.5, 1.0]),
        blocks * random.choice([1, 4, 9, 30]),
        random.choice([1e-5, 0.3]),
    )
    asked = ask(rule, max_tokens=block * blocks, block_length=block, seed=random.randrange(99))
    return replace(asked, **changes)


def replayed(events: list[Event], request: Request) -> list[int]:
    """The response that the events of one row build, each of which must be possible where it stands."""
    response = [tiny.MASK] * request.params.max_tokens
    step, changed = -1, set[int]()
    for event in events:
        if isinstance(event, Committed | Revised):
            assert event.step >= step
            changed = changed if event.step == step else set()
            assert event.positions and not changed & set(event.positions)
            step, changed = event.step, changed | set(event.positions)
        if isinstance(event, Committed):
            for position, token in zip(event.positions, event.tokens, strict=True):
                assert response[position] == tiny.MASK
                response[position] = token
        if isinstance(event, Revised):
            size = request.block_length
            blocks = {position // size for position in event.positions}
            assert len(blocks) == 1
            assert tiny.MASK not in response[: blocks.pop() * size], "an earlier block was not finished"
            for position in event.positions:
                assert response[position] != tiny.MASK
                response[position] = tiny.MASK
    return response


def test_replaying_the_events_rebuilds_the_text(tmp_path: Path) -> None:
    served = tiny.engine(tiny.bert(1), tmp_path)
    random, revised, again = Random(4), 0, 0
    for i in range(20):
        stop = ("a", "th") if i % 3 == 0 else ()
        request, events = tiny.solo(served, random_request(random, stop=stop, logprobs=True))
        response = replayed(events, request)
        assert response == request.response
        done = events[-1]
        assert isinstance(done, Done)
        ends = response.index(tiny.EOS) if tiny.EOS in response else len(response)
        written = response[: response.index(tiny.MASK)] if tiny.MASK in response[:ends] else response[:ends]
        assert list(done.result.tokens) == written
        assert done.result.text == cut_at_stop(served.decode([5, *written])[len(served.decode([5])) :], stop)[0]
        said: dict[int, float] = {}
        for event in events:
            if isinstance(event, Committed):
                assert event.logprobs is not None
                again += len(said.keys() & set(event.positions))
                said |= dict(zip(event.positions, event.logprobs, strict=True))
            revised += isinstance(event, Revised)
        assert done.result.logprobs == tuple(said[i] for i in range(len(written)))
        assert request.plan["revises"] is True
    assert revised > 30
    assert again > 30


def test_tokens_are_those_of_the_canvas_before_the_step(tmp_path: Path) -> None:
    """At temperature 0: what is taken back at a step still stood in the canvas that its commits were read from."""
    model = tiny.bert(2)
    served = tiny.engine(model, tmp_path)
    random, both = Random(1), 0
    for _ in range(12):
        asked = random_request(random, temperature=0.0, ignore_eos=True)
        request, events = tiny.solo(served, asked)
        first = request.start
        x = [*request.prompt_ids, *[tiny.MASK] * asked.max_tokens, *request.suffix_ids]
        changes = [event for event in events if isinstance(event, Committed | Revised)]
        for step in sorted({event.step for event in changes}):
            logits = logits_of(model, [x])[0]
            logits[:, [tiny.MASK, tiny.EOS]] = -math.inf
            want = logits.argmax(1).tolist()
            now = [event for event in changes if event.step == step]
            both += len(now) == 2
            for event in now:
                for i, position in enumerate(event.positions):
                    token = event.tokens[i] if isinstance(event, Committed) else tiny.MASK
                    assert token in (tiny.MASK, want[first + position])
                    x[first + position] = token
        assert x == request.canvas
        assert tiny.MASK not in x
    assert both > 10


def test_without_remasking_it_is_ddpm_token_for_token(tmp_path: Path) -> None:
    served = tiny.engine(tiny.bert(1), tmp_path)
    random = Random(3)
    for order in ("random", "confidence", "sae_stability"):
        for _ in range(6):
            asked = random_request(random, order=order, logprobs=True)
            assert isinstance(asked.transfer, dict)
            none = replace(asked, transfer=asked.transfer | {"eta": 0})
            ddpm = replace(asked, transfer={"type": "ddpm", "eps": asked.transfer["eps"]})
            (mine, events), (other, expected) = tiny.solo(served, none), tiny.solo(served, ddpm)
            assert [replace(one, request_id="") for one in events] == [replace(one, request_id="") for one in expected]
            assert mine.response == other.response
            assert mine.plan["revises"] is False


def test_a_row_ends_only_where_nothing_can_be_taken_back(tmp_path: Path) -> None:
    """An end of text that is committed does not stop its own block; a finished one stops the row."""
    served = tiny.engine(tiny.bert(1), tmp_path, max_rows=64)
    asked = ask(("cap", 0.5, 30, 1e-5), max_tokens=12, block_length=4, temperature=2.0)
    requests = [served.admit(replace(asked, seed=seed)) for seed in range(128)]
    served.add(requests)
    log = tiny.drain(served)
    early, taken = 0, 0
    for request in requests:
        events = [event for event in log if event.request_id == request.id]
        standing = set[int]()
        for event in events:
            if isinstance(event, Committed):
                standing |= {p for p, t in zip(event.positions, event.tokens, strict=True) if t == tiny.EOS}
            if isinstance(event, Revised):
                taken += len(standing & set(event.positions))
                standing -= set(event.positions)
        done = events[-1]
        assert isinstance(done, Done)
        if tiny.EOS in request.response:
            end = request.response.index(tiny.EOS)
            assert done.result.finish_reason == "stop"
            assert list(done.result.tokens) == request.response[:end]
            # Ten steps a block, and one more where masks were left.
            assert (end // 4 + 1) * 10 <= request.step <= (end // 4 + 1) * 11
            early += end < 8
        else:
            assert request.step >= 30
    assert early > 5
    assert taken > 5


def test_steps_that_commit_nothing_cost_no_forward_and_change_nothing(tmp_path: Path) -> None:
    served = tiny.engine(tiny.bert(3), tmp_path)
    alone = 0
    for seed in range(2):
        window = {"type": "window", "start": 0.25, "stop": 0.75}
        push = Intervention(attribute="topic/sports", strength=1.5, schedule=window)
        plain = ask(
            ("cap", 0.05, 100, 1e-5), max_tokens=8, seed=seed, ignore_eos=True, interventions=(push,), logprobs=True
        )
        request, events = tiny.solo(served, plain)
        assert isinstance(events[-1], Done)
        result = events[-1].result
        assert 100 <= result.steps <= 101
        commits = {event.step for event in events if isinstance(event, Committed)}
        assert result.forward_passes == len(commits) < 90
        alone += len({event.step for event in events if isinstance(event, Revised)} - commits)
        other, told = tiny.solo(served, replace(plain, trace=TraceParams(("topic/sports",))))
        assert isinstance(told[-1], Done)
        traced = told[-1].result
        assert traced.forward_passes == traced.steps == result.steps == len(traced.trace)
        assert other.response == request.response
        assert traced.logprobs == result.logprobs
        held, now = 0, {trace.step: trace.progress for trace in traced.trace}
        for event in events:
            if isinstance(event, Committed | Revised):
                assert event.step not in now or now.pop(event.step) == held / 8
                held += len(event.positions) * (1 if isinstance(event, Committed) else -1)
    assert alone > 5


SCOPES: list[Scope] = ["masked", "all", "committed", (0, 1)]


def rows(seed: int, count: int = 24) -> list[GenerationParams]:
    """Rows that share nothing: transfer, order, steps, lengths, blocks, guidance, steering, traces and noise."""
    random, made = Random(seed), []
    for i in range(count):
        asked = random_request(
            random, row=i, prompt=tuple(random.randrange(5, 97) for _ in range(random.randrange(1, 9))),
            suffix=random.choice([(), (70, 8)]), temperature=random.choice([0.0, 0.6, 1.0, 2.0]),
            top_p=random.choice([1.0, 0.8]), cfg_scale=random.choice([0.0, 0.0, 1.5]), logprobs=True,
            ignore_eos=random.choice([True, False]), stop=random.choice([(), ("a", "ki")]),
            order=random.choice(["random", "random", "confidence", "sae_stability"]),
        )  # fmt: skip
        if i % 4 == 3:
            asked = replace(asked, transfer=random.choice(["linear", "cosine", "ddpm", "timesteps", "origin"]))
        if i % 2:
            name = random.choice(["topic/sports", "register/archaic"])
            schedule = random.choice([None, {"type": "window", "start": 0.3, "stop": 0.8}])
            push = Intervention(attribute=name, strength=0.6, scope=random.choice(SCOPES), schedule=schedule)
            asked = replace(asked, interventions=(push,))
        if i % 3 == 0:
            asked = replace(asked, trace=TraceParams(("topic/sports",), every=random.randrange(1, 9)))
        made.append(asked)
    return made


@pytest.mark.parametrize("seed", [1])
def test_rows_in_a_batch_are_the_rows_alone(tmp_path: Path, seed: int) -> None:
    served = tiny.engine(tiny.bert(5), tmp_path, max_rows=13)
    assert_alone_as_together(served, rows(seed), seed)


def run_steered(
    served: DiffusionEngine, asked: GenerationParams, other: GenerationParams
) -> tuple[Request, list[Event]]:
    """A row that gets the interventions of another after a few steps."""
    request = served.admit(asked)
    served.add([request])
    events = [event for _ in range(4) for event in served.step()]
    assert served.steer(request.id, served.admit(other)) == request.step
    return request, events + tiny.drain(served)


def test_a_row_that_takes_tokens_back_can_be_steered_while_it_runs(tmp_path: Path) -> None:
    served = tiny.engine(tiny.bert(5), tmp_path)
    asked = ask(("cap", 0.3, 40, 1e-5), max_tokens=12, seed=3, ignore_eos=True)
    push = Intervention(attribute="topic/sports", strength=4.0, schedule="uniform")
    plain, _ = tiny.solo(served, asked)
    same, _ = run_steered(served, asked, asked)
    changed, events = run_steered(served, asked, replace(asked, interventions=(push,)))
    assert same.response == plain.response
    assert changed.response != plain.response
    assert replayed(events, changed) == changed.response
    assert any(isinstance(event, Steered) for event in events)


def test_no_score_model_takes_it(tmp_path: Path) -> None:
    with pytest.raises(RequestError) as refused:
        tiny.engine(tiny.sedd(), tmp_path).admit(ask(RULES[0]))
    assert refused.value.param == "transfer"


def test_a_model_that_is_told_its_noise_level_takes_no_blocks(tmp_path: Path) -> None:
    asked = ask(RULES[0], max_tokens=6, block_length=3, steps=6)
    with pytest.raises(RequestError) as refused:
        tiny.engine(tiny.mdlm(time_conditioning=True), tmp_path).admit(asked)
    assert refused.value.param == "block_length"


def test_fewer_tokens_are_masked_again_towards_the_end(tmp_path: Path) -> None:
    """sigma_max falls with time: at the last steps there is nearly nothing left to gain."""
    served = tiny.engine(tiny.bert(4), tmp_path, max_rows=32)
    requests = [served.admit(ask(("rescale", 1.0, 20, 1e-5), max_tokens=30, seed=i, ignore_eos=True)) for i in range(8)]
    served.add(requests)
    counts = torch.zeros(20)
    for event in tiny.drain(served):
        if isinstance(event, Revised):
            counts[event.step] += len(event.positions)
    assert counts[0] == 0
    assert counts[10] > 8 * 30 * 0.3
    assert counts[19] < 8
