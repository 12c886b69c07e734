"""SEDD's published predictors, written down from their description, against the engine in distribution.

Loops: the analytic (Tweedie) and Euler predictors of SEDD (arXiv 2310.16834, section 4.2) on the absorbing graph, and
the final denoising, which draws what is left; chances below 0, which a step too large gives, are none.
"""

import math
from collections.abc import Callable, Iterator
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
    misfit,
    settled_responses,
)

VOCAB, MASK, EOS = 8, 7, 6
START = (5, MASK, MASK, MASK, 4)
LOW, HIGH = 0.1, 2.0


def total(noise: str, time: float) -> float:
    return -math.log1p(-(1 - 1e-3) * time) if noise == "loglinear" else LOW ** (1 - time) * HIGH**time


def rate(noise: str, time: float) -> float:
    if noise == "loglinear":
        return (1 - 1e-3) / (1 - (1 - 1e-3) * time)
    return total(noise, time) * (math.log(HIGH) - math.log(LOW))


def scores(logits: Tensor, canvas: Canvas, sigma: float, scaled: bool) -> Tensor:
    """Ratios [length, vocabulary] of each token to the one that is there."""
    vocabulary = logits.shape[1]
    if scaled:
        logits = logits - math.log(math.expm1(sigma)) - math.log(vocabulary - 1)
    return logits.scatter(1, torch.tensor(canvas)[:, None], 0.0).exp()


def tweedie(score: Tensor, canvas: Canvas, step: float) -> Tensor:
    """The staggered score times the row of the transition matrix, [length, vocabulary]."""
    mask = score.shape[1] - 1
    staggered = score * math.exp(step)
    staggered[:, mask] += (1 - math.exp(step)) * score.sum(1)
    row = math.exp(-step) * torch.eye(mask + 1, dtype=torch.float64)[list(canvas)]
    row[[token == mask for token in canvas]] += 1 - math.exp(-step)
    return staggered * row


def euler(score: Tensor, canvas: Canvas, step: float) -> Tensor:
    """Where the canvas is, plus a step (dt times the rate) of the reverse process, [length, vocabulary]."""
    mask = score.shape[1] - 1
    there = torch.eye(mask + 1, dtype=torch.float64)[list(canvas)]
    edges = -there
    edges[[token == mask for token in canvas]] += 1
    reverse = edges * score
    reverse = reverse.scatter(1, torch.tensor(canvas)[:, None], 0.0)
    reverse = reverse.scatter(1, torch.tensor(canvas)[:, None], -reverse.sum(1, keepdim=True))
    return there + step * reverse


def each_drawn(canvas: Canvas, chances: Tensor) -> Iterator[tuple[float, Canvas]]:
    """Every position drawn by its chances [length, vocabulary]; those below 0 never win."""
    chances = chances.clamp(min=0)
    chances = chances / chances.sum(1, keepdim=True)
    options = {i: {token: p for token, p in enumerate(row) if p > 0} for i, row in enumerate(chances.tolist())}
    return each_by_itself(canvas, options)


def published(
    model: DiffusionLM, predictor: str, noise: str, steps: int, eps: float, scaled: bool = True, late: bool = False
) -> dict[Canvas, float]:
    """The exact distribution of the response of START; late: with the noise level of each step's end, a mistake."""
    times = torch.linspace(1, eps, steps + 1, dtype=torch.float64).tolist()
    dt = (1 - eps) / steps
    stages: list[tuple[float, Callable[[Canvas, Tensor], Iterator[tuple[float, Canvas]]]]] = []
    for time in times[:-1]:
        sigma = total(noise, time - dt if late else time)

        def step(canvas: Canvas, logits: Tensor, sigma: float = sigma, time: float = time) -> Iterator[Any]:
            score = scores(logits, canvas, sigma, scaled)
            if predictor == "analytic":
                return each_drawn(canvas, tweedie(score, canvas, total(noise, time) - total(noise, time - dt)))
            return each_drawn(canvas, euler(score, canvas, dt * rate(noise, time)))

        stages.append((sigma, step))
    last = total(noise, eps)

    def denoise(canvas: Canvas, logits: Tensor) -> Iterator[tuple[float, Canvas]]:
        chances = tweedie(scores(logits, canvas, last, scaled), canvas, last)
        chances[:, -1] = 0
        return each_drawn(canvas, chances)

    stages.append((last, denoise))
    return settled_responses(exact(model, START, stages), 1, 3, EOS)


def small(seed: int, noise: str, scaled: bool, level: float = 0.0) -> DiffusionLM:
    """A model whose texts can be counted: eight tokens, one of them the mask; level: added to every logit."""
    model = tiny.sedd(seed, VOCAB, noise, (LOW, HIGH), scaled)
    tiny.randomise(model, seed, 0.17)
    with torch.no_grad():
        model.get_parameter("backbone.output_layer.linear.bias").add_(level)
    return model


def ask(predictor: str, steps: int, eps: float, **changes: Any) -> GenerationParams:
    asked = GenerationParams(
        prompt=(5,), suffix=(4,), max_tokens=3, steps=steps, temperature=1.0, order="random",
        transfer={"type": predictor, "eps": eps},
    )  # fmt: skip
    return replace(asked, **changes)


