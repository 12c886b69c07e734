"""Fast-dLLM's published loops at its published settings, written down from their description, token for token.

Loops: Wu et al. (arXiv 2505.22618), section 3.3 and the released commands: threshold 0.9, blocks of which each is given
one step and goes on until it is full. For LLaDA without a cache, with the prefix and with the dual cache; for Dream
without one, where what is not sure is carried over from step to step, and with either, where the forward that begins a
block commits its first token alone; Dream's caches with its own times and entropies as well.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from steerserve.engine.api.params import GenerationParams
from steerserve.errors import RequestError
from steerserve.models import DiffusionLM
from tests import tiny
from tests.engine.cached_reference import Net

LENGTH, BLOCK, VALUE = 32, 8, 0.9
PROMPTS = ((9, 8, 7, 60), (63,), (5, 60, 61, 70, 12, 13))
PLAIN = GenerationParams(
    prompt=PROMPTS[0],
    max_tokens=LENGTH,
    block_length=BLOCK,
    steps=LENGTH // BLOCK,
    order="confidence",
    transfer={"type": "threshold", "value": VALUE},
    temperature=0.0,
    top_p=1.0,
    ignore_eos=True,
)


def sure(family: str, seed: int) -> DiffusionLM:
    """A model that is sure of some of its tokens, and never of its own mask."""
    model: DiffusionLM = getattr(tiny, family)(seed)
    head = {"llada": "model.transformer.ff_out.weight", "dream": "lm_head.weight"}[family]
    with torch.no_grad():
        model.get_parameter(head).mul_(4.0)
        model.get_parameter(head)[tiny.MASK] = 0.0
    return model


def candidates(
    net: Net, states: torch.Tensor, ends: Sequence[int], by_entropy: bool = False
) -> list[tuple[float, int]]:
    """Each state's argmax: how sure it is, its probability or the negative entropy, and the token."""
    logits = net.logits(states)
    logits[:, list(ends)] = -torch.inf
    shares = logits.softmax(1)
    best = shares.max(1)
    sureness = (shares * (shares + 1e-10).log()).sum(1) if by_entropy else best.values
    return list(zip(sureness.tolist(), best.indices.tolist(), strict=True))


def kept(found: dict[int, tuple[float, int]], most: int) -> list[int]:
    """Of positions with their candidates the `most` likeliest, without those that are not sure, the first excepted."""
    ranked = sorted(found, key=lambda i: -found[i][0])[:most]
    return ranked[:1] + [i for i in ranked[1:] if found[i][0] >= VALUE]


def in_blocks(
    net: Net, prompt: Sequence[int], cache: str | None, ends: Sequence[int], timed: int | None = None
) -> tuple[list[int], int]:
    """The loop over blocks: the response, and the forwards it took; `timed` steps to a block by their times instead of
    the threshold."""
    shift = int(net.family == "dream")
    x, past, forwards = [*prompt, *[tiny.MASK] * LENGTH], net.empty(len(prompt) + LENGTH), 0
    for first in range(len(prompt), len(x), BLOCK):
        last, step = first + BLOCK, 0
        while tiny.MASK in x[first:last]:
            whole = step == 0 or cache is None
            places = list(range(len(x))) if whole else list(range(first, last if cache == "dual" else len(x)))
            made = candidates(net, net.states(x, places, past), ends, timed is not None)
            told = dict(zip(places, made, strict=True))
            if shift and step == 0:
                x[first] = told[first - 1][1]
            else:
                found = {i: told[i - shift] for i in range(first, last) if x[i] == tiny.MASK}
                if timed is None:
                    taken = kept(found, len(found))
                else:
                    t, s = torch.linspace(1, 1e-3, timed + 1)[step : step + 2]
                    count = int(len(found) * (1 - s / t)) if step < timed - 1 else len(found)
                    taken = sorted(found, key=lambda i: -found[i][0])[:count]
                for i in taken:
                    x[i] = found[i][1]
            forwards, step = forwards + 1, step + 1
    return x[len(prompt) :], forwards


def carried_over(net: Net, prompt: Sequence[int], pace: int, ends: Sequence[int]) -> tuple[list[int], int]:
    """Dream's loop without a cache: the whole response at once, so many more positions at each step."""
    x = [*prompt, *[tiny.MASK] * LENGTH]
    steps, step, left = LENGTH // pace, 0, 0
    while step < steps or left:
        made = candidates(net, net.states(x, list(range(len(x))), net.empty(len(x))), ends)
        found = {i: made[i - 1] for i, token in enumerate(x) if token == tiny.MASK}
        most = left + (pace if step < steps else 0)
        taken = kept(found, most)
        for i in taken:
            x[i] = found[i][1]
        left, step = most - len(taken), step + 1
    return x[len(prompt) :], step


def run(tmp_path: Path, family: str, **changes: Any) -> list[tuple[Net, Sequence[int], list[int], int, Any]]:
    """For models and prompts: the model taken apart, the prompt, its end tokens, and what the engine made of it."""
    found: list[tuple[Net, Sequence[int], list[int], int, Any]] = []
    for seed in range(3):
        model = sure(family, seed)
        served = tiny.engine(model, tmp_path / str(seed))
        asked = [replace(PLAIN, prompt=prompt, **changes) for prompt in PROMPTS]
        for prompt, (request, result) in zip(PROMPTS, tiny.run(served, *asked), strict=True):
            found.append((Net.of(model), prompt, list(model.facts.end_ids), len(request.made), (request, result)))
    return found


