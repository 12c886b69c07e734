"""The SEDD family and its log scores against their description, written out position by position."""

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from steerserve.errors import ArtifactError
from steerserve.models import load_model
from steerserve.models.families.sedd import SeddDiffusionLM, log_score
from steerserve.models.sigma import Geometric, LogLinear
from tests.models.families import dit_reference as dit

CONFIG: dict[str, Any] = {
    "ngpus": 8,
    "tokens": dit.VOCAB - 1,
    "training": {"batch_size": 512, "accum": 1},
    "data": {"train": "openwebtext", "valid": "wikitext103"},
    "graph": {"type": "absorb", "file": "data", "report_all": False},
    "noise": {"type": "loglinear", "sigma_min": 1e-4, "sigma_max": 20},
    "sampling": {"predictor": "euler", "steps": 128, "noise_removal": True},
    "eval": {"batch_size": 512},
    "optim": {"optimizer": "AdamW", "lr": 3e-4},
    "model": {
        "name": "small",
        "type": "ddit",
        "hidden_size": dit.HIDDEN,
        "cond_dim": dit.COND,
        "length": dit.LENGTH,
        "n_blocks": dit.BLOCKS,
        "n_heads": dit.HEADS,
        "scale_by_sigma": True,
        "dropout": 0.1,
    },
}
ROW = torch.tensor([dit.IDS])


def config(**changes: Any) -> dict[str, Any]:
    """The config with keys changed by their path, written with `__` for the dot; None takes the key away."""
    raw = copy.deepcopy(CONFIG)
    for path, value in changes.items():
        *sections, key = path.split("__")
        place = raw[sections[0]] if sections else raw
        if value is None:
            del place[key]
        else:
            place[key] = value
    return raw


def model(raw: dict[str, Any] = CONFIG, dtype: torch.dtype = torch.float32) -> SeddDiffusionLM:
    made = dit.built(SeddDiffusionLM, raw, dit.checkpoint(), dtype)
    assert isinstance(made, SeddDiffusionLM)
    return made


def reference_scores(raw: Tensor, ids: list[int], sigma: float, scaled: bool) -> Tensor:
    """Published log scores [length, vocabulary] of raw outputs, float64."""
    scores = raw.double().clone()
    for position, token in enumerate(ids):
        for other in range(dit.VOCAB):
            if scaled:
                scores[position, other] -= math.log(math.expm1(sigma)) + math.log(dit.VOCAB - 1)
        scores[position, token] = 0.0
    return scores


@pytest.mark.parametrize("scaled", [True, False], ids=["scaled", "unscaled"])
@pytest.mark.parametrize("noise", ["loglinear", "geometric"])
@pytest.mark.parametrize("time", [1e-5, 0.3, 1.0])
def test_log_scores_follow_the_description(noise: str, scaled: bool, time: float) -> None:
    lm = model(config(noise__type=noise, model__scale_by_sigma=scaled))
    assert lm.facts.sigma is not None
    sigma = lm.facts.sigma.total(torch.tensor([time])).float()
    expected_sigma = -math.log1p(-0.999 * time) if noise == "loglinear" else 1e-4 ** (1 - time) * 20**time
    # In float32, as the authors compute it: near time 1 a last bit of the time is 2e-6 of the level.
    assert float(sigma) == pytest.approx(expected_sigma, rel=1e-5)
    raw, _ = dit.reference(dit.checkpoint(), dit.IDS, float(sigma))
    logits = lm.head(lm(ROW, sigma=sigma))
    torch.testing.assert_close(logits[0].double(), raw, atol=1e-5, rtol=1e-5)
    scores = log_score(logits, sigma, ROW, lm.facts.vocab_size, lm.facts.scale_by_sigma)
    expected = reference_scores(raw, dit.IDS, float(sigma), scaled)
    torch.testing.assert_close(scores[0].double(), expected, atol=1e-5, rtol=1e-5)


@given(sigma=st.floats(1e-7, 100.0), seed=st.integers(0, 100), scaled=st.booleans())
def test_log_scores_hold_at_any_noise_level(sigma: float, seed: int, scaled: bool) -> None:
    raw = torch.randn(len(dit.IDS), dit.VOCAB, generator=torch.Generator().manual_seed(seed))
    level = torch.tensor([sigma])
    scores = log_score(raw[None], level, ROW, dit.VOCAB, scaled)
    expected = reference_scores(raw, dit.IDS, float(level), scaled)
    torch.testing.assert_close(scores[0].double(), expected, atol=1e-5, rtol=1e-6)


