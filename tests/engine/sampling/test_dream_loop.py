"""Dream's published loop, written down from its description, against the engine.

Loop: Dream 7B (arXiv 2508.15487) and its `diffusion_generate`: logits shifted by one, times from 1 to eps, and the
algorithms ORIGIN, MASKGIT_PLUS, TOPK_MARGIN and ENTROPY. Its mean over the batch is that of one row here.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from torch import Tensor

from steerserve.engine.api.events import Committed
from steerserve.engine.api.params import GenerationParams, Intervention, Scope, TraceParams, VectorRef
from steerserve.engine.forward.states import TOP_FEATURES
from steerserve.errors import RequestError
from steerserve.models import DiffusionLM
from steerserve.steering.plan import SteeringPlan
from tests import tiny
from tests.engine.loops import (
    Canvas,
    assert_alone_as_together,
    drawn,
    each_by_itself,
    exact,
    logits_of,
    misfit,
    settled,
    settled_responses,
)

MEASURES = {"maskgit_plus": "confidence", "topk_margin": "margin", "entropy": "entropy"}
"""Dream's names of its measures, and ours."""


def shifted(logits: Tensor) -> Tensor:
    return torch.cat([logits[:1], logits[:-1]])


def filtered(logits: Tensor, temperature: float, top_p: float, top_k: int | None) -> Tensor:
    """The distribution [vocabulary] that `sample_tokens` draws from, of the logits of one position."""
    if temperature > 0:
        logits = logits / temperature
    if top_p < 1:
        shares, mass, removed = logits.softmax(0).tolist(), 0.0, []
        for token in logits.argsort(descending=True).tolist():
            if mass > top_p:
                removed.append(token)
            mass += shares[token]
        logits = logits.index_fill(0, torch.tensor(removed, dtype=torch.int64), -math.inf)
    if top_k is not None:
        least = logits.sort(descending=True).values[min(top_k, len(logits)) - 1]
        logits = logits.where(logits >= least, -math.inf)
    return logits.softmax(0)


def sureness(alg: str, shares: Tensor, token: int) -> float:
    if alg == "maskgit_plus":
        return float(shares[token])
    if alg == "topk_margin":
        first, second = shares.sort(descending=True).values[:2].tolist()
        return float(first - second)
    return math.fsum(p * math.log(p + 1e-10) for p in shares.tolist())


def transferred(masks: int, step: int, steps: int, eps: float) -> int:
    times = torch.linspace(1, eps, steps + 1, dtype=torch.float64).tolist()
    return masks if step == steps - 1 else int(masks * (1 - times[step + 1] / times[step]))


def published(
    model: DiffusionLM,
    canvas: Sequence[int],
    alg: str,
    steps: int,
    eps: float = 1e-3,
    top_p: float = 1.0,
    top_k: int | None = None,
) -> tuple[list[int], list[list[int]]]:
    """The canvas after the loop at temperature 0, and the positions that became tokens at each step."""
    x, taken = list(canvas), []
    for step in range(steps):
        logits = shifted(logits_of(model, [x])[0])
        masks = [i for i, token in enumerate(x) if token == tiny.MASK]
        shares = {i: filtered(logits[i], 0.0, top_p, top_k) for i in masks}
        candidate = {i: int(shares[i].argmax()) for i in masks}
        confidence = {i: sureness(alg, shares[i], candidate[i]) for i in masks}
        kept = sorted(masks, key=lambda i: -confidence[i])[: transferred(len(masks), step, steps, eps)]
        for i in kept:
            x[i] = candidate[i]
        taken.append(sorted(i for i in kept if x[i] != tiny.MASK))
    return x, taken


