"""The published loops of LLaDA2.0 and LLaDA2.1, written down from their descriptions, against the engine.

LLaDA2.0 (arXiv 2512.15745): at each step of a block all tokens of a probability above a threshold commit, or as many of
the likeliest as an even schedule has, if these are more. LLaDA2.1 (arXiv 2602.08676): besides, a token of the block,
but none of the prompt, is replaced where another one is predicted with a probability above a second threshold; a full
block is looked at until nothing is replaced, a bounded number of times.
"""

from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import pytest

from steerserve.engine.api.events import Committed, Done, Event, Revised
from steerserve.engine.api.params import GenerationParams, Intervention, Limits, TraceParams
from steerserve.engine.engine import DiffusionEngine
from steerserve.engine.request.request import Request
from steerserve.engine.vllm.engine import VllmEngine
from steerserve.errors import RequestError
from steerserve.models import DiffusionLM
from tests import tiny
from tests.engine.loops import logits_of, rounded

BLOCK = tiny.LLADA2.block_size
PUSH = Intervention(attribute="topic/sports", strength=4.0, schedule="uniform")
PROMPTS = [(7, 40, 55, 61, 20, 9, 33, 50), (7, 40, 55), (7, 40, 55, 61, 20, 9, 33, 50, 8, 8, 8)]
"""Whole blocks, less than one, more than one."""


def predicted(model: DiffusionLM, canvas: list[int], end: int) -> tuple[list[int], list[float]]:
    """The likeliest token of each position before end, of a canvas that stops there, and its probability."""
    best = logits_of(model, [canvas[:end]])[0].softmax(1).max(1)
    return best.indices.tolist(), best.values.tolist()


def committing(masked: list[int], chance: list[float], threshold: float, least: int) -> list[int]:
    sure = [i for i in masked if chance[i] > threshold]
    return sure if len(sure) >= least else sorted(masked, key=lambda i: -chance[i])[:least]