def test_log_scores_of_rows_at_different_levels_equal_rows_alone() -> None:
    raw = torch.randn(3, 4, dit.VOCAB, generator=torch.Generator().manual_seed(1))
    tokens = torch.tensor([[1, 2, dit.MASK, 4], [dit.MASK] * 4, [0, 0, 7, dit.MASK]])
    sigma = torch.tensor([1e-5, 0.3, 6.0])
    together = log_score(raw, sigma, tokens, dit.VOCAB, True)
    for row in range(3):
        one = slice(row, row + 1)
        assert torch.equal(together[one], log_score(raw[one], sigma[one], tokens[one], dit.VOCAB, True))
    flat = log_score(raw.flatten(0, 1), sigma.repeat_interleave(4), tokens.flatten(), dit.VOCAB, True)
    assert torch.equal(together.flatten(0, 1), flat)


def test_log_scores_leave_the_logits_as_they_were_and_widen_half_precision() -> None:
    raw = torch.randn(1, len(dit.IDS), dit.VOCAB, generator=torch.Generator().manual_seed(2)).bfloat16()
    kept = raw.clone()
    for scaled in (True, False):
        scores = log_score(raw, torch.tensor([0.01]), ROW, dit.VOCAB, scaled)
        assert scores.dtype == torch.float32
        assert torch.equal(raw, kept)


def test_a_forward_needs_the_noise_level() -> None:
    with pytest.raises(ValueError, match=r"sigma must be \[1\], one noise level a row, got None"):
        model()(ROW)


