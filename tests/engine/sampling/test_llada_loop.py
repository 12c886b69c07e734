"""LLaDA's published loop, written down from its description, against the engine, token for token.

Loop: Nie et al. (arXiv 2502.09992), low-confidence and random remasking, semi-autoregressive blocks, classifier-free
guidance and the two options for tokens that end the text.
"""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from random import Random

import pytest
import torch
from torch import Tensor

from steerserve.engine.api.events import Committed
from steerserve.engine.api.params import GenerationParams, Intervention, TraceParams
from steerserve.errors import RequestError
from steerserve.models import DiffusionLM
from tests import tiny
from tests.engine.loops import Canvas, assert_alone_as_together, drawn, each_by_itself, exact, misfit, settled_responses

TURN_END = 6


@torch.no_grad()
def published(
    model: DiffusionLM,
    prompt: list[int],
    gen_length: int,
    block_length: int,
    steps: int,
    eos: bool = True,
    suffix: Sequence[int] = (),
    cfg: float = 0.0,
    late: Sequence[int] = (),
) -> tuple[list[int], list[list[int]]]:
    """The response, and the positions that became tokens at each step, in the loop's own order.

    late: tokens whose confidence is taken away once the candidates are chosen.
    """
    x = prompt + [tiny.MASK] * gen_length + list(suffix)
    given = [i for i, token in enumerate(x) if token != tiny.MASK]
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
            if cfg > 0:
                unprompted = [tiny.MASK if i in given else token for i, token in enumerate(x)]
                plain = model.head(model(torch.tensor([unprompted])))[0].double()
                logits = plain + (cfg + 1) * (logits - plain)
            if not eos:
                logits[:, tiny.EOS] = float("-inf")
            candidate = logits.argmax(dim=1).tolist()
            logits[:, list(late)] = float("-inf")
            probability = logits.softmax(dim=1)
            confidence = {i: float(probability[i, candidate[i]]) for i in range(last) if x[i] == tiny.MASK}
            best = sorted(confidence, key=lambda i: -confidence[i])[:count]
            for i in best:
                x[i] = candidate[i]
            taken.append(sorted(i - len(prompt) for i in best if x[i] != tiny.MASK))
    return x[len(prompt) : len(prompt) + gen_length], taken


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


@pytest.mark.parametrize("seed", range(2))
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


@pytest.mark.parametrize("seed", range(2))
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


@pytest.mark.parametrize("suffix", [(), (70, 8, 9)], ids=["prompt", "suffix"])
@pytest.mark.parametrize("cfg", [0.5, 3.0])
def test_guidance_is_that_of_the_copy_without_the_prompt(tmp_path: Path, cfg: float, suffix: tuple[int, ...]) -> None:
    model, changed = tiny.llada(20), 0
    served = tiny.engine(model, tmp_path)
    asked = [replace(ask([5, 60, 61], shape, True), cfg_scale=cfg, suffix=suffix) for shape in SHAPES]
    for shape, (request, result) in zip(SHAPES, tiny.run(served, *asked), strict=True):
        want, _ = published(model, [5, 60, 61], *shape, eos=False, cfg=cfg, suffix=suffix)
        assert request.response == want
        # A guided row is two of the forward, and one forward all the same.
        assert result.forward_passes <= result.steps
        changed += want != published(model, [5, 60, 61], *shape, eos=False, suffix=suffix)[0]
    assert changed > 5


def test_guidance_by_the_suffix_alone(tmp_path: Path) -> None:
    model = tiny.llada(24)
    served = tiny.engine(model, tmp_path)
    asked = replace(ask([], (16, 4, 8), True), cfg_scale=1.5, suffix=(70, 8, 9))
    want, _ = published(model, [], 16, 4, 8, eos=False, cfg=1.5, suffix=(70, 8, 9))
    assert tiny.tokens_of(served, asked) == want