def loop_of_20(
    model: DiffusionLM, prompt: tuple[int, ...], length: int, threshold: float, steps: int
) -> tuple[list[int], int]:
    """The response, and the forward passes that it took."""
    canvas, passes = [*prompt, *[tiny.MASK] * length], 0
    schedule = [BLOCK // steps + (step < BLOCK % steps) for step in range(steps)]
    for first in range(len(prompt) // BLOCK * BLOCK, len(canvas), BLOCK):
        for count in schedule:
            masked = [i for i in range(first, first + BLOCK) if canvas[i] == tiny.MASK]
            if not masked:
                break
            token, chance = predicted(model, canvas, first + BLOCK)
            for i in committing(masked, chance, threshold, count):
                canvas[i] = token[i]
            passes += 1
        if tiny.EOS in canvas[len(prompt) : first + BLOCK]:
            break
    return canvas[len(prompt) :], passes


def loop_of_21(
    model: DiffusionLM,
    prompt: tuple[int, ...],
    length: int,
    threshold: float,
    editing: float,
    most: int,
    least: int = 1,
) -> tuple[list[int], int, int]:
    """The response, the forward passes that it took, and the tokens that were replaced."""
    canvas, passes, replaced = [*prompt, *[tiny.MASK] * length], 0, 0
    for first in range(len(prompt) // BLOCK * BLOCK, len(canvas), BLOCK):
        span, full = range(first, first + BLOCK), 0
        while True:
            masked = [i for i in span if canvas[i] == tiny.MASK]
            full += not masked
            if full > most:
                break
            token, chance = predicted(model, canvas, first + BLOCK)
            passes += 1
            standing = [i for i in span if i >= len(prompt) and i not in masked]
            edited = [i for i in standing if chance[i] > editing and token[i] != canvas[i]]
            for i in (committing(masked, chance, threshold, least) if masked else []) + edited:
                canvas[i] = token[i]
            replaced += len(edited)
            if not masked and not edited:
                break
        if tiny.EOS in canvas[len(prompt) : first + BLOCK]:
            break
    return canvas[len(prompt) :], passes, replaced


def until_end(response: list[int]) -> list[int]:
    return response[: response.index(tiny.EOS) + 1] if tiny.EOS in response else response


def ask(prompt: tuple[int, ...] = PROMPTS[0], **changes: Any) -> GenerationParams:
    """A request whose canvas is three blocks, as LLaDA2.1 writes it."""
    transfer = {"type": "joint_threshold", "value": 0.4, "editing_threshold": 0.2}
    asked = GenerationParams(
        prompt=prompt, max_tokens=3 * BLOCK - len(prompt), temperature=0.0, order="confidence", transfer=transfer
    )
    return replace(asked, **changes)


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> DiffusionEngine:
    return tiny.engine(tiny.llada2(3), tmp_path_factory.mktemp("llada2"))


@pytest.mark.parametrize("prompt", PROMPTS, ids=len)
@pytest.mark.parametrize(("threshold", "steps"), [(0.95, 8), (0.4, 8), (0.4, 2), (0.7, 4)])
def test_the_loop_of_20_token_for_token(
    served: DiffusionEngine, prompt: tuple[int, ...], threshold: float, steps: int
) -> None:
    transfer = {"type": "threshold", "value": threshold, "least": BLOCK // steps}
    [(request, result)] = tiny.run(served, ask(prompt, transfer=transfer))
    expected, passes = loop_of_20(served.model, prompt, request.params.max_tokens, threshold, steps)
    assert until_end(request.response) == until_end(expected)
    # A row ends with its text, where the loop ends with the block.
    assert result.forward_passes == passes if tiny.EOS not in expected else result.forward_passes <= passes


@pytest.mark.parametrize("prompt", PROMPTS, ids=len)
def test_the_loop_of_21_token_for_token(served: DiffusionEngine, prompt: tuple[int, ...]) -> None:
    edits, cut = 0, 0
    for threshold, editing, most, least in [
        (0.7, 0.5, 16, 1), (0.5, 0.0, 16, 1), (0.4, 0.2, 3, 1), (0.3, 0.1, 1, 2), (0.3, 0.2, 0, 3), (0.95, 0.9, 16, 1)
    ]:  # fmt: skip
        transfer = {"type": "joint_threshold", "value": threshold, "editing_threshold": editing,
                    "max_post_steps": most, "least": least}  # fmt: skip
        [(request, result)] = tiny.run(served, ask(prompt, transfer=transfer))
        told = loop_of_21(served.model, prompt, request.params.max_tokens, threshold, editing, most, least)
        expected, passes, replaced = told
        assert until_end(request.response) == until_end(expected)
        assert result.forward_passes == passes
        assert result.receipt is not None
        assert result.receipt["revised"] == replaced
        assert result.receipt["approximate"][0]["positions_at_bound"] == 0
        edits, cut = edits + replaced, cut + (most == 1 and replaced > 0)
    assert edits > 5 and cut


def replayed(events: list[Event], request: Request) -> tuple[list[int], int]:
    """The response that the events build, each of which must be possible where it stands; and the tokens replaced."""
    response, taken = [tiny.MASK] * request.params.max_tokens, 0
    for event in events:
        if isinstance(event, Revised):
            assert all(response[position] != tiny.MASK for position in event.positions)
            taken += len(event.positions)
            for position in event.positions:
                response[position] = tiny.MASK
        if isinstance(event, Committed):
            for position, token in zip(event.positions, event.tokens, strict=True):
                assert response[position] == tiny.MASK
                response[position] = token
    return response, taken


def test_what_is_replaced_is_told_and_counted_and_progress_never_falls(served: DiffusionEngine) -> None:
    trace = TraceParams(("topic/sports",))
    request, events = tiny.solo(
        served, ask(PROMPTS[1], interventions=(PUSH,), trace=trace, logprobs=True, ignore_eos=True)
    )
    response, taken = replayed(events, request)
    assert response == request.response and taken == request.revised > 0
    done = events[-1]
    assert isinstance(done, Done) and done.result.receipt is not None
    assert done.result.receipt["revised"] == taken
    assert request.plan["revises"] is True
    progress = [event.progress for event in done.result.trace]
    assert progress == sorted(progress) and progress[-1] == 1.0
    [push] = done.result.receipt["interventions"]
    assert len(push["strength_per_step"]) == done.result.forward_passes == len(progress)
    # A replaced token has the log-probability of the step that wrote it.
    said: dict[int, float] = {}
    for event in events:
        if isinstance(event, Committed):
            assert event.logprobs is not None
            said |= dict(zip(event.positions, event.logprobs, strict=True))
    assert done.result.logprobs == tuple(said[i] for i in range(len(response)))


def rows(seed: int, count: int = 8) -> list[GenerationParams]:
    """Rows that share little: both loops, lengths, orders, steering, traces, limits and noise."""
    random, made = Random(seed), []
    for i in range(count):
        asked = ask(
            tuple(random.randrange(5, 97) for _ in range(random.randrange(1, 14))), row=i, seed=i,
            max_tokens=random.randrange(5, 18), temperature=random.choice([0.0, 0.0, 0.7]), logprobs=i % 2 == 0,
            order=random.choice(["confidence", "entropy", "sae_stability"]), ignore_eos=i % 3 > 0,
            interventions=random.choice([(), (PUSH,), (replace(PUSH, scope="masked", schedule=None),)]),
            block_length=random.choice([None, 4]), top_logprobs=2 * (i % 4 == 0),
        )  # fmt: skip
        if i % 4 == 3:
            asked = replace(asked, transfer={"type": "threshold", "value": 0.5})
        made.append(asked)
    made[1] = replace(made[1], cfg_scale=1.0)
    made[2] = replace(made[2], interventions=(PUSH,), limits=Limits(max_kl=0.02))
    return made


def test_rows_are_the_same_together_and_alone(served: DiffusionEngine) -> None:
    together = tiny.run(served, *rows(1))
    assert sum(request.revised for request, _ in together) > 8
    for request, result in together:
        [(alone, told)] = tiny.run(served, request.params)
        assert alone.response == request.response
        assert (told.steps, told.logprobs, told.top_logprobs) == (result.steps, result.logprobs, result.top_logprobs)
        assert rounded(result.receipt) == told.receipt


def test_strength_0_is_the_plain_text_and_a_push_is_not(served: DiffusionEngine) -> None:
    plain = tiny.tokens_of(served, ask())
    assert tiny.tokens_of(served, ask(interventions=(replace(PUSH, strength=0.0),))) == plain
    assert tiny.tokens_of(served, ask(interventions=(PUSH,))) != plain


def test_any_model_takes_it_and_a_condition_may_mask_again(tmp_path: Path) -> None:
    model = tiny.llada(1)
    model.state_dict()["model.transformer.ff_out.weight"][tiny.MASK] = 0.0
    served = tiny.engine(model, tmp_path)
    condition = {"condition": {"progress": {"above": 0.6}}, "span": "block"}
    asked = ask(max_tokens=12, block_length=6)
    revised = []
    for params in (asked, replace(asked, remask_when=condition), replace(asked, cache="dual")):
        request, events = tiny.solo(served, params)
        revised.append(request.revised)
        assert (params.remask_when is not None) == (request.triggers is not None and bool(request.triggers.remasked))
        response, _ = replayed(events, request)
        assert response == request.response and tiny.MASK not in response
        assert isinstance(events[-1], Done)
        assert request.step <= request.plan["max_steps"]
    assert all(revised)


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"transfer": {"type": "joint_threshold", "editing_threshold": 1.5}}, "transfer"),
        ({"transfer": {"type": "joint_threshold", "max_post_steps": -1}}, "transfer"),
        ({"transfer": {"type": "threshold", "least": 0}}, "transfer"),
        ({"transfer": {"type": "threshold", "editing_threshold": 0.5}}, "transfer"),
        ({"early_exit": True}, "early_exit"),
    ],
)
def test_what_makes_no_sense_is_refused_by_field(served: DiffusionEngine, changes: dict[str, Any], field: str) -> None:
    with pytest.raises(RequestError) as error:
        served.admit(ask(**changes))
    assert error.value.param == field


def test_vllms_workers_replace_nothing(served: DiffusionEngine) -> None:
    made = VllmEngine.__new__(VllmEngine)
    made.__dict__.update(served.__dict__)
    with pytest.raises(RequestError, match="replaces committed tokens") as error:
        made.admit(ask())
    assert error.value.param == "transfer"
    assert made.admit(ask(transfer="threshold")).transfer.edits is False