def test_rows_at_different_levels_and_lengths_equal_rows_alone() -> None:
    lm = model()
    sigma = torch.tensor([0.02, 5.0])
    rows = torch.tensor([dit.IDS, dit.IDS[:5] + [1] * 3])
    together = lm(rows, lengths=torch.tensor([8, 5]), sigma=sigma)
    torch.testing.assert_close(together[0], lm(ROW, sigma=sigma[:1])[0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(together[1, :5], lm(ROW[:, :5], sigma=sigma[1:])[0], atol=1e-5, rtol=1e-5)


def test_sites_are_the_outputs_of_the_blocks() -> None:
    _, outputs = dit.reference(dit.checkpoint(), dit.IDS, 0.5)
    seen: dict[int, Tensor] = {}

    def read(layer: int, hidden: Tensor) -> Tensor:
        seen[layer] = hidden[0].double()
        return hidden

    model()(ROW, sites=read, sigma=torch.tensor([0.5]))
    assert list(seen) == list(range(dit.BLOCKS))
    torch.testing.assert_close(list(seen.values()), outputs, atol=1e-5, rtol=1e-5)


def test_bfloat16_stays_near_float32() -> None:
    sigma = torch.tensor([0.5])
    half, full = model(dtype=torch.bfloat16), model()
    logits = half.head(half(ROW, sigma=sigma))
    assert logits.dtype == torch.bfloat16
    torch.testing.assert_close(logits.float(), full.head(full(ROW, sigma=sigma)), atol=0.15, rtol=0.05)


@pytest.mark.parametrize("prefix", ["", "module.", "model."])
def test_a_prefix_and_the_rotary_buffer_change_nothing(prefix: str) -> None:
    tensors = dit.prefixed(dit.checkpoint() | {"rotary_emb.inv_freq": dit.frequencies()}, prefix)
    lm = dit.built(SeddDiffusionLM, CONFIG, tensors, torch.float32)
    sigma = torch.tensor([0.5])
    assert torch.equal(lm(ROW, sigma=sigma), model()(ROW, sigma=sigma))


@pytest.mark.parametrize("noise", ["loglinear", "geometric"])
def test_a_folder_loads(tmp_path: Path, noise: str) -> None:
    raw = config(noise__type=noise)
    lm = load_model(dit.saved(tmp_path, raw, dit.checkpoint() | {"rotary_emb.inv_freq": dit.frequencies()}))
    assert isinstance(lm, SeddDiffusionLM)
    assert lm.facts == model(raw).facts
    sigma = torch.tensor([0.7])
    assert torch.equal(lm(ROW, sigma=sigma), model(raw)(ROW, sigma=sigma))


def test_a_folder_that_does_not_fit_names_the_tensor_and_itself(tmp_path: Path) -> None:
    tensors = dit.checkpoint() | {"ema": torch.ones(1)}
    with pytest.raises(ArtifactError) as caught:
        load_model(dit.saved(tmp_path, CONFIG, tensors))
    assert str(tmp_path) in str(caught.value)
    assert "unexpected tensors: ema" in str(caught.value)


def test_a_prefix_on_some_tensors_only_is_refused() -> None:
    tensors = dit.checkpoint()
    tensors["module.sigma_map.mlp.0.bias"] = tensors.pop("sigma_map.mlp.0.bias")
    with pytest.raises(ArtifactError) as caught:
        SeddDiffusionLM.adapt(CONFIG, tensors)
    assert "missing tensors: sigma_map.mlp.0.bias;" in str(caught.value)
    assert "unexpected tensors: module.sigma_map.mlp.0.bias" in str(caught.value)


@pytest.mark.parametrize("name", ["vocab_embed.embedding", "sigma_map.mlp.2.weight", "blocks.1.adaLN_modulation.bias"])
def test_missing_misshapen_and_extra_tensors_are_named(name: str) -> None:
    tensors = dit.checkpoint()
    whole = tensors.pop(name)
    with pytest.raises(ArtifactError, match=f"missing tensors: {name}$"):
        SeddDiffusionLM.adapt(CONFIG, tensors)
    tensors |= {name: whole[:-1], "blocks.9.norm1.weight": torch.ones(dit.HIDDEN)}
    with pytest.raises(ArtifactError) as caught:
        SeddDiffusionLM.adapt(CONFIG, tensors)
    wrong, right = list(whole[:-1].shape), list(whole.shape)
    assert f"misshapen tensors: {name} is {wrong}, expected {right}" in str(caught.value)
    assert "unexpected tensors: blocks.9.norm1.weight;" in str(caught.value)


def test_facts_and_defaults_are_the_published_ones() -> None:
    facts = model().facts
    assert (facts.family, facts.vocab_size, facts.hidden_size) == ("sedd", dit.VOCAB, dit.HIDDEN)
    assert (facts.num_layers, facts.max_length, facts.shift) == (dit.BLOCKS, dit.LENGTH, 0)
    assert (facts.mask_id, facts.eos_id, facts.bos_id) == (dit.MASK, dit.EOS, None)
    assert facts.forbidden_ids == (dit.MASK,)
    assert (facts.parameterisation, facts.scale_by_sigma, facts.sigma) == ("score", True, LogLinear(eps=1e-3))
    geometric = config(noise__type="geometric", noise__sigma_max=8, model__scale_by_sigma=False)
    facts = model(geometric).facts
    assert (facts.scale_by_sigma, facts.sigma) == (False, Geometric(low=1e-4, high=8.0))
    assert (SeddDiffusionLM.defaults.order, SeddDiffusionLM.defaults.transfer) == ("random", "analytic")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"graph__type": "uniform"}, "graph.type is 'uniform', the sedd family implements 'absorb'"),
        ({"noise__type": "cosine"}, "noise.type is 'cosine', the sedd family implements 'loglinear' or 'geometric'"),
        ({"model__type": "unet"}, "model.type is 'unet', the sedd family implements 'ddit'"),
        ({"model__scale_by_sigma": "yes"}, "model.scale_by_sigma is 'yes'"),
        ({"model__hidden_size": 15}, "model.hidden_size 15 must be model.n_heads 2 times an even number"),
        ({"model__n_blocks": 0}, "model.n_blocks must be a whole number above 0, got 0"),
        ({"tokens": "many"}, "tokens must be a whole number above 0, got 'many'"),
        ({"tokens": None}, "config.json has no tokens, which"),
        ({"model__cond_dim": None}, "config.json has no model.cond_dim, which"),
        ({"model": []}, r"model must be an object, got \[\]"),
        ({"noise": None}, "noise must be an object, got None"),
        ({"noise__type": "geometric", "noise__sigma_min": None}, "config.json has no noise.sigma_min, which"),
        ({"noise__type": "geometric", "noise__sigma_min": 0}, "two numbers above 0, the second the larger, got 0 and"),
        ({"noise__type": "geometric", "noise__sigma_max": "20"}, "got 0.0001 and '20'"),
    ],
)
def test_a_config_that_is_not_implemented_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ArtifactError, match=message):
        SeddDiffusionLM.from_config(config(**changes))