@pytest.mark.parametrize("steps", [4, 16])
@pytest.mark.parametrize("cache", [None, "prefix", "dual"])
def test_llada_is_written_as_published(tmp_path: Path, cache: str | None, steps: int) -> None:
    took = set()
    for net, prompt, ends, forwards, (request, result) in run(tmp_path, "llada", cache=cache, steps=steps):
        assert (request.response, forwards) == in_blocks(net, prompt, cache, ends)
        assert result.steps == forwards <= request.plan["max_steps"] == LENGTH
        took.add(forwards)
    assert max(took) > 16, "the steps that were asked for would have done"
    assert min(took) < LENGTH, "nothing was ever sure"


@pytest.mark.parametrize("cache", ["prefix", "dual"])
def test_dream_with_a_cache_is_written_as_published(tmp_path: Path, cache: str) -> None:
    differ = 0
    options = {"type": cache, "first_alone": True}
    for net, prompt, ends, forwards, (request, _) in run(tmp_path, "dream", cache=options):
        assert (request.response, forwards) == in_blocks(net, prompt, cache, ends)
        assert request.plan["approximate"][1]["first_alone"] is True
        differ += (request.response, forwards) != in_blocks(net, prompt, None, ends)
    assert differ


def test_dream_without_a_cache_is_written_as_published(tmp_path: Path) -> None:
    transfer, differ = {"type": "threshold", "value": VALUE, "pace": BLOCK}, 0
    for net, prompt, ends, forwards, (request, _) in run(tmp_path, "dream", transfer=transfer, block_length=None):
        assert (request.response, forwards) == carried_over(net, prompt, BLOCK, ends)
        differ += (request.response, forwards) != carried_over(net, prompt, LENGTH, ends)
    assert differ, "the pace never held anything back"


def test_first_alone_is_of_dream_and_of_its_transfers(tmp_path: Path) -> None:
    asked = replace(PLAIN, cache={"type": "dual", "first_alone": True})
    for family, transfer in (("llada", "threshold"), ("dream", "linear"), ("dream", "origin")):
        served = tiny.engine(sure(family, 0), tmp_path / f"{family}-{transfer}")
        with pytest.raises(RequestError, match="first_alone") as refused:
            served.admit(replace(asked, transfer=transfer))
        assert refused.value.param == "cache"


@pytest.mark.parametrize("cache", ["prefix", "dual"])
def test_dream_with_a_cache_and_its_own_times_is_written_as_published(tmp_path: Path, cache: str) -> None:
    changes = {"transfer": "timesteps", "order": {"type": "entropy", "filtered": True}, "steps": 20}
    options = {"type": cache, "first_alone": True}
    for net, prompt, ends, _, (request, result) in run(tmp_path, "dream", cache=options, **changes):
        assert request.response == in_blocks(net, prompt, cache, ends, timed=5)[0]
        assert result.steps == 20


@pytest.mark.parametrize("transfer", [{"type": "threshold", "value": 1.0}, {"type": "entropy_bound", "value": 0.0}])
def test_steps_do_not_bind_a_transfer_that_follows_the_model(tmp_path: Path, transfer: dict[str, Any]) -> None:
    """One token a step is all that these values allow, however few steps are asked for."""
    for family in ("llada", "dream"):
        served = tiny.engine(sure(family, 1), tmp_path / family)
        [(request, result)] = tiny.run(served, replace(PLAIN, transfer=transfer, steps=4))
        [(_, linear)] = tiny.run(served, replace(PLAIN, transfer="linear", steps=LENGTH))
        assert (result.steps, result.tokens) == (LENGTH, linear.tokens)
        assert (request.plan["steps"], request.plan["steps_bind"], request.plan["max_steps"]) == (4, False, LENGTH)
        [told] = result.receipt["approximate"] if result.receipt else []
        assert (told["most_steps"], told["positions_at_bound"]) == (LENGTH, 0)


def test_what_is_left_of_a_row_is_counted_by_its_bound(tmp_path: Path) -> None:
    """Estimates of what a server has to do hold the most steps that such a row may make, and never fewer."""
    served = tiny.engine(sure("llada", 1), tmp_path)
    request = served.admit(replace(PLAIN, steps=4))
    served.add([request])
    lefts = []
    while not request.finished:
        lefts.append(request.steps_left)
        served.step()
    assert lefts[0] == LENGTH
    assert all(left >= len(lefts) - made for made, left in enumerate(lefts))
    assert all(one > other for one, other in zip(lefts, lefts[1:], strict=False))


def test_a_row_makes_no_more_steps_than_the_server_allows_and_says_what_that_cost(tmp_path: Path) -> None:
    served = tiny.engine(sure("llada", 1), tmp_path, max_steps=12)
    [(request, result)] = tiny.run(served, replace(PLAIN, transfer={"type": "threshold", "value": 1.0}))
    assert request.plan["max_steps"] == result.steps == 12
    assert tiny.MASK not in request.response
    [told] = result.receipt["approximate"] if result.receipt else []
    # One a step, and at the last of a block's three all that is left.
    assert (told["most_steps"], told["positions_at_bound"]) == (12, LENGTH - 12)
