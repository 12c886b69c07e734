"""Scores of an SAE, where their values are known."""

from dataclasses import replace

import torch
from torch import Tensor

from steerserve.models.bert import BertConfig, BertDiffusionLM
from steerserve.saes.activation import Relu
from steerserve.saes.sae import SaeFacts, SparseAutoencoder
from steerserve.train.activations import NoisedBatch, states
from steerserve.train.sae_quality import evaluate_sae, masked_loss, reconstruction

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


def test_the_last_layers_visible_states_no_longer_reach_the_loss() -> None:
    lm, noised = model(), batch()
    sae = perfect()
    sae.facts = replace(sae.facts, layer=2)
    scores, _ = evaluate_sae(lm, sae, "visible", torch.randn(50, HIDDEN), [noised])
    assert scores["loss_delta"] == scores["loss_delta_zero_ablation"] == 0.0
    assert "loss_recovered_zero" not in scores