def ask(alg: str, prompt: Sequence[int], length: int, steps: int, **changes: Any) -> GenerationParams:
    eps = changes.pop("eps", 1e-3)
    alg_temp = changes.pop("alg_temp", 0.0)
    origin = alg == "origin"
    asked = GenerationParams(
        prompt=tuple(prompt),
        max_tokens=length,
        steps=steps,
        temperature=0.0,
        top_p=1.0,
        order="random" if origin else {"type": MEASURES[alg], "filtered": True, "alg_temp": alg_temp},
        transfer={"type": "origin" if origin else "timesteps", "eps": eps},
    )
    return replace(asked, **changes)


RUNS = [
    (16, 16, 1e-3), (16, 5, 1e-3), (15, 7, 1e-3), (24, 9, 0.05),
    (13, 4, 0.3), (12, 31, 1e-3), (1, 1, 1e-3), (1, 5, 0.5),
]  # fmt: skip
"""Length, steps and eps."""
CUTS: list[tuple[float, int | None]] = [(1.0, None), (0.6, None), (1.0, 3), (0.9, 4)]


@pytest.mark.parametrize("alg", MEASURES)
def test_the_engine_writes_what_the_published_loop_writes(tmp_path: Path, alg: str) -> None:
    """All rows in one batch, each with its own masks to count, once with each cut of the distribution."""
    for seed in range(2):
        model = tiny.dream(seed)
        served = tiny.engine(model, tmp_path / str(seed))
        prompts = [[5, 60, 61], [63, 7, 8, 9, 10, 60]]
        # Both prompts take all cuts in turn, starting at different ones.
        asked = [
            (prompt, run, CUTS[(i + 2 * j + seed) % 4])
            for j, prompt in enumerate(prompts)
            for i, run in enumerate(RUNS)
        ]
        rows = tiny.run(
            served,
            *(
                ask(alg, p, length, steps, eps=eps, top_p=cut[0], top_k=cut[1])
                for p, (length, steps, eps), cut in asked
            ),
        )
        for (prompt, (length, steps, eps), cut), (request, _) in zip(asked, rows, strict=True):
            want, _ = published(model, [*prompt, *[tiny.MASK] * length], alg, steps, eps, *cut)
            assert settled(request.response, tiny.EOS) == settled(want[len(prompt) :], tiny.EOS)


@pytest.mark.parametrize("alg", MEASURES)
def test_every_step_takes_the_positions_of_the_published_step(tmp_path: Path, alg: str) -> None:
    model = tiny.dream(7)
    served = tiny.engine(model, tmp_path)
    suffix, differs = (70, 8), set()
    for length, steps, eps in RUNS[:6]:
        request = served.admit(ask(alg, [5, 60], length, steps, eps=eps, suffix=suffix))
        served.add([request])
        found: dict[int, list[int]] = {}
        for event in tiny.drain(served):
            if isinstance(event, Committed):
                found[event.step] = sorted(i + 2 for i in event.positions)
        _, taken = published(model, [5, 60, *[tiny.MASK] * length, *suffix], alg, steps, eps)
        assert [found.get(i, []) for i in range(request.step)] == taken[: request.step]
        differs |= {other for other in MEASURES if taken != published(
            model, [5, 60, *[tiny.MASK] * length, *suffix], other, steps, eps)[1]}  # fmt: skip
    assert differs == set(MEASURES) - {alg}


def small(seed: int) -> DiffusionLM:
    """A model whose texts can be counted: seven tokens, one of them the mask, which Dream may draw."""
    model = tiny.dream(seed, vocab_size=7)
    tiny.randomise(model, seed, 0.25)
    return model


def shares_at(logits: Tensor, canvas: Canvas, cuts: tuple[float, float, int | None]) -> dict[int, Tensor]:
    moved = shifted(logits)
    return {i: filtered(moved[i], *cuts) for i, token in enumerate(canvas) if token == tiny.MASK}


def tokens(shares: Tensor) -> dict[int, float]:
    return {token: p for token, p in enumerate(shares.tolist()) if p > 0}


