"""A response that ends at its first end token: shorter, the same in any company, and said to be approximate."""

from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch

from steerserve.engine.api.params import GenerationParams, Intervention
from steerserve.engine.engine import TorchEngine
from steerserve.errors import RequestError
from steerserve.models import DiffusionLM
from tests import tiny
from tests.engine.forward.test_batch_invariance import rows
from tests.engine.loops import assert_alone_as_together

PLAIN = GenerationParams(
    prompt=(9, 8), max_tokens=24, steps=24, order="confidence", transfer="linear", temperature=0.0, early_exit=True
)
FAMILIES = pytest.mark.parametrize("family", ["llada", "dream", "bert"])


def build(family: str, seed: int = 1, ends: float = 2.0) -> DiffusionLM:
    """A model that is fond of its end token: its output row leans towards the mean state."""
    model: DiffusionLM = getattr(tiny, family)(seed)
    states = model(torch.full((1, 24), tiny.MASK))[0].mean(0)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name in ("model.transformer.ff_out.weight", "lm_head.weight"):
                weight[tiny.EOS] += ends * tiny.unit(states)
            if name == "cls.predictions.bias":
                weight[tiny.EOS] += ends
    return model


def written_by_hand(
    model: DiffusionLM, params: GenerationParams, prompt: tuple[int, ...]
) -> tuple[list[int], list[int]]:
    """One token a step, the most confident first, on a canvas that ends at the first end token: what is left of it, and
    how many of its tokens were there before each step."""
    counts = []
    canvas, shift = [*prompt, *[tiny.MASK] * params.max_tokens], model.facts.shift
    while tiny.MASK in canvas:
        counts.append(len(canvas) - len(prompt) - canvas.count(tiny.MASK))
        logits = model.head(model(torch.tensor([canvas])))[0].double()
        found = []
        for i, token in enumerate(canvas):
            if token == tiny.MASK:
                mine = logits[max(0, i - shift)].clone()
                mine[list(model.facts.forbidden_ids)] = -torch.inf
                best = int(mine.argmax())
                found.append((-float(mine.softmax(0)[best]), i, best))
        _, i, best = min(found)
        canvas[i] = best
        if best == tiny.EOS:
            del canvas[i + 1 :]
    return canvas[len(prompt) :], counts


@FAMILIES
def test_what_is_written_is_written_without_what_lies_behind_the_end(tmp_path: Path, family: str) -> None:
    early = 0
    for seed in range(4):
        model = build(family, seed)
        served = tiny.engine(model, tmp_path / str(seed))
        [(request, result)] = tiny.run(served, PLAIN)
        by_hand, counts = written_by_hand(model, PLAIN, request.prompt_ids)
        assert request.response == by_hand
        assert result.receipt is not None
        [told] = result.receipt["approximate"]
        assert told == {"what": "early_exit", "positions_dropped": 24 - len(by_hand)}
        ended = by_hand[-1] == tiny.EOS
        assert result.finish_reason == ("stop" if ended else "length")
        assert list(result.tokens) == (by_hand[:-1] if ended else by_hand)
        assert [one.committed for one in request.made] == counts
        early += ended and len(by_hand) > 1
    assert early, "no row of this test would have been cut"


def test_it_takes_fewer_forwards_than_the_exact_end(tmp_path: Path) -> None:
    saved = []
    for seed in range(6):
        served = tiny.engine(build("llada", seed), tmp_path / str(seed))
        [(_, early), (_, exact)] = tiny.run(served, PLAIN, replace(PLAIN, early_exit=False))
        saved.append(exact.forward_passes - early.forward_passes)
    assert min(saved) >= 0
    assert max(saved) > 0


def test_the_canvas_shrinks_for_the_next_forward(tmp_path: Path) -> None:
    model = build("llada", ends=6.0)
    served = tiny.engine(model, tmp_path)
    seen: list[int] = []
    model.register_forward_pre_hook(lambda _, given: seen.append(given[0].shape[1]))
    asked = replace(PLAIN, max_tokens=80, steps=80, temperature=1.0)
    for seed in range(8):
        tiny.run(served, replace(asked, seed=seed))
    assert max(seen) >= 82
    assert min(seen) < 82


@FAMILIES
def test_rows_alone_and_together(tmp_path: Path, family: str) -> None:
    served = tiny.engine(build(family, 5), tmp_path, max_rows=7)
    chance = Random(family)
    push = Intervention(attribute="topic/sports", strength=1.0)
    asked = [
        replace(
            params,
            suffix=(),
            trace=None,
            early_exit=True,
            ignore_eos=False,
            interventions=chance.choice([(), (push,)]),
            cache=chance.choice([None, "dual", "prefix"]),
        )
        for params in rows(4, 10)
    ]
    assert_alone_as_together(served, asked, 4)


@pytest.mark.parametrize(
    ("family", "changes", "message"),
    [
        ("llada", {"suffix": (7,)}, "cannot go with a suffix"),
        ("llada", {"transfer": {"type": "remdm", "eta": 0.1, "schedule": "cap"}}, "takes tokens back"),
        ("sedd", {"transfer": "euler", "order": "random"}, "whose noise level is that of the whole canvas"),
        ("llada", {"early_exit": 1}, "early_exit must be true or false, got 1"),
    ],
)
def test_what_needs_the_whole_canvas_is_refused(
    tmp_path: Path, family: str, changes: dict[str, Any], message: str
) -> None:
    model: DiffusionLM = getattr(tiny, family)()
    served: TorchEngine = tiny.engine(model, tmp_path)
    with pytest.raises(RequestError, match=message) as error:
        served.admit(replace(PLAIN, **changes))
    assert error.value.param == "early_exit"