@pytest.mark.parametrize("eos", [True, False])
def test_ends_of_text_and_turn_that_come_last(tmp_path: Path, eos: bool) -> None:
    """`confidence_eos_eot_inf` at temperature 0, where both tokens lose their confidence; also with
    `logits_eos_inf`."""
    moved = 0
    for seed in range(5):
        model = tiny.llada(seed)
        model.facts = replace(model.facts, turn_end_id=TURN_END)
        with torch.no_grad():
            model.get_parameter("model.transformer.ff_out.weight")[[tiny.EOS, TURN_END]] *= 2.0
        served = tiny.engine(model, tmp_path / str(seed))
        for shape in ((12, 12, 12), (12, 6, 4), (9, 9, 4)):
            request = served.admit(replace(ask([60, 61], shape), logits_eos_inf=not eos, ends_last=True))
            served.add([request])
            steps: dict[int, list[int]] = {}
            for event in tiny.drain(served):
                if isinstance(event, Committed):
                    steps[event.step] = sorted(event.positions)
            want, taken = published(model, [60, 61], *shape, eos=eos, late=(tiny.EOS, TURN_END))
            # The engine stops where the text ends; until then it takes what the loop takes.
            assert [steps.get(i, []) for i in range(request.step)] == taken[: request.step]
            assert all(mine in (token, tiny.MASK) for mine, token in zip(request.response, want, strict=True))
            moved += taken != published(model, [60, 61], *shape, eos=eos)[1]
    assert moved > 3


def small(seed: int) -> DiffusionLM:
    """A model whose texts can be counted: eight tokens, one of them the mask, which LLaDA may draw."""
    model = tiny.llada(seed, vocab_size=8, embedding_size=8)
    tiny.randomise(model, seed, 0.25)
    return model


def commits(canvas: Canvas, shares: Tensor, taken: Sequence[int]) -> Iterator[tuple[float, Canvas]]:
    return each_by_itself(canvas, {i: dict(enumerate(shares[i].tolist())) for i in taken})


def remasked_at_random(canvas: Canvas, logits: Tensor, count: int, last: int) -> Iterator[tuple[float, Canvas]]:
    """A step that keeps `count` of the masks before `last`, any as likely as any other, at temperature 1."""
    masks = [i for i in range(last) if canvas[i] == tiny.MASK]
    kept = list(itertools.combinations(masks, min(count, len(masks))))
    for taken in kept:
        for chance, made in commits(canvas, logits.softmax(1), taken):
            yield chance / len(kept), made


def remasked_by_confidence(canvas: Canvas, logits: Tensor, count: int, last: int) -> Iterator[tuple[float, Canvas]]:
    """A step that draws a candidate at every mask before `last` and keeps the `count` likeliest."""
    masks = [i for i in range(last) if canvas[i] == tiny.MASK]
    shares = logits.softmax(1)
    for chance, made in commits(canvas, shares, masks):
        kept = sorted(masks, key=lambda i: -float(shares[i, made[i]]))[:count]
        yield chance, tuple(made[i] if i in kept else token for i, token in enumerate(canvas))


@pytest.mark.parametrize(("order", "other"), [("random", "confidence"), ("confidence", "random")])
@pytest.mark.parametrize("block_length", [3, 1])
def test_whole_texts_are_distributed_as_the_loop_distributes_them(
    tmp_path: Path, order: str, other: str, block_length: int
) -> None:
    model = small(1)
    served = tiny.engine(model, tmp_path, max_rows=400, max_queue=1200)
    start = (5, tiny.MASK, tiny.MASK, tiny.MASK, 7)
    # Three masks in two steps are two and one; three blocks of one mask each are one at a time, from the left.
    table = [(2, 4), (1, 4)] if block_length == 3 else [(1, 2), (1, 3), (1, 4)]
    rules = {"random": remasked_at_random, "confidence": remasked_by_confidence}
    expected = {}
    for name, rule in rules.items():
        stages = [
            (None, lambda canvas, logits, r=rule, c=count, e=last: r(canvas, logits, c, e)) for count, last in table
        ]
        expected[name] = settled_responses(exact(model, start, stages), 1, 3, tiny.EOS)
    params = GenerationParams(
        prompt=(5,), suffix=(7,), max_tokens=3, steps=len(table), block_length=block_length,
        order=order, transfer="linear", temperature=1.0,
    )  # fmt: skip
    counts = drawn(served, params, 1200)
    assert misfit(expected[order], counts) < 3.5
    if block_length == 3:
        assert misfit(expected[other], counts) > 6