def origin_step(
    canvas: Canvas, logits: Tensor, chance: float, cuts: tuple[float, float, int | None]
) -> Iterator[tuple[float, Canvas]]:
    """Each mask is drawn with the chance, or stays."""
    options = {}
    for i, shares in shares_at(logits, canvas, cuts).items():
        options[i] = {token: chance * p for token, p in tokens(shares).items()}
        options[i][tiny.MASK] = options[i].get(tiny.MASK, 0.0) + 1 - chance
    return each_by_itself(canvas, options)


def picks(scores: dict[int, float], count: int, alg_temp: float) -> Iterator[tuple[float, set[int]]]:
    """`multinomial(softmax(scores / alg_temp))` without replacement, one pick after the other."""
    if count == 0:
        yield 1.0, set()
        return
    weight = {i: math.exp((score - max(scores.values())) / alg_temp) for i, score in scores.items()}
    for i in scores:
        rest = {j: score for j, score in scores.items() if j != i}
        for chance, more in picks(rest, count - 1, alg_temp):
            yield weight[i] / sum(weight.values()) * chance, {i, *more}


def drawn_step(
    canvas: Canvas,
    logits: Tensor,
    alg: str,
    alg_temp: float,
    step: int,
    steps: int,
    eps: float,
    cuts: tuple[float, float, int | None],
) -> Iterator[tuple[float, Canvas]]:
    """A candidate at every mask, then some of them drawn by how sure each is."""
    shares = shares_at(logits, canvas, cuts)
    count = transferred(len(shares), step, steps, eps)
    for chance, made in each_by_itself(canvas, {i: tokens(p) for i, p in shares.items()}):
        scores = {i: sureness(alg, shares[i], made[i]) for i in shares}
        for share, kept in picks(scores, count, alg_temp):
            yield chance * share, tuple(made[i] if i in kept else token for i, token in enumerate(canvas))


START = (5, tiny.MASK, tiny.MASK, tiny.MASK)


@pytest.mark.parametrize(("steps", "eps"), [(3, 1e-3), (2, 0.4)])
def test_origin_distributes_whole_texts_as_published(tmp_path: Path, steps: int, eps: float) -> None:
    model, cuts = small(3), (0.7, 0.8, None)
    served = tiny.engine(model, tmp_path, max_rows=400, max_queue=1200)

    def expected(eps: float) -> dict[Canvas, float]:
        times = torch.linspace(1, eps, steps + 1, dtype=torch.float64).tolist()
        chances = [1 - times[i + 1] / times[i] for i in range(steps - 1)] + [1.0]
        stages: list[tuple[None, Callable[[Canvas, Tensor], Iterator[tuple[float, Canvas]]]]] = [
            (None, lambda canvas, logits, c=chance: origin_step(canvas, logits, c, cuts))  # type: ignore[misc]
            for chance in chances
        ]
        return settled_responses(exact(model, START, stages), 1, 3, tiny.EOS)

    counts = drawn(served, ask("origin", [5], 3, steps, eps=eps, temperature=0.7, top_p=0.8), 1200)
    assert misfit(expected(eps), counts) < 3.5
    assert misfit(expected(0.9), counts) > 6


@pytest.mark.parametrize(
    ("alg", "alg_temp", "cuts", "steps", "eps"),
    [
        ("entropy", 0.3, (1.0, 1.0, None), 3, 0.05),
        ("entropy", 1.0, (0.7, 0.9, None), 2, 0.2),
        ("maskgit_plus", 0.2, (1.0, 1.0, 4), 3, 1e-3),
        ("topk_margin", 0.1, (0.8, 0.9, 5), 2, 0.2),
    ],
)
def test_positions_drawn_by_their_sureness_give_texts_as_published(
    tmp_path: Path, alg: str, alg_temp: float, cuts: tuple[float, float, int | None], steps: int, eps: float
) -> None:
    model = small(4)
    served = tiny.engine(model, tmp_path, max_rows=400, max_queue=1200)
    temperature, top_p, top_k = cuts

    def expected(alg_temp: float) -> dict[Canvas, float]:
        stages: list[tuple[None, Callable[[Canvas, Tensor], Iterator[tuple[float, Canvas]]]]] = [
            (None, lambda canvas, logits, i=i: drawn_step(canvas, logits, alg, alg_temp, i, steps, eps, cuts))  # type: ignore[misc]
            for i in range(steps)
        ]
        return settled_responses(exact(model, START, stages), 1, 3, tiny.EOS)

    params = ask(alg, [5], 3, steps, eps=eps, alg_temp=alg_temp, temperature=temperature, top_p=top_p, top_k=top_k)
    counts = drawn(served, params, 1200)
    assert misfit(expected(alg_temp), counts) < 3.5
    assert misfit(expected(1e-3), counts) > 5


