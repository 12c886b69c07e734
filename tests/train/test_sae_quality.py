"""Scores of an SAE, where their values are known."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from steerserve.models.families.bert import BertConfig, BertDiffusionLM
from steerserve.saes.activation import Relu
from steerserve.saes.sae import Policy, SaeFacts, SparseAutoencoder
from steerserve.train.activations import NoisedBatch, states
from steerserve.train.sae_quality import decides, evaluate_sae, masked_loss, reconstruction
from tests.calibrate import made

HIDDEN, LAYER = 8, 1


def model() -> BertDiffusionLM:
    torch.manual_seed(0)
    return BertDiffusionLM(BertConfig(30, HIDDEN, 3, 2, 16, 12, 4, 3, 2)).requires_grad_(False)


def batch() -> NoisedBatch:
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(5, 30, (6, 12), generator=generator)
    tokens[:, 0] = 2
    text = torch.ones_like(tokens, dtype=torch.bool)
    text[:, 0] = False
    masked = text & (torch.rand(6, 12, generator=generator) < 0.5)
    return NoisedBatch(tokens, tokens.masked_fill(masked, 4), torch.full((6,), 12), masked, text)


def perfect() -> SparseAutoencoder:
    """Two features for each hidden unit, for its positive and its negative part: exact, with L0 = HIDDEN."""
    eye = torch.eye(HIDDEN)
    both = torch.cat([eye, -eye])
    tensors = {
        "W_enc": both.T.contiguous(),
        "b_enc": torch.zeros(2 * HIDDEN),
        "W_dec": both,
        "b_dec": torch.zeros(HIDDEN),
    }
    return SparseAutoencoder(SaeFacts("s", LAYER, HIDDEN, 2 * HIDDEN, "standard", sha256="ff"), tensors, Relu())


def test_an_exact_sae_explains_all_and_costs_nothing() -> None:
    lm, noised = model(), batch()
    hidden = states(lm, noised, [LAYER])[LAYER][noised.chosen("mask")].clone()
    scores, _ = evaluate_sae(lm, perfect(), "mask", hidden, [noised])
    assert abs(scores["explained_variance"] - 1.0) < 1e-6 and abs(scores["loss_delta"]) < 1e-5
    assert abs(scores["l0"] - HIDDEN) < 1e-6
    for name in ("zero", "mean"):
        harm = scores[f"loss_delta_{name}_ablation"]
        assert (f"loss_recovered_{name}" in scores) == (harm > 0)


def test_statistics_are_those_of_the_activations() -> None:
    hidden = torch.randn(5000, HIDDEN, generator=torch.Generator().manual_seed(0))
    _, stats = reconstruction(perfect(), hidden)
    torch.testing.assert_close(stats.max_act[:HIDDEN], hidden.amax(0))
    torch.testing.assert_close(stats.density[HIDDEN:], (hidden < 0).float().mean(0))
    torch.testing.assert_close(stats.mean_act[0], hidden[hidden[:, 0] > 0, 0].mean(), rtol=1e-4, atol=1e-4)


def test_the_mean_alone_explains_nothing() -> None:
    hidden = torch.randn(100, HIDDEN, generator=torch.Generator().manual_seed(0))
    sae = perfect()
    sae.W_dec.zero_()
    sae.b_dec.copy_(hidden.mean(0))
    scores, _ = reconstruction(sae, hidden)
    assert abs(scores["explained_variance"]) < 1e-5


def test_dead_features_have_no_statistics() -> None:
    sae = perfect()
    sae.b_enc[:4] = -1e6
    scores, stats = reconstruction(sae, torch.randn(50, HIDDEN, generator=torch.Generator().manual_seed(0)))
    assert scores["dead_share"] == 4 / (2 * HIDDEN)
    assert stats.max_act[:4].tolist() == stats.mean_act[:4].tolist() == stats.density[:4].tolist() == [0.0] * 4


def test_a_splice_touches_only_its_policys_positions() -> None:
    lm, noised = model(), batch()
    seen = []

    def look(hidden: Tensor) -> Tensor:
        seen.append(hidden)
        return hidden

    clean = masked_loss(lm, [noised], LAYER, "visible", None)
    assert masked_loss(lm, [noised], LAYER, "visible", look) == clean
    assert torch.equal(seen[0], states(lm, noised, [LAYER])[LAYER][noised.text & ~noised.masked])
    assert masked_loss(lm, [noised], LAYER, "visible", torch.zeros_like) != clean


@given(st.integers(0, 3), st.lists(st.lists(st.booleans(), min_size=6, max_size=6), min_size=1, max_size=3))
def test_a_position_decides_a_chosen_token_if_one_of_its_tokens_is_chosen(shift: int, rows: list[list[bool]]) -> None:
    expected = [[False] * 6 for _ in rows]
    for row, chosen in enumerate(rows):
        for token in range(6):
            if chosen[token]:
                expected[row][max(0, token - shift)] = True
    assert decides(torch.tensor(rows), shift).tolist() == expected


@pytest.mark.parametrize("policy", ["mask", "visible"])
@pytest.mark.parametrize("name", made.FAMILIES)
def test_the_loss_under_a_replacement_is_that_of_states_replaced_where_tokens_are_decided(
    name: str, policy: Policy
) -> None:
    lm, layer = made.family(name), 0
    mask, never = (60, {60}) if name == "sedd" else (4, {0, 2, 4} if name == "bert" else set())
    never = never | ({mask} if "mdlm" in name else set())
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(5, 60, (2, 9), generator=generator)
    masked = torch.rand(2, 9, generator=generator) < 0.5
    text = torch.ones(2, 9, dtype=torch.bool)
    noised = NoisedBatch(tokens, tokens.masked_fill(masked, mask), torch.full((2,), 9), masked, text)
    total, count = 0.0, 0
    for row in range(2):
        hidden = [token for token in range(9) if masked[row, token]]
        chosen = [token for token in range(9) if (token in hidden) == (policy == "mask")]
        places = {max(0, token - 1) if name == "dream" else token for token in chosen}

        def push(at: int, state: Tensor, places: set[int] = places) -> Tensor:
            out = state.clone()
            for place in places if at == layer else ():
                out[0, place] = -2 * state[0, place]
            return out

        sigma = torch.tensor([-math.log(max(0.001, 1 - len(hidden) / 9))])
        odds = lm.head(lm(noised.canvas[row : row + 1], None, push, sigma))[0].double().exp()
        for token in hidden:
            line = odds[max(0, token - 1) if name == "dream" else token]
            mass = sum(float(line[other]) for other in range(len(line)) if other not in never)
            total -= math.log(float(line[tokens[row, token]]) / mass)
            count += 1
    loss = masked_loss(lm, [noised], layer, policy, lambda states: -2 * states)
    assert loss == pytest.approx(total / count, rel=1e-4)


def test_the_last_layers_visible_states_no_longer_reach_the_loss() -> None:
    lm, noised = model(), batch()
    sae = perfect()
    sae.facts = replace(sae.facts, layer=2)
    scores, _ = evaluate_sae(lm, sae, "visible", torch.randn(50, HIDDEN), [noised])
    assert scores["loss_delta"] == scores["loss_delta_zero_ablation"] == 0.0
    assert "loss_recovered_zero" not in scores