def test_a_row_that_ends_among_idle_steps_says_nothing_of_other_rows_forwards(tmp_path: Path) -> None:
    """Masks that LLaDA drew itself are still there when the last steps, at which nothing commits, have gone by."""
    ended = 0
    for seed in range(8):
        model = tiny.llada(seed)
        with torch.no_grad():
            model.get_parameter("model.transformer.ff_out.weight")[tiny.MASK] *= 3.0
        served = tiny.engine(model, tmp_path / str(seed))
        push = Intervention(attribute="topic/sports", strength=0.01, schedule="uniform", scope="all")
        short = replace(
            ask([60, 61], (4, 4, 12)),
            interventions=(push,),
            trace=TraceParams(("topic/sports",), every=4),
            order="random",
        )
        long = replace(ask([5, 60, 61], (24, 24, 24)), order="random", seed=3)
        [(request, together), _] = tiny.run(served, short, long)
        [(_, alone)] = tiny.run(served, short)
        ended += request.response.count(tiny.MASK) > 0
        assert [(t.step, t.values) for t in together.trace] == [(t.step, t.values) for t in alone.trace]
        assert together.receipt is not None and alone.receipt is not None
        for mine, its in zip(together.receipt["interventions"], alone.receipt["interventions"], strict=True):
            assert mine["strength_per_step"] == its["strength_per_step"]
            assert mine["sites"] == its["sites"]
    assert ended > 0


def rows(seed: int, count: int = 20) -> list[GenerationParams]:
    """Rows of every option of the loop, with steering and without."""
    random, made = Random(seed), []
    for i in range(count):
        order = random.choice(["confidence", "random"])
        prompt = [random.randrange(5, 97) for _ in range(random.randrange(1, 9))]
        asked = replace(
            ask(prompt, random.choice(SHAPES), random.choice([True, False])),
            order=order, ends_last=order == "confidence" and random.choice([True, False]),
            cfg_scale=random.choice([0.0, 0.8, 2.0]), temperature=random.choice([0.0, 0.7, 1.0]),
            top_k=random.choice([None, 4]), suffix=random.choice([(), (70, 8)]), seed=random.randrange(4), row=i,
            logprobs=True,
        )  # fmt: skip
        if i % 2:
            push = Intervention(attribute="topic/sports", strength=random.uniform(-0.5, 0.8))
            asked = replace(asked, interventions=(push,), trace=TraceParams(("topic/sports",), random.randrange(1, 5)))
        made.append(asked)
    return made


@pytest.mark.parametrize("seed", [1])
def test_rows_in_a_batch_are_the_rows_alone(tmp_path: Path, seed: int) -> None:
    model = tiny.llada(5)
    model.facts = replace(model.facts, turn_end_id=TURN_END)
    with torch.no_grad():
        model.get_parameter("model.transformer.ff_out.weight")[[tiny.EOS, TURN_END, tiny.MASK]] *= 1.5
    assert_alone_as_together(tiny.engine(model, tmp_path, max_rows=9), rows(seed), seed)


@pytest.mark.parametrize(
    ("field", "changes"),
    [
        ("transfer", {"transfer": "analytic"}),
        ("transfer", {"transfer": "euler"}),
        ("transfer", {"transfer": {"type": "ddpm", "eps": 0.0}}),
        ("transfer", {"transfer": {"type": "timesteps", "eps": 1.0}}),
        ("transfer", {"transfer": {"type": "origin", "eps": "small"}}),
        ("transfer", {"transfer": {"type": "linear", "eps": 0.1}}),
        ("order", {"order": {"type": "confidence", "alg_temp": -1.0}}),
        ("order", {"order": {"type": "confidence", "filtered": 1}}),
        ("ends_last", {"order": "random", "ends_last": True}),
        ("ends_last", {"order": "entropy", "ends_last": True}),
        ("cfg_scale", {"cfg_scale": 1.0, "prompt": ()}),
        ("cfg_scale", {"cfg_scale": -0.5}),
        ("cfg_scale", {"cfg_scale": float("nan")}),
        ("cfg_scale", {"cfg_scale": True}),
        ("block_length", {"block_length": 5}),
        ("steps", {"steps": 7}),
    ],
)
def test_what_is_no_method_is_refused(tmp_path: Path, field: str, changes: dict[str, object]) -> None:
    served = tiny.engine(tiny.llada(), tmp_path)
    asked = ask([5, 60], (16, 4, 8))
    with pytest.raises(RequestError) as refused:
        served.admit(replace(asked, **changes))  # type: ignore[arg-type]
    assert refused.value.param == field