SCOPES: list[Scope] = ["masked", "all", (0, 1)]


def rows(seed: int, count: int = 24) -> list[GenerationParams]:
    """Rows that share nothing: sampler, steps, lengths, guidance, steering, traces and noise."""
    random, made = Random(seed), []
    for i in range(count):
        length = random.choice([1, 5, 12, 17, 30])
        alg = random.choice(["origin", *MEASURES])
        asked = ask(
            alg, [random.randrange(5, 97) for _ in range(random.randrange(1, 9))],
            length, random.choice([1, 4, length, 40]),
            temperature=random.choice([0.0, 0.4, 1.0]), top_p=random.choice([1.0, 0.8]), top_k=random.choice([None, 5]),
            alg_temp=0.0 if alg == "origin" else random.choice([0.0, 0.5]), eps=random.choice([1e-3, 0.2]),
            cfg_scale=random.choice([0.0, 0.0, 1.5]), seed=random.randrange(5), row=i,
            suffix=random.choice([(), (70, 8)]), logprobs=True, ignore_eos=random.choice([True, False]),
        )  # fmt: skip
        if i % 5 == 4:
            asked = replace(
                asked, order=random.choice(["sae_stability", "confidence"]), transfer="linear", block_length=1
            )
            asked = replace(asked, steps=length)
        if i % 2:
            name = random.choice(["topic/sports", "register/archaic"])
            scope: Scope = random.choice(SCOPES)
            push = Intervention(attribute=name, strength=random.uniform(-0.5, 0.8), scope=scope)
            schedule = random.choice([None, {"type": "window", "start": 0.3, "stop": 0.8}])
            asked = replace(asked, interventions=(replace(push, schedule=schedule),))
        if i % 3 == 0:
            asked = replace(
                asked, trace=TraceParams(("topic/sports", "register/archaic"), every=random.randrange(1, 4))
            )
        made.append(asked)
    return made


@pytest.mark.parametrize("seed", [1])
def test_rows_in_a_batch_are_the_rows_alone(tmp_path: Path, seed: int) -> None:
    served = tiny.engine(tiny.dream(5), tmp_path, max_rows=13)
    assert_alone_as_together(served, rows(seed), seed)


def watched(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, Tensor, Tensor]]:
    """Layer and states before and after steering of every layer's output, from now on."""
    seen: list[tuple[int, Tensor, Tensor]] = []
    steer = SteeringPlan.__call__

    def call(plan: SteeringPlan, layer: int, hidden: Tensor) -> Tensor:
        out = steer(plan, layer, hidden)
        seen.append((layer, hidden.clone(), out.clone()))
        return out

    monkeypatch.setattr(SteeringPlan, "__call__", call)
    return seen


def touched(before: Tensor, after: Tensor) -> list[int]:
    return (before != after).any(1).nonzero()[:, 0].tolist()


VECTOR = VectorRef(1, tuple(math.sin(i + 1.0) for i in range(tiny.HIDDEN)))


