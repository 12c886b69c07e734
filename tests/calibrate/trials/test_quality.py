"""Losses of texts against the definition written out, and repetition."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from steerserve.calibrate.trials.quality import text_losses
from steerserve.engine.outputs.quality import distinct_pairs
from steerserve.models import DiffusionLM
from steerserve.models.families.bert import BertConfig, BertDiffusionLM
from steerserve.models.losses import token_losses
from tests.calibrate import made


def model() -> BertDiffusionLM:
    torch.manual_seed(0)
    lm = BertDiffusionLM(BertConfig(30, 8, 2, 2, 16, 24, 4, 3, 2))
    with torch.no_grad():
        for parameter in lm.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return lm.requires_grad_(False).eval()


def texts(*lengths: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(5, 30, (length,), generator=generator).tolist() for length in lengths]


def written_out(lm: DiffusionLM, name: str, text: list[int], draws: Tensor) -> float:
    """The mean over mask ratios of the mean of -log p of the hidden tokens; draws [positions, ratios]."""
    start = {"bert": [2], "mdlm": [3], "mdlm-timed": [3]}.get(name, [])
    mask, never = {"bert": (4, {0, 2, 4}), "sedd": (60, {60})}.get(name, (4, {4} if "mdlm" in name else set()))
    count, ratios = len(text), draws.shape[1]
    total = 0.0
    for i in range(ratios):
        order = sorted(range(count), key=lambda position: float(draws[position, i]))
        hidden = sorted(order[: math.ceil((i + 0.5) / ratios * count)])
        canvas = start + [mask if position in hidden else token for position, token in enumerate(text)]
        sigma = -math.log(max(0.001, 1 - len(hidden) / count))
        values = lm.head(lm(torch.tensor([canvas]), sigma=torch.tensor([sigma])))[0].double().exp()
        for position in hidden:
            place = position + len(start)
            # Dream's token j is decided one place before it, its first by the first state.
            odds = values[max(place - 1, 0) if name == "dream" else place]
            mass = sum(float(odds[token]) for token in range(len(odds)) if token not in never)
            total -= math.log(float(odds[text[position]]) / mass) / len(hidden) / ratios
    return total


@pytest.mark.parametrize("name", made.FAMILIES)
@pytest.mark.parametrize("length", [1, 11])
def test_the_loss_is_the_mean_over_ratios_of_the_masked_cross_entropy(name: str, length: int) -> None:
    lm, (text,) = made.family(name), texts(length)
    draws = torch.rand(length, 4, generator=torch.Generator().manual_seed(3))
    expected = written_out(lm, name, text, draws)
    assert text_losses(lm, [text], 4, seed=3).tolist() == pytest.approx([expected], rel=1e-4)


def test_a_constant_added_to_all_scores_changes_no_loss() -> None:
    lm, several = made.family("sedd"), texts(7, 3)
    expected, head = text_losses(lm, several, 3), lm.head
    lm.head = lambda hidden: head(hidden) + 40.0  # type: ignore[method-assign]
    torch.testing.assert_close(text_losses(lm, several, 3), expected, rtol=1e-4, atol=1e-4)


def test_what_is_never_text_has_no_probability_but_as_the_token_itself() -> None:
    lm = model()
    states, tokens = torch.randn(40, 8, generator=torch.Generator().manual_seed(0)), torch.arange(40) % 30
    odds = lm.head(states).double().exp()
    for row, loss in enumerate(token_losses(lm, states, tokens).tolist()):
        token = row % 30
        others = sum(float(odds[row, other]) for other in range(30) if other not in (0, 2, 4) and other != token)
        own = float(odds[row, token])
        assert loss == pytest.approx(-math.log(own / (own + others)), rel=1e-4, abs=1e-5)


def test_losses_do_not_depend_on_how_many_are_computed_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    lm = model()
    states, tokens = torch.randn(50, 8, generator=torch.Generator().manual_seed(0)), torch.arange(50) % 30
    whole = token_losses(lm, states, tokens)
    monkeypatch.setattr("steerserve.models.losses._BLOCK_BYTES", 4 * 30 * 7)
    torch.testing.assert_close(token_losses(lm, states, tokens), whole)


def test_a_texts_loss_does_not_depend_on_its_neighbours() -> None:
    lm, several = model(), texts(5, 20, 1, 12)
    together = text_losses(lm, several, 3)
    alone = torch.cat([text_losses(lm, [text], 3) for text in several])
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-6)


def test_an_empty_text_is_refused() -> None:
    with pytest.raises(ValueError, match="text 1 has no tokens"):
        text_losses(model(), [[5], []], 2)


@given(st.lists(st.integers(0, 3), max_size=12))
def test_distinct_pairs_counts_pairs(tokens: list[int]) -> None:
    pairs = [(tokens[i], tokens[i + 1]) for i in range(len(tokens) - 1)]
    assert distinct_pairs(tokens) == (len(set(pairs)) / len(pairs) if pairs else 1.0)
