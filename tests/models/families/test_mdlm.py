"""The MDLM family against its description, written out head by head and position by position."""

import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from steerserve.errors import ArtifactError
from steerserve.models import load_model
from steerserve.models.families.mdlm import MdlmDiffusionLM
from steerserve.models.sigma import LogLinear
from tests.models.families import dit_reference as dit

CONFIG: dict[str, Any] = {
    "model_type": "mdlm",
    "architectures": ["MDLM"],
    "vocab_size": dit.VOCAB,
    "model_length": dit.LENGTH,
    "hidden_dim": dit.HIDDEN,
    "cond_dim": dit.COND,
    "n_blocks": dit.BLOCKS,
    "n_heads": dit.HEADS,
    "dropout": 0.1,
    "time_conditioning": False,
    "return_dict": False,
}
TIMED = {**CONFIG, "time_conditioning": True}
ROW = torch.tensor([dit.IDS])


def model(raw: dict[str, Any] = CONFIG, dtype: torch.dtype = torch.float32) -> MdlmDiffusionLM:
    made = dit.built(MdlmDiffusionLM, raw, dit.prefixed(dit.checkpoint(), "backbone."), dtype)
    assert isinstance(made, MdlmDiffusionLM)
    return made


def test_logits_follow_the_description_with_sigma_at_zero() -> None:
    lm = model()
    expected, _ = dit.reference(dit.checkpoint(), dit.IDS, 0.0)
    logits = lm.head(lm(ROW))[0]
    assert logits.shape == (len(dit.IDS), dit.VOCAB)
    torch.testing.assert_close(logits.double(), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("sigma", [0.0, 0.01, 0.7, 6.9])
def test_logits_follow_the_description_at_a_noise_level(sigma: float) -> None:
    lm = model(TIMED)
    expected, _ = dit.reference(dit.checkpoint(), dit.IDS, sigma)
    logits = lm.head(lm(ROW, sigma=torch.tensor([sigma])))[0]
    torch.testing.assert_close(logits.double(), expected, atol=1e-5, rtol=1e-5)


def test_the_noise_level_matters_and_is_each_rows_own() -> None:
    lm = model(TIMED)
    levels = torch.tensor([0.1, 4.0])
    together = lm(ROW.repeat(2, 1), sigma=levels)
    for row, level in enumerate(levels):
        torch.testing.assert_close(together[row], lm(ROW, sigma=level[None])[0], atol=1e-5, rtol=1e-5)
    assert not torch.allclose(together[0], together[1], atol=1e-2)


def test_folded_modulations_equal_the_layers_they_replace() -> None:
    folded, timed = model(), model(TIMED)
    torch.testing.assert_close(folded(ROW), timed(ROW, sigma=torch.zeros(1)), atol=1e-5, rtol=1e-5)
    names = set(folded.state_dict())
    assert not any("sigma_map" in name or name.endswith("adaLN_modulation.weight") for name in names)
    assert sum(name.endswith("adaLN_modulation.constant") for name in names) == dit.BLOCKS + 1


def test_a_folded_model_takes_no_noise_level() -> None:
    lm = model()
    assert lm.facts.sigma is None
    assert torch.equal(lm(ROW), lm(ROW, sigma=torch.tensor([3.0])))


@pytest.mark.parametrize("sigma", [None, torch.zeros(2), torch.zeros(1, 1)], ids=["none", "too-many", "2-d"])
def test_a_timed_model_refuses_a_forward_without_one_noise_level_a_row(sigma: Tensor | None) -> None:
    with pytest.raises(ValueError, match=r"sigma must be \[1\], one noise level a row"):
        model(TIMED)(ROW, sigma=sigma)


@pytest.mark.parametrize("raw", [CONFIG, TIMED], ids=["folded", "timed"])
@pytest.mark.parametrize("prefix", ["backbone.", "", "model.", "module."])
@pytest.mark.parametrize("frequencies", [True, False], ids=["rotary", "no-rotary"])
def test_prefix_and_rotary_buffer_change_nothing(raw: dict[str, Any], prefix: str, frequencies: bool) -> None:
    tensors = dit.checkpoint() | ({"rotary_emb.inv_freq": dit.frequencies()} if frequencies else {})
    lm = dit.built(MdlmDiffusionLM, raw, dit.prefixed(tensors, prefix), torch.float32)
    sigma = torch.ones(1)
    assert torch.equal(lm(ROW, sigma=sigma), model(raw)(ROW, sigma=sigma))


@pytest.mark.parametrize("raw", [CONFIG, TIMED], ids=["folded", "timed"])
def test_a_missing_or_misshapen_tensor_is_named_as_in_the_file(raw: dict[str, Any]) -> None:
    whole = dit.prefixed(dit.checkpoint(), "backbone.")
    # One block stands for the others, whose names are made by the same loop.
    for name in (name for name in whole if ".blocks." not in name or ".blocks.1." in name):
        tensors = {key: tensor for key, tensor in whole.items() if key != name}
        with pytest.raises(ArtifactError, match=rf"missing tensors: {re.escape(name)}$"):
            MdlmDiffusionLM.adapt(raw, tensors)
        shape = list(whole[name].shape)
        wrong = [*shape[:-1], shape[-1] - 1]
        with pytest.raises(ArtifactError) as caught:
            MdlmDiffusionLM.adapt(raw, tensors | {name: whole[name][..., :-1]})
        assert str(caught.value).endswith(f"misshapen tensors: {name} is {wrong}, expected {shape}")


@pytest.mark.parametrize("extra", ["backbone.blocks.3.norm1.weight", "ema.decay", "blocks.0.norm1.weight"])
def test_an_extra_tensor_is_named(extra: str) -> None:
    tensors = dit.prefixed(dit.checkpoint(), "backbone.") | {extra: torch.ones(1)}
    with pytest.raises(ArtifactError, match=f"unexpected tensors: {extra}$"):
        MdlmDiffusionLM.adapt(CONFIG, tensors)


def test_a_file_of_two_prefixes_is_refused() -> None:
    tensors = dit.prefixed(dit.checkpoint(), "backbone.")
    tensors["model.vocab_embed.embedding"] = tensors.pop("backbone.vocab_embed.embedding")
    with pytest.raises(ArtifactError) as caught:
        MdlmDiffusionLM.adapt(CONFIG, tensors)
    assert "missing tensors: backbone.vocab_embed.embedding;" in str(caught.value)
    assert "unexpected tensors: model.vocab_embed.embedding" in str(caught.value)


def test_an_integer_tensor_is_named() -> None:
    name = "backbone.blocks.1.adaLN_modulation.bias"
    tensors = dit.prefixed(dit.checkpoint(), "backbone.")
    tensors[name] = tensors[name].to(torch.int8)
    with pytest.raises(ArtifactError, match=f"no floating-point numbers: {name} is torch.int8$"):
        MdlmDiffusionLM.adapt(CONFIG, tensors)


@pytest.mark.parametrize("raw", [CONFIG, TIMED], ids=["folded", "timed"])
@pytest.mark.parametrize("prefix", ["backbone.", ""])
def test_a_folder_loads(tmp_path: Path, raw: dict[str, Any], prefix: str) -> None:
    tensors = dit.prefixed(dit.checkpoint() | {"rotary_emb.inv_freq": dit.frequencies()}, prefix)
    lm = load_model(dit.saved(tmp_path, raw, tensors))
    assert isinstance(lm, MdlmDiffusionLM)
    sigma = torch.tensor([0.7])
    assert torch.equal(lm(ROW, sigma=sigma), model(raw)(ROW, sigma=sigma))


def test_a_folder_that_does_not_fit_names_the_tensor_and_itself(tmp_path: Path) -> None:
    tensors = dit.prefixed(dit.checkpoint(), "backbone.")
    del tensors["backbone.sigma_map.mlp.0.bias"]
    with pytest.raises(ArtifactError) as caught:
        load_model(dit.saved(tmp_path, CONFIG, tensors))
    assert str(tmp_path) in str(caught.value)
    assert "missing tensors: backbone.sigma_map.mlp.0.bias" in str(caught.value)


def test_many_faults_are_counted() -> None:
    with pytest.raises(ArtifactError, match=f"and {len(dit.LAYOUT) - 8} more"):
        MdlmDiffusionLM.adapt(CONFIG, {})


@pytest.mark.parametrize(
    ("buffer", "message"),
    [
        (dit.frequencies(500000.0), "backbone.rotary_emb.inv_freq holds other rotary frequencies"),
        (dit.frequencies(10500.0).bfloat16(), "backbone.rotary_emb.inv_freq holds other rotary frequencies"),
        (dit.frequencies() * math.nan, "backbone.rotary_emb.inv_freq holds other rotary frequencies"),
        (torch.ones(3), r"backbone.rotary_emb.inv_freq is \[3\], expected \[4\]"),
    ],
    ids=["base", "base-half", "nan", "shape"],
)
def test_other_rotary_frequencies_are_refused(buffer: Tensor, message: str) -> None:
    tensors = dit.prefixed(dit.checkpoint() | {"rotary_emb.inv_freq": buffer}, "backbone.")
    with pytest.raises(ArtifactError, match=message):
        MdlmDiffusionLM.adapt(CONFIG, tensors)


def test_a_half_precision_file_keeps_its_rotary_frequencies_and_folds_in_float32() -> None:
    tensors = dit.prefixed(dit.checkpoint() | {"rotary_emb.inv_freq": dit.frequencies()}, "backbone.")
    halves = {name: tensor.bfloat16() for name, tensor in tensors.items()}
    own = MdlmDiffusionLM.adapt(CONFIG, halves)
    constants = [tensor for name, tensor in own.items() if name.endswith("constant")]
    assert len(constants) == dit.BLOCKS + 1
    assert all(tensor.dtype == torch.float32 for tensor in constants)
    assert own["backbone.vocab_embed.embedding"].dtype == torch.bfloat16


@pytest.mark.parametrize("raw", [CONFIG, TIMED], ids=["folded", "timed"])
def test_a_padded_row_equals_the_row_alone(raw: dict[str, Any]) -> None:
    lm = model(raw)
    short = dit.IDS[:5]
    rows = torch.tensor([dit.IDS, short + [3] * 3])
    sigma = torch.tensor([0.4, 2.0])
    padded = lm(rows, lengths=torch.tensor([8, 5]), sigma=sigma)
    torch.testing.assert_close(padded[0], lm(ROW, sigma=sigma[:1])[0], atol=1e-5, rtol=1e-5)
    alone = lm(torch.tensor([short]), sigma=sigma[1:])
    torch.testing.assert_close(padded[1, :5], alone[0], atol=1e-5, rtol=1e-5)


def test_sites_are_the_outputs_of_the_blocks_and_may_change_them() -> None:
    lm = model()
    _, outputs = dit.reference(dit.checkpoint(), dit.IDS, 0.0)
    seen: list[Tensor] = []

    def read(layer: int, hidden: Tensor) -> Tensor:
        assert layer == len(seen)
        seen.append(hidden)
        return hidden

    plain = lm(ROW, sites=read)
    assert torch.equal(plain, lm(ROW))
    torch.testing.assert_close(torch.cat(seen).double(), torch.stack(outputs), atol=1e-5, rtol=1e-5)
    push = torch.linspace(-1.5, 1.5, dit.HIDDEN)
    pushed = lm(ROW, sites=lambda layer, hidden: hidden + push if layer == 1 else hidden)
    assert not torch.allclose(plain, pushed, atol=1e-2)


@pytest.mark.parametrize("raw", [CONFIG, TIMED], ids=["folded", "timed"])
def test_bfloat16_stays_near_float32(raw: dict[str, Any]) -> None:
    sigma = torch.tensor([0.5])
    half, full = model(raw, torch.bfloat16), model(raw)
    logits = half.head(half(ROW, sigma=sigma))
    assert logits.dtype == torch.bfloat16
    torch.testing.assert_close(logits.float(), full.head(full(ROW, sigma=sigma)), atol=0.15, rtol=0.05)


def test_facts_and_defaults_are_the_published_ones() -> None:
    facts = model().facts
    assert (facts.family, facts.vocab_size, facts.hidden_size) == ("mdlm", dit.VOCAB, dit.HIDDEN)
    assert (facts.num_layers, facts.max_length, facts.shift) == (dit.BLOCKS, dit.LENGTH, 0)
    assert (facts.mask_id, facts.eos_id, facts.bos_id) == (dit.MASK, dit.EOS, dit.EOS)
    assert facts.forbidden_ids == (dit.MASK,)
    assert (facts.parameterisation, facts.sigma) == ("logits", None)
    assert model(TIMED).facts.sigma == LogLinear(eps=1e-3)
    defaults = MdlmDiffusionLM.defaults
    assert (defaults.temperature, defaults.order, defaults.transfer) == (1.0, "random", "ddpm_cache")
    with torch.device("meta"):
        published = MdlmDiffusionLM.from_config({**CONFIG, "vocab_size": 50258})
    assert (published.facts.mask_id, published.facts.eos_id) == (50257, 50256)


def test_a_config_may_name_its_mask_and_end_of_text() -> None:
    with torch.device("meta"):
        facts = MdlmDiffusionLM.from_config({**CONFIG, "mask_token_id": 7, "eos_token_id": 3}).facts
    assert (facts.mask_id, facts.eos_id, facts.forbidden_ids) == (7, 3, (7,))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n_heads": 3}, "hidden_dim 16 must be n_heads 3 times an even number"),
        ({"n_blocks": 0}, "n_blocks must be a whole number above 0"),
        ({"cond_dim": 1.5}, "cond_dim must be a whole number above 0"),
        ({"time_conditioning": "yes"}, "time_conditioning must be true or false, got 'yes'"),
    ],
)
def test_an_impossible_config_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ArtifactError, match=message):
        MdlmDiffusionLM.from_config(CONFIG | changes)


def test_a_missing_key_is_named() -> None:
    raw = {key: value for key, value in CONFIG.items() if key != "cond_dim"}
    with pytest.raises(ArtifactError, match="has no cond_dim"):
        MdlmDiffusionLM.from_config(raw)
