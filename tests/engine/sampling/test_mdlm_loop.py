"""MDLM's published loops, written down from their description, against the engine in distribution.

Loops: `ddpm` and `ddpm_cache` of MDLM (arXiv 2406.07524, sections 3.2.2 and 4) with the log-linear schedule, and the
final noise removal by the likeliest token.
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

from steerserve.engine.api.events import Committed
from steerserve.engine.api.params import GenerationParams, Intervention, Scope, TraceParams
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


def small(seed: int, conditioned: bool) -> DiffusionLM:
    """A model whose texts can be counted: eight tokens, one of them the mask, and as different at every noise level."""
    model = tiny.mdlm(seed, vocab_size=8, time_conditioning=conditioned)
    tiny.randomise(model, seed, 0.17 if conditioned else 0.25)
    return model


def noise(time: float) -> float:
    return -math.log1p(-(1 - 1e-3) * time)


def subs(logits: Tensor) -> Tensor:
    """The distribution of the clean token [length, vocabulary] at masks."""
    logits = logits.clone()
    logits[:, tiny.MASK] += -1e6
    return logits.softmax(1)


def moved(canvas: Canvas, logits: Tensor, now: float, after: float) -> Iterator[tuple[float, Canvas]]:
    """One ancestral step between two chances of being masked: q = p (now - after), q[mask] = after, over now."""
    options = {}
    for i in (i for i, token in enumerate(canvas) if token == tiny.MASK):
        q = subs(logits)[i] * (now - after)
        q[tiny.MASK] = after
        options[i] = dict(enumerate((q / q.sum()).tolist()))
    return each_by_itself(canvas, options)


def cleaned(canvas: Canvas, logits: Tensor) -> Iterator[tuple[float, Canvas]]:
    likeliest = subs(logits).argmax(1).tolist()
    yield 1.0, tuple(likeliest[i] if token == tiny.MASK else token for i, token in enumerate(canvas))


def published(
    model: DiffusionLM, sampler: str, steps: int, eps: float, told: bool, removal: bool = True
) -> dict[Canvas, float]:
    """The exact distribution of the response of START; told: whether the model is told the noise level."""
    times = torch.linspace(1, eps, steps + 1, dtype=torch.float64).tolist()
    stages: list[Any] = []
    for now in times[:-1]:
        after = now - (1 - eps) / steps
        chances = (now, after) if sampler == "ddpm_cache" else (-math.expm1(-noise(now)), -math.expm1(-noise(after)))
        level = noise(now) if told else 0.0
        stages.append((level, lambda canvas, logits, c=chances: moved(canvas, logits, *c)))
    if removal:
        stages.append((noise(eps) if told else 0.0, cleaned))
    return settled_responses(exact(model, START, stages), 2, 3, tiny.EOS)


def ask(sampler: str, steps: int, eps: float, **changes: Any) -> GenerationParams:
    asked = GenerationParams(
        prompt=(5,), suffix=(6,), max_tokens=3, steps=steps, temperature=1.0, order="random",
        transfer={"type": sampler, "eps": eps},
    )  # fmt: skip
    return replace(asked, **changes)


@pytest.mark.parametrize(
    ("sampler", "steps", "eps", "conditioned"),
    [("ddpm_cache", 3, 0.3, False), ("ddpm", 2, 0.4, True), ("ddpm", 7, 1e-5, False)],
)
def test_whole_texts_are_distributed_as_the_loop_distributes_them(
    tmp_path: Path, sampler: str, steps: int, eps: float, conditioned: bool
) -> None:
    model = small(2, conditioned)
    served = tiny.engine(model, tmp_path, max_rows=400, max_queue=1200)
    counts = drawn(served, ask(sampler, steps, eps), 1200)
    assert misfit(published(model, sampler, steps, eps, conditioned), counts) < 3.5
    # The counts would notice another last time, or another noise level.
    assert misfit(published(model, sampler, steps, 0.7, conditioned), counts) > 6
    if conditioned:
        assert misfit(published(model, sampler, steps, eps, told=False), counts) > 6


def test_the_last_masks_are_removed_at_the_last_noise_level(tmp_path: Path) -> None:
    """With one step and eps 0.8 most of the text is written by the noise removal."""
    model = small(5, True)
    served = tiny.engine(model, tmp_path, max_rows=400, max_queue=1200)
    expected = published(model, "ddpm", 1, 0.8, told=True)
    counts = drawn(served, ask("ddpm", 1, 0.8), 1200)
    assert misfit(expected, counts) < 3.5
    request, _ = tiny.solo(served, ask("ddpm", 1, 0.8, seed=1, ignore_eos=True))
    assert tiny.MASK not in request.response
    assert request.step == 2


def test_one_row_goes_through_the_canvases_of_a_loop_at_their_noise_levels(tmp_path: Path) -> None:
    """At temperature 0 only which positions commit is drawn: the tokens are those of the step at which they do."""
    for seed in range(3):
        model = tiny.mdlm(seed, time_conditioning=True)
        served = tiny.engine(model, tmp_path / str(seed))
        for steps, eps in ((1, 0.5), (4, 0.3), (9, 1e-5), (40, 0.1), (100, 1e-5)):
            asked = ask("ddpm", steps, eps, max_tokens=12, temperature=0.0, seed=seed, ignore_eos=True)
            request = served.admit(asked)
            served.add([request])
            x = [tiny.EOS, 5, *[tiny.MASK] * 12, 6]
            for event in tiny.drain(served):
                if not isinstance(event, Committed):
                    continue
                logits = logits_of(model, [x], noise(1 - (1 - eps) * event.step / steps))[0]
                logits[:, [tiny.MASK, tiny.EOS]] = -math.inf
                want = logits.argmax(1).tolist()
                if event.step == steps:
                    assert list(event.positions) == [i - 2 for i, token in enumerate(x) if token == tiny.MASK]
                assert event.step <= steps
                for position, token in zip(event.positions, event.tokens, strict=True):
                    assert token == want[position + 2]
                    x[position + 2] = token
            assert x[2:-1] == request.response
            assert tiny.MASK not in x


@pytest.mark.parametrize("conditioned", [False, True], ids=["plain", "time"])
def test_steps_that_commit_nothing_cost_no_forward_and_change_nothing(tmp_path: Path, conditioned: bool) -> None:
    model = tiny.mdlm(3, time_conditioning=conditioned)
    served = tiny.engine(model, tmp_path)
    for seed in range(1):
        window = {"type": "window", "start": 0.25, "stop": 0.75}
        push = Intervention(attribute="topic/sports", strength=1.5, schedule=window)
        plain = ask(
            "ddpm_cache", 100, 1e-5, max_tokens=8, seed=seed, ignore_eos=True, interventions=(push,), logprobs=True
        )
        [(request, result)] = tiny.run(served, plain)
        assert result.forward_passes <= 8 < result.steps <= 101
        [(other, traced)] = tiny.run(served, replace(plain, trace=TraceParams(("topic/sports",))))
        assert traced.forward_passes == traced.steps == result.steps
        assert len(traced.trace) == traced.steps
        assert other.response == request.response
        assert traced.logprobs == result.logprobs
        [(third, sometimes)] = tiny.run(served, replace(plain, trace=TraceParams(("topic/sports",), every=50)))
        assert third.response == request.response
        assert [t.step for t in sometimes.trace] == [t.step for t in traced.trace if t.step % 50 == 0]
        assert [t.values for t in sometimes.trace] == [t.values for t in traced.trace if t.step % 50 == 0]


@pytest.mark.parametrize("conditioned", [False, True], ids=["plain", "time"])
def test_steering_takes_effect_at_the_step_whose_gain_it_is(tmp_path: Path, conditioned: bool) -> None:
    """A window of progress: the tokens committed inside are those of a model that is pushed, the others are not."""
    changed = 0
    for seed in range(4):
        model = tiny.mdlm(seed, time_conditioning=conditioned)
        served = tiny.engine(model, tmp_path / str(seed))
        attribute = served.catalogue.attributes["topic/sports"]
        direction = attribute.directions[1, "sae"] * 12.0
        push = Intervention(
            attribute="topic/sports", strength=2.0, scope="masked",
            schedule={"type": "window", "start": 0.25, "stop": 0.75, "norm": "peak"},
        )  # fmt: skip
        asked = ask(
            "ddpm_cache", 100, 1e-5, max_tokens=8, temperature=0.0, seed=seed, ignore_eos=True, interventions=(push,)
        )
        request = served.admit(asked)
        served.add([request])
        x = [tiny.EOS, 5, *[tiny.MASK] * 8, 6]
        for event in tiny.drain(served):
            if not isinstance(event, Committed):
                continue
            masked = torch.tensor([token == tiny.MASK for token in x])
            inside = 2 <= 8 - int(masked.sum()) < 6
            level = torch.tensor([noise(1 - (1 - 1e-5) * event.step / 100)])

            def steer(
                layer: int, hidden: Tensor, masked: Tensor = masked, inside: bool = inside, v: Tensor = direction
            ) -> Tensor:
                return hidden + masked[None, :, None] * v if inside and layer == 1 else hidden

            with torch.no_grad():
                pushed, plain = (model.head(model(torch.tensor([x]), None, s, level))[0] for s in (steer, None))
            for logits in (pushed, plain):
                logits[:, [tiny.MASK, tiny.EOS]] = -math.inf
            for position, token in zip(event.positions, event.tokens, strict=True):
                assert token == int(pushed[position + 2].argmax())
                changed += token != int(plain[position + 2].argmax())
            for position, token in zip(event.positions, event.tokens, strict=True):
                x[position + 2] = token
    assert changed > 3


SCOPES: list[Scope] = ["masked", "all", (0, 1)]


def rows(conditioned: bool, seed: int, count: int = 24) -> list[GenerationParams]:
    """Rows that share nothing: sampler, steps, lengths, guidance, steering, traces and noise."""
    random, made = Random(seed), []
    for i in range(count):
        length = random.choice([1, 5, 12, 17, 30])
        sampler = random.choice(["ddpm", "ddpm_cache", "origin"])
        asked = ask(
            sampler, random.choice([1, 4, length, 90]), random.choice([1e-5, 0.3]), max_tokens=length,
            prompt=tuple(random.randrange(5, 97) for _ in range(random.randrange(1, 9))),
            suffix=random.choice([(), (70, 8)]), temperature=random.choice([0.0, 0.6, 1.0]),
            top_p=random.choice([1.0, 0.8]), cfg_scale=random.choice([0.0, 0.0, 1.5]), seed=random.randrange(5), row=i,
            logprobs=True, ignore_eos=random.choice([True, False]),
        )  # fmt: skip
        if i % 4 == 3:
            order = random.choice(["sae_stability", "confidence", "margin", "random"])
            transfer = random.choice(["linear", "cosine", "timesteps", "entropy_bound"])
            block = random.choice([1, length]) if not conditioned else None
            steps = random.choice([1, 2]) * length if block == 1 else random.choice([1, 3, 40])
            asked = replace(asked, order=order, transfer=transfer, block_length=block, steps=steps)
        if i % 2:
            name = random.choice(["topic/sports", "register/archaic"])
            scope: Scope = random.choice(SCOPES)
            schedule = random.choice([None, {"type": "window", "start": 0.3, "stop": 0.8}])
            push = Intervention(attribute=name, strength=random.uniform(-0.5, 0.8), scope=scope, schedule=schedule)
            asked = replace(asked, interventions=(push,))
        if i % 3 == 0:
            asked = replace(
                asked, trace=TraceParams(("topic/sports", "register/archaic"), every=random.randrange(1, 9))
            )
        made.append(asked)
    return made


@pytest.mark.parametrize("conditioned", [False, True], ids=["plain", "time"])
@pytest.mark.parametrize("seed", [1])
def test_rows_in_a_batch_are_the_rows_alone(tmp_path: Path, seed: int, conditioned: bool) -> None:
    served = tiny.engine(tiny.mdlm(5, time_conditioning=conditioned), tmp_path, max_rows=13)
    assert_alone_as_together(served, rows(conditioned, seed), seed)


def test_a_model_that_is_told_its_noise_level_takes_no_blocks(tmp_path: Path) -> None:
    asked = ask("ddpm", 4, 1e-5, max_tokens=8, block_length=4)
    with pytest.raises(RequestError) as refused:
        tiny.engine(tiny.mdlm(time_conditioning=True), tmp_path / "time").admit(asked)
    assert refused.value.param == "block_length"
    assert tiny.engine(tiny.mdlm(), tmp_path / "plain").admit(asked).blocks == 2


@pytest.mark.parametrize(
    "transfer", ["analytic", "euler", {"type": "ddpm", "eps": 2}, {"type": "ddpm_cache", "eps": 0.0}]
)
def test_what_is_no_method_is_refused(tmp_path: Path, transfer: Any) -> None:
    served = tiny.engine(tiny.mdlm(), tmp_path)
    with pytest.raises(RequestError) as refused:
        served.admit(replace(ask("ddpm", 4, 1e-5), transfer=transfer))
    assert refused.value.param == "transfer"
