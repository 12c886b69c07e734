"""What the tests of published loops share: exact distributions over whole texts, and the engine's own draws of them."""

import itertools
import math
import random
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from steerserve.engine.api.params import GenerationParams
from steerserve.engine.engine import TorchEngine
from steerserve.models import DiffusionLM
from tests import tiny

Canvas = tuple[int, ...]
Step = Callable[[Canvas, Tensor], Iterable[tuple[float, Canvas]]]
"""What a step of a loop may make of a canvas, given its logits [length, vocabulary] float64: chances and canvases."""


@torch.no_grad()
def logits_of(model: DiffusionLM, canvases: Sequence[Sequence[int]], sigma: float | None = None) -> Tensor:
    """Raw logits [canvases, length, vocabulary] float64 of canvases of one length, at the position they are made."""
    level = None if sigma is None else torch.full((len(canvases),), sigma)
    return model.head(model(torch.tensor(canvases), None, None, level)).double()


def exact(model: DiffusionLM, start: Canvas, stages: Iterable[tuple[float | None, Step]]) -> dict[Canvas, float]:
    """The distribution over canvases after stages, each the noise level that the model is told and a step."""
    found: dict[Canvas, float] = {start: 1.0}
    for sigma, step in stages:
        after: defaultdict[Canvas, float] = defaultdict(float)
        canvases = list(found)
        for canvas, logits in zip(canvases, logits_of(model, canvases, sigma), strict=True):
            for chance, made in step(canvas, logits):
                after[made] += found[canvas] * chance
        found = after
    assert sum(found.values()) == pytest.approx(1, abs=1e-9)
    return found


def each_by_itself(canvas: Canvas, options: Mapping[int, Mapping[int, float]]) -> Iterator[tuple[float, Canvas]]:
    """All canvases where each position of `options` takes one of its tokens, with the chances of taking them."""
    for tokens in itertools.product(*(options[position].items() for position in options)):
        made, chance = list(canvas), 1.0
        for position, (token, share) in zip(options, tokens, strict=True):
            made[position] = token
            chance *= share
        if chance > 0:
            yield chance, tuple(made)


def settled(response: Sequence[int], eos: int) -> Canvas:
    """A response as far as it is one: up to its first end of text, behind which the engine need not write."""
    held = list(response)
    return tuple(held[: held.index(eos) + 1] if eos in held else held)


def settled_responses(found: Mapping[Canvas, float], first: int, length: int, eos: int) -> dict[Canvas, float]:
    """The distribution of what is settled of the response of `length` that stands at `first` in each canvas."""
    told: defaultdict[Canvas, float] = defaultdict(float)
    for canvas, chance in found.items():
        told[settled(canvas[first : first + length], eos)] += chance
    return told


def drawn(served: TorchEngine, params: GenerationParams, count: int) -> Counter[Canvas]:
    """What the engine writes, `count` times with different seeds, as many rows at once as it takes."""
    eos = served.model.facts.eos_id
    rows = tiny.run(served, *(replace(params, seed=seed) for seed in range(count)))
    return Counter(settled(request.response, eos) for request, _ in rows)


def misfit(expected: Mapping[Canvas, float], counts: Counter[Canvas]) -> float:
    """Chi-square of counts against a distribution, as standard deviations above its mean (Wilson and Hilferty).

    What is expected fewer than 8 times shares one bin; what cannot be is infinitely far off.
    """
    total = sum(counts.values())
    if any(expected.get(outcome, 0.0) <= 0 for outcome in counts):
        return math.inf
    bins, rare, rare_seen = [], 0.0, 0
    for outcome, chance in expected.items():
        if chance * total >= 8:
            bins.append((chance * total, counts[outcome]))
        else:
            rare, rare_seen = rare + chance * total, rare_seen + counts[outcome]
    if rare >= 8:
        bins.append((rare, rare_seen))
    freedom = len(bins) - 1
    chi = sum((seen - share) ** 2 / share for share, seen in bins)
    spread = 2 / (9 * freedom)
    return float(((chi / freedom) ** (1 / 3) - (1 - spread)) / math.sqrt(spread))


def rounded(value: Any) -> Any:
    """JSON with floats to compare to five digits."""
    if isinstance(value, dict):
        return {key: rounded(one) for key, one in value.items()}
    if isinstance(value, list):
        return [rounded(one) for one in value]
    return pytest.approx(value, rel=1e-5) if isinstance(value, float) else value


def assert_alone_as_together(served: TorchEngine, asked: Sequence[GenerationParams], seed: int) -> None:
    """Rows that join late, leave early and stand beside aborted ones say all that they say when they run alone, to the
    last bit of every log-probability and reading."""
    chance = random.Random(seed)
    requests = [served.admit(params) for params in asked]
    pending, events, aborted = list(requests), [], set()
    while pending or served.waiting or served.running:
        for _ in range(min(len(pending), chance.randrange(4))):
            served.add([pending.pop(chance.randrange(len(pending)))])
        events += served.step()
        if served.running and chance.random() < 0.05:
            victim = chance.choice(served.running).id
            aborted.add(victim)
            served.abort(victim)
    found = tiny.results(events)
    assert len(found) >= len(requests) * 2 // 3
    for request in requests:
        if request.id not in found:
            assert request.id in aborted
            continue
        together = found[request.id]
        [(other, alone)] = tiny.run(served, request.params)
        assert other.response == request.response, request.params
        assert (alone.tokens, alone.text, alone.finish_reason) == (
            together.tokens,
            together.text,
            together.finish_reason,
        )
        assert (alone.steps, alone.forward_passes) == (together.steps, together.forward_passes), request.params
        # Sums of ratios are added up in another order.
        assert alone.receipt == rounded(together.receipt)
        assert [(t.step, t.progress) for t in alone.trace] == [(t.step, t.progress) for t in together.trace]
        read = [([*(one.logprobs or ())], [t.values for t in one.trace]) for one in (alone, together)]
        assert read[0] == read[1]
