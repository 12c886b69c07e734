"""Pushes as a function of their strengths: those the engine makes, and what a small one costs."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from steerserve.calibrate.generation import GeneratedText
from steerserve.calibrate.profile.canvases import Canvases, canvases_by_slice
from steerserve.calibrate.profile.fisher import PushedPredictions
from steerserve.models import DiffusionLM
from steerserve.steering.attribute import Attribute, AttributeSite
from steerserve.steering.plan import SteeringPlan
from steerserve.steering.push import Push
from steerserve.train.activations import final_states
from tests import tiny
from tests.calibrate.made import FAMILIES, family

LENGTH = 9


def attributes(model: DiffusionLM, scope: str = "masked") -> list[Attribute]:
    generator = torch.Generator().manual_seed(3)
    made = []
    for name, layers in (("a", (0,)), ("b", (0, 1)), ("c", (1,))):
        directions = {(layer, "sae"): torch.randn(model.facts.hidden_size, generator=generator) for layer in layers}
        made.append(
            Attribute(
                name=name,
                model_sha256="",
                layers=layers,
                strength=0.5,
                unit="residual",
                scope=scope,
                schedule={"type": "uniform"},
                sites={layer: AttributeSite(3.0 + layer, "", "", ()) for layer in layers},
                directions={key: value / value.norm() for key, value in directions.items()},
            )
        )
    return made


def canvases(model: DiffusionLM, place: int = 2) -> Canvases:
    random = np.random.default_rng(1)
    runs = [
        GeneratedText("", tuple(random.integers(5, 40, LENGTH).tolist()), tuple(random.permutation(LENGTH).tolist()))
        for _ in range(4)
    ]
    return canvases_by_slice(runs, model.facts, LENGTH, count=4, positions=3, seed=0)[place]


def log_p(model: DiffusionLM, states: Tensor, heat: float) -> Tensor:
    """Straight from what a sampler does: no special token, no end, over temperature."""
    logits = model.head(states).double()
    facts = model.facts
    for token in {*facts.forbidden_ids, *facts.end_ids, *({facts.mask_id} if facts.family == "sedd" else ())}:
        logits[:, token] = -torch.inf
    return (logits / heat).log_softmax(1)


@torch.no_grad()
def steered(model: DiffusionLM, some: Canvases, one: Attribute, strength: float) -> Tensor:
    """States at the chosen positions under the plan that the engine compiles."""
    rows = len(some.batch.canvas)
    pushes = [
        [
            Push(
                layer,
                one.directions[layer, "sae"],
                "add",
                strength * one.sites[layer].residual_norm,
                torch.ones(8),
                one.scope,
            )
            for layer in one.layers
        ]
        for _ in range(rows)
    ]
    plan = SteeringPlan(pushes)
    batch, shift = some.batch, model.facts.shift
    inside = torch.ones_like(batch.masked)
    named = torch.stack([inside, ~batch.text, batch.text, batch.masked, batch.text & ~batch.masked], 1)
    if shift:
        named = named.roll(-shift, dims=2)
        named[:, :, -shift:] = False
        named[:, 0] = True
        for i, scope in enumerate((inside, ~batch.text, batch.text, batch.masked, batch.text & ~batch.masked)):
            named[:, i, 0] |= scope[:, :shift].any(1)
    plan.set_step(torch.full((rows,), 0.3, dtype=torch.float64), named)
    return final_states(model, batch, plan)[some.row, some.position]


@pytest.mark.parametrize("scope", ["masked", "all", "committed", "response", "prompt"])
@pytest.mark.parametrize("name", FAMILIES)
def test_a_push_is_the_one_that_the_engine_makes(name: str, scope: str) -> None:
    model = family(name)
    some, several = canvases(model), attributes(model, scope)
    predictions = PushedPredictions(model, several, some, temperature=0.7)
    for a, one in enumerate(several):
        with torch.no_grad():
            found = predictions.states(0.8 * torch.eye(3)[a])
        torch.testing.assert_close(found, steered(model, some, one, 0.8), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", FAMILIES)
def test_the_fisher_form_is_that_of_central_differences(name: str) -> None:
    model = family(name)
    some, several, heat, step = canvases(model), attributes(model), 0.7, 2e-2
    predictions = PushedPredictions(model, several, some, heat)
    zero, unit = torch.zeros(3), torch.eye(3)
    with torch.no_grad():
        base = log_p(model, predictions.states(zero), heat)
        slopes = torch.stack(
            [
                log_p(model, predictions.states(step * one), heat) - log_p(model, predictions.states(-step * one), heat)
                for one in unit
            ]
        )
    # The covariance of the scores: d log p sums to zero under p.
    slopes = slopes.nan_to_num(0.0) / (2 * step)
    wanted = torch.einsum("pv,apv,bpv->pab", base.exp(), slopes, slopes)
    torch.testing.assert_close(predictions.fisher(), wanted, rtol=2e-2, atol=1e-5)


@pytest.mark.parametrize("name", FAMILIES)
def test_exact_kl_of_a_small_push_is_half_its_fisher_form(name: str) -> None:
    model = family(name)
    predictions = PushedPredictions(model, attributes(model), canvases(model), temperature=1.0)
    fisher = predictions.fisher().mean(0)
    for push in (torch.eye(3)[0], torch.eye(3)[1], torch.tensor([0.6, -0.5, 0.4])):
        form = float(push.double() @ fisher @ push.double()) / 2
        # About 1e-3 nats a position: far above float32's rounding, and still quadratic.
        size = (1e-3 / form) ** 0.5
        exact = float(predictions.kl([size * push, -size * push]).mean())
        assert exact / (size**2 * form) == pytest.approx(1, rel=0.03)


def test_exact_kl_is_that_of_the_two_predictions() -> None:
    model = family("bert")
    some, several = canvases(model), attributes(model)
    predictions = PushedPredictions(model, several, some, temperature=0.5)
    with torch.no_grad():
        plain = log_p(model, steered(model, some, several[1], 0.0), 0.5)
        pushed = log_p(model, steered(model, some, several[1], 0.9), 0.5)
    ratio = (pushed - plain).masked_fill(pushed == -torch.inf, 0.0)
    wanted = (pushed.exp() * ratio).sum(1)
    torch.testing.assert_close(predictions.kl([0.9 * torch.eye(3)[1]])[0], wanted, rtol=1e-4, atol=1e-7)


def test_nothing_of_greedy_sampling_is_infinite() -> None:
    model = family("bert")
    cold, warm = (PushedPredictions(model, attributes(model), canvases(model), heat) for heat in (0.0, 1.0))
    assert torch.equal(cold.fisher(), warm.fisher())


def test_attributes_on_disk_are_pushed_at_their_default_layers(tmp_path: Path) -> None:
    model = tiny.bert()
    one = tiny.attribute(tmp_path, "x", layers=(0, 2))
    some = canvases(model)
    found = PushedPredictions(model, [one], some, 1.0)
    assert sorted(found.pushes.index) == [0, 2]
    with torch.no_grad():
        torch.testing.assert_close(found.states(torch.tensor([0.4])), steered(model, some, one, 0.4))