@pytest.mark.parametrize(
    ("scope", "tokens"),
    [
        ("prompt", {0, 1, 2}),
        ("response", {3, 4, 5, 6, 7, 8}),
        ("masked", None),
        ("committed", None),
        ((2, 4), {5, 6}),
        ((0, 1), {3}),
    ],
)
@pytest.mark.parametrize("prompt", [[5, 60, 61], []], ids=["prompt", "no-prompt"])
def test_a_scope_of_tokens_is_pushed_at_the_states_that_decide_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, scope: Any, tokens: set[int] | None, prompt: list[int]
) -> None:
    model = tiny.dream(2)
    served = tiny.engine(model, tmp_path)
    seen = watched(monkeypatch)
    push = Intervention(vector=VECTOR, strength=4.0, unit="raw", scope=scope, schedule="uniform")
    asked = ask("entropy", prompt, 6, 6, eps=0.1, suffix=(70, 8), interventions=(push,), ignore_eos=True)
    request = served.admit(asked)
    served.add([request])
    start = len(prompt)
    assert start in (0, 3)
    at_least_once = set()
    while served.waiting or served.running:
        canvas, forwards = list(request.canvas), len(request.made)
        before = len(seen)
        served.step()
        if len(request.made) == forwards:
            continue
        response = range(start, start + 6)
        if scope == "masked":
            named = {j for j in response if canvas[j] == tiny.MASK}
        elif scope == "committed":
            named = {j for j in response if canvas[j] != tiny.MASK}
        else:
            assert tokens is not None
            named = {j - 3 + start for j in tokens if j - 3 + start >= 0} if scope != "prompt" or prompt else set()
        [states] = [touched(old[0], new[0]) for layer, old, new in seen[before:] if layer == 1]
        assert states == sorted({max(j - 1, 0) for j in named})
        assert all(not touched(old[0], new[0]) for layer, old, new in seen[before:] if layer != 1)
        at_least_once |= set(states)
    assert at_least_once or scope == "prompt" and not prompt