CASES = [
    ("analytic", "loglinear", True, 0.0, 3, 0.2),
    ("euler", "loglinear", True, -0.7, 2, 1e-5),
    ("euler", "loglinear", False, -8.0, 3, 0.2),
    ("euler", "geometric", True, 0.0, 3, 0.1),
    ("analytic", "geometric", False, -3.8, 3, 0.1),
]
"""Predictor, noise, scale_by_sigma, what is added to the logits lest few steps write all at once, steps, eps."""


@pytest.mark.parametrize(("predictor", "noise", "scaled", "level", "steps", "eps"), CASES)
def test_whole_texts_are_distributed_as_the_loop_distributes_them(
    tmp_path: Path, predictor: str, noise: str, scaled: bool, level: float, steps: int, eps: float
) -> None:
    model = small(1, noise, scaled, level)
    served = tiny.engine(model, tmp_path, max_rows=400, max_queue=1200)
    counts = drawn(served, ask(predictor, steps, eps), 1200)
    assert misfit(published(model, predictor, noise, steps, eps, scaled), counts) < 3.5
    assert misfit(published(model, predictor, noise, steps, eps, scaled, late=True), counts) > 6


def test_what_is_left_is_denoised_by_draws_at_the_last_noise_level(tmp_path: Path) -> None:
    """With eps 0.8 nearly everything is written by the step after the last."""
    model = small(3, "geometric", True, -1.0)
    served = tiny.engine(model, tmp_path, max_rows=400, max_queue=1200)
    counts = drawn(served, ask("euler", 1, 0.8), 1200)
    assert misfit(published(model, "euler", "geometric", 1, 0.8), counts) < 3.5
    late = 0
    for seed in range(20):
        request, events = tiny.solo(served, ask("euler", 1, 0.8, seed=seed, ignore_eos=True))
        assert MASK not in request.response
        late += any(isinstance(event, Committed) and event.step == 1 for event in events)
    assert late > 10


def test_steps_too_large_for_the_ratios_write_everything(tmp_path: Path) -> None:
    """Where the chances of a position's tokens come to more than 1, it is sure to be written, by their shares."""
    model = small(4, "loglinear", True, 3.0)
    served = tiny.engine(model, tmp_path, max_rows=400, max_queue=1200)
    for predictor in ("analytic", "euler"):
        counts = drawn(served, ask(predictor, 2, 1e-5), 1200)
        assert misfit(published(model, predictor, "loglinear", 2, 1e-5), counts) < 3.5


SCOPES: list[Scope] = ["masked", "all", (0, 1)]


def rows(seed: int, count: int = 24) -> list[GenerationParams]:
    """Rows that share nothing: sampler, steps, lengths, steering, traces and noise."""
    random, made = Random(seed), []
    for i in range(count):
        length = random.choice([1, 5, 12, 17, 30])
        asked = ask(
            random.choice(["analytic", "euler"]), random.choice([1, 4, length, 60]), random.choice([1e-5, 0.3]),
            prompt=tuple(random.randrange(5, 90) for _ in range(random.randrange(9))), max_tokens=length,
            suffix=random.choice([(), (70, 8)]), temperature=random.choice([0.0, 0.6, 1.0]),
            top_p=random.choice([1.0, 0.8]), top_k=random.choice([None, 5]), seed=random.randrange(5), row=i,
            logprobs=True, ignore_eos=random.choice([True, False]),
        )  # fmt: skip
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


@pytest.mark.parametrize("scaled", [True, False])
@pytest.mark.parametrize(("seed", "noise"), [(1, "loglinear"), (2, "geometric")])
def test_rows_in_a_batch_are_the_rows_alone(tmp_path: Path, seed: int, noise: str, scaled: bool) -> None:
    model = tiny.sedd(5, noise=noise, scale_by_sigma=scaled)
    served = tiny.engine(model, tmp_path, max_rows=13)
    assert_alone_as_together(served, rows(seed), seed)


@pytest.mark.parametrize(
    ("field", "changes"),
    [
        ("order", {"order": "confidence"}),
        ("order", {"order": "sae_stability"}),
        ("order", {"order": {"type": "entropy", "alg_temp": 0.5}}),
        ("transfer", {"transfer": "linear"}),
        ("transfer", {"transfer": "ddpm_cache"}),
        ("transfer", {"transfer": "origin"}),
        ("transfer", {"transfer": {"type": "analytic", "eps": 0}}),
        ("transfer", {"transfer": {"type": "euler", "eps": 1}}),
        ("cfg_scale", {"cfg_scale": 1.0}),
        ("ends_last", {"ends_last": True}),
        ("block_length", {"max_tokens": 8, "block_length": 4}),
    ],
)
def test_what_is_no_method_is_refused(tmp_path: Path, field: str, changes: dict[str, Any]) -> None:
    served = tiny.engine(tiny.sedd(), tmp_path)
    with pytest.raises(RequestError) as refused:
        served.admit(replace(ask("analytic", 4, 1e-5), **changes))
    assert refused.value.param == field
