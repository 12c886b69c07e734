"""LLaDA's published loop, written down from its description, against the engine, token for token.

Loop: Nie et al. (arXiv 2502.09992), low-confidence remasking, temperature 0, semi-autoregressive blocks.
"""

from pathlib import Path

import pytest
import torch

from steerserve.engine.events import Committed
from steerserve.engine.params import GenerationParams
from steerserve.models import DiffusionLM
from tests import tiny


@torch.no_grad()
def published(
    model: DiffusionLM, prompt: list[int], gen_length: int, block_length: int, steps: int, eos: bool = True
) -> tuple[list[int], list[list[int]]]:
    """The response, and the positions that became tokens at each step, in the loop's own order."""
    x = prompt + [tiny.MASK] * gen_length
    blocks = gen_length // block_length
    per_block = steps // blocks
    taken = []
    for block in range(blocks):
        first = len(prompt) + block * block_length
        last = first + block_length
        masks = sum(1 for token in x[first:last] if token == tiny.MASK)
        table = [masks // per_block] * per_block
        for step in range(masks % per_block):
            table[step] += 1
        for count in table:
            logits = model.head(model(torch.tensor([x])))[0].double()
            if not eos:
                logits[:, tiny.EOS] = float("-inf")
            probability = logits.softmax(dim=1)
            candidate = logits.argmax(dim=1).tolist()
            confidence = {i: float(probability[i, candidate[i]]) for i in range(last) if x[i] == tiny.MASK}
            best = sorted(confidence, key=lambda i: -confidence[i])[:count]
            for i in best:
                x[i] = candidate[i]
            taken.append(sorted(i - len(prompt) for i in best if x[i] != tiny.MASK))
    return x[len(prompt) :], taken


SHAPES = [
    (16, 16, 16),
    (16, 16, 5),
    (16, 4, 8),
    (24, 8, 9),
    (24, 8, 3),
    (20, 5, 32),
    (12, 12, 30),
    (18, 6, 6),
    (1, 1, 1),
    (1, 1, 4),
]


def ask(prompt: list[int], shape: tuple[int, int, int], ignore_eos: bool = False) -> GenerationParams:
    gen_length, block_length, steps = shape
    return GenerationParams(
        prompt=tuple(prompt),
        max_tokens=gen_length,
        block_length=block_length,
        steps=steps,
        temperature=0.0,
        order="confidence",
        transfer="linear",
        ignore_eos=ignore_eos,
    )


def without_mask(tokens: list[int]) -> list[int]:
    cut = tokens[: tokens.index(tiny.EOS)] if tiny.EOS in tokens else tokens
    return [token for token in cut if token != tiny.MASK]


@pytest.mark.parametrize("seed", range(4))
def test_the_engine_writes_what_the_published_loop_writes(tmp_path: Path, seed: int) -> None:
    model = tiny.llada(seed)
    served = tiny.engine(model, tmp_path)
    prompts = [[5, 60, 61], [63, 7, 8, 9, 10, 60], [80] * 11]
    asked = [(prompt, shape) for prompt in prompts for shape in SHAPES]
    rows = tiny.run(served, *(ask(prompt, shape, ignore_eos=True) for prompt, shape in asked))
    for (prompt, shape), (request, result) in zip(asked, rows, strict=True):
        want, _ = published(model, prompt, *shape, eos=False)
        assert request.response == want
        assert list(result.tokens) == without_mask(want)


@pytest.mark.parametrize("seed", range(4))
def test_every_step_takes_the_positions_of_the_published_step(tmp_path: Path, seed: int) -> None:
    model = tiny.llada(10 + seed)
    served = tiny.engine(model, tmp_path)
    for shape in SHAPES[:5]:
        request = served.admit(ask([5, 60, 61], shape, ignore_eos=True))
        served.add([request])
        steps: dict[int, list[int]] = {}
        for event in tiny.drain(served):
            if isinstance(event, Committed):
                steps[event.step] = sorted(event.positions)
        _, taken = published(model, [5, 60, 61], *shape, eos=False)
        assert [steps.get(i, []) for i in range(len(taken))] == taken


def test_a_mask_that_the_model_draws_stays_a_mask(tmp_path: Path) -> None:
    """Nothing forbids LLaDA its mask token; the loop writes it where it is drawn, and may come back to it."""
    drawn = 0
    for seed in range(12):
        model = tiny.llada(seed)
        with torch.no_grad():
            model.get_parameter("model.transformer.ff_out.weight")[tiny.MASK] *= 3.0
        for shape in ((12, 4, 6), (12, 12, 4)):
            served = tiny.engine(model, tmp_path / f"{seed}-{shape[1]}")
            [(request, result)] = tiny.run(served, ask([60, 61], shape))
            want, _ = published(model, [60, 61], *shape)
            finished = request.step == shape[2]
            if finished:
                assert request.response == want
                assert list(result.tokens) == without_mask(want)
            drawn += tiny.MASK in want
    assert drawn > 3


def test_text_behind_an_early_end_is_the_only_difference(tmp_path: Path) -> None:
    """The published loop has no early exit; stopping at an EOS changes nothing before it."""
    early = 0
    for seed in range(12):
        model = tiny.llada(seed)
        with torch.no_grad():
            model.get_parameter("model.transformer.ff_out.weight")[tiny.EOS] *= 2.0
        served = tiny.engine(model, tmp_path / str(seed))
        [(request, result)] = tiny.run(served, ask([60, 61], (16, 4, 16)))
        want, _ = published(model, [60, 61], 16, 4, 16)
        if tiny.EOS in want and tiny.MASK not in want:
            assert list(result.tokens) == want[: want.index(tiny.EOS)]
            assert result.finish_reason == "stop"
            early += request.step < 16
    assert early > 0
