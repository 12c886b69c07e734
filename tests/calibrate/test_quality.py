"""Losses of texts against the definition written out, and repetition."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from steerserve.calibrate.quality import distinct_pairs, text_losses
from steerserve.models.bert import BertConfig, BertDiffusionLM


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


def test_the_loss_is_the_mean_over_ratios_of_the_masked_cross_entropy() -> None:
    lm, (text,) = model(), texts(11)
    masks, expected = 4, 0.0
    draws = torch.rand(11, masks, generator=torch.Generator().manual_seed(3))
    for i in range(masks):
        order = sorted(range(11), key=lambda position: float(draws[position, i]))
        hidden = sorted(order[: math.ceil((i + 0.5) / masks * 11)])
        canvas = [2, *(4 if position in hidden else token for position, token in enumerate(text))]
        logits = lm.head(lm(torch.tensor([canvas])))[0].double().log_softmax(1)
        expected -= sum(float(logits[1 + position, text[position]]) for position in hidden) / len(hidden) / masks
    assert text_losses(lm, [text], masks, seed=3).tolist() == pytest.approx([expected], rel=1e-5)


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