def test_scope_all_is_every_state_of_the_canvas_and_no_padding(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    served = tiny.engine(tiny.dream(2), tmp_path)
    seen = watched(monkeypatch)
    push = Intervention(vector=VECTOR, strength=4.0, unit="raw", scope="all", schedule="uniform")
    asked = ask("entropy", [5, 60, 61], 6, 2, suffix=(70, 8), interventions=(push,))
    tiny.run(served, asked)
    for layer, old, new in seen:
        assert touched(old[0], new[0]) == (list(range(11)) if layer == 1 else [])


def test_a_trace_reads_the_states_that_decide_the_response(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    served = tiny.engine(tiny.dream(3), tmp_path)
    seen = watched(monkeypatch)
    asked = ask("maskgit_plus", [5, 60, 61], 6, 6, trace=TraceParams(("topic/sports",)), ignore_eos=True)
    [(request, result)] = tiny.run(served, asked)
    direction = served.catalogue.attributes["topic/sports"].directions[1, "sae"]
    states = [old[0] for layer, old, _ in seen if layer == 1]
    assert len(result.trace) == len(states) == 6
    for trace, hidden in zip(result.trace, states, strict=True):
        # Tokens 3 to 8 are decided by the states 2 to 7.
        mean = float((hidden[2:8] @ direction).mean()) / 6.0
        assert trace.values["topic/sports"] == pytest.approx(mean, abs=1e-4)


def test_sae_stability_compares_the_features_of_the_states_that_decide(tmp_path: Path) -> None:
    """Against a plain loop that keeps the features of every state, and not one that reads a place too far on."""
    apart = 0
    for seed in range(3):
        model = tiny.dream(20 + seed)
        served = tiny.engine(model, tmp_path / str(seed))
        sae = served.catalogue.saes["layer-2-mask"]
        order = {"type": "sae_stability", "weight": 1.0, "sae": "layer-2-mask"}
        asked = replace(ask("entropy", [5, 60], 8, 8), order=order, transfer="linear", ignore_eos=True)
        request = served.admit(asked)
        served.add([request])
        got = [event.positions for event in tiny.drain(served) if isinstance(event, Committed)]
        orders: dict[int, list[tuple[int, ...]]] = {}
        for offset in (1, 0):
            x, orders[offset] = [5, 60, *[tiny.MASK] * 8], []
            previous: dict[int, list[int]] = {}
            for _ in range(8):
                states: list[Tensor] = []

                def keep(layer: int, hidden: Tensor, states: list[Tensor] = states) -> Tensor:
                    if layer == 2:
                        states.append(hidden[0])
                    return hidden

                with torch.no_grad():
                    logits = shifted(model.head(model(torch.tensor([x]), sites=keep))[0].double())
                logits[:, tiny.EOS] = -math.inf
                features: dict[int, list[int]] = {}
                score = {}
                for j in [j for j, token in enumerate(x) if token == tiny.MASK]:
                    features[j] = sae.pre(states[0][j - offset]).argsort(descending=True)[:TOP_FEATURES].tolist()
                    old, new = set(previous.get(j, [])), set(features[j])
                    held = previous.get(j, [])[:1] == features[j][:1]
                    score[j] = 0.5 * len(old & new) / len(old | new) + 0.5 * held if j in previous else 0.0
                best = max(score, key=lambda j: (score[j], -j))
                x[best] = int(logits[best].argmax())
                orders[offset].append((best - 2,))
                previous = features
        assert got == orders[1]
        apart += orders[0] != orders[1]
    assert apart > 0


def test_more_steps_than_tokens_cost_no_forwards(tmp_path: Path) -> None:
    served = tiny.engine(tiny.dream(6), tmp_path)
    for alg in ("origin", *MEASURES):
        plain = ask(alg, [5, 60], 6, 60, temperature=0.8, ignore_eos=True, seed=4)
        [(request, result)] = tiny.run(served, plain)
        assert result.forward_passes <= 6 < result.steps
        [(other, traced)] = tiny.run(served, replace(plain, trace=TraceParams(("topic/sports",))))
        assert traced.forward_passes == traced.steps == result.steps
        assert other.response == request.response


def test_the_plan_foretells_the_strength_of_every_forward(tmp_path: Path) -> None:
    model = tiny.dream(6)
    model.get_parameter("lm_head.weight")[tiny.MASK] = 0.0
    served = tiny.engine(model, tmp_path)
    for length, steps, eps in RUNS:
        push = Intervention(
            attribute="topic/sports", strength=0.5, schedule={"type": "window", "start": 0.2, "stop": 0.7}
        )
        asked = ask("entropy", [5, 60], length, steps, eps=eps, interventions=(push,), ignore_eos=True)
        [(request, result)] = tiny.run(served, asked)
        assert tiny.MASK not in request.response
        assert result.receipt is not None
        [plan], [receipt] = request.plan["interventions"], result.receipt["interventions"]
        assert len(receipt["strength_per_step"]) == result.forward_passes
        assert receipt["strength_per_step"] == pytest.approx(plan["strength_per_step"])


@pytest.mark.parametrize(
    ("field", "changes"),
    [
        ("transfer", {"transfer": "analytic"}),
        ("transfer", {"transfer": {"type": "origin", "eps": 0}}),
        ("transfer", {"transfer": {"type": "timesteps", "eps": float("nan")}}),
        ("transfer", {"transfer": {"type": "timesteps", "eps": True}}),
        ("ends_last", {"ends_last": True}),
        ("cfg_scale", {"cfg_scale": 2.0, "prompt": ()}),
        ("top_k", {"top_k": -2}),
        ("top_p", {"top_p": 0.0}),
    ],
)
def test_what_is_no_method_is_refused(tmp_path: Path, field: str, changes: dict[str, Any]) -> None:
    served = tiny.engine(tiny.dream(), tmp_path)
    with pytest.raises(RequestError) as refused:
        served.admit(replace(ask("entropy", [5, 60], 16, 8), **changes))
    assert refused.value.param == field
