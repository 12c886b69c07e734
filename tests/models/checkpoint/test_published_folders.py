"""Folders as people have them: keys in other places, tensors that only repeat others, files left from before."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from steerserve.errors import ArtifactError
from steerserve.models import DiffusionLM, load_model
from tests import tiny
from tests.models.checkpoint.test_loading import write
from tests.models.families import dream_reference


def states(model: DiffusionLM) -> Tensor:
    with torch.no_grad():
        return model.head(model(torch.tensor([[5, 9, tiny.MASK, tiny.MASK, 7]])))


def config(folder: Path, **changes: Any) -> None:
    """Change keys of a folder's config.json; None leaves a key out."""
    raw = json.loads((folder / "config.json").read_text(encoding="utf-8")) | changes
    raw = {key: value for key, value in raw.items() if value is not None}
    (folder / "config.json").write_text(json.dumps(raw), encoding="utf-8")


def add_tensors(folder: Path, **extra: Tensor) -> None:
    file = folder / "model.safetensors"
    save_file(load_file(file) | {name.replace("__", "."): tensor for name, tensor in extra.items()}, file)


ROTARY = {"llada": 500000.0, "dream": 1e6}


def made(folder: Path, family: str, **changes: Any) -> DiffusionLM:
    """A folder of a rotary family and its model as loaded from plain keys."""
    if family == "dream":
        raw = dream_reference.CONFIG | changes
        dream_reference.write(folder, raw, dream_reference.checkpoint(raw))
    else:
        write(folder, family, changes)
    return load_model(folder)


@pytest.mark.parametrize("family", ROTARY)
@pytest.mark.parametrize("section", ["rope_parameters", "rope_scaling"])
@pytest.mark.parametrize("both", [False, True])
def test_a_rotary_base_counts_wherever_it_stands(tmp_path: Path, family: str, section: str, both: bool) -> None:
    plain = states(made(tmp_path, family))
    base = ROTARY[family]
    config(tmp_path, **{"rope_theta": base if both else None, section: {"rope_type": "default", "rope_theta": base}})
    assert torch.equal(states(load_model(tmp_path)), plain)
    config(tmp_path, **{"rope_theta": None, section: {"rope_type": "default", "rope_theta": 37.0}})
    assert not torch.equal(states(load_model(tmp_path)), plain)


@pytest.mark.parametrize("family", ROTARY)
@pytest.mark.parametrize(
    "section",
    [
        {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e6}},
        {"rope_scaling": {"type": "dynamic", "factor": 4.0}},
        {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}},
        {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e6}}},
        {"rope_scaling": "yarn"},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 37.0}},
    ],
)
def test_scaled_positions_and_two_bases_are_refused(tmp_path: Path, family: str, section: dict[str, Any]) -> None:
    made(tmp_path, family)
    config(tmp_path, **section)
    with pytest.raises(ArtifactError, match="rotary"):
        load_model(tmp_path)


@pytest.mark.parametrize(
    ("family", "key", "value"),
    [("llada", "clip_qkv", 8.0), ("dream", "layer_types", ["full_attention", "sliding_attention", "full_attention"])],
)
def test_keys_that_change_the_forward_are_refused(tmp_path: Path, family: str, key: str, value: Any) -> None:
    made(tmp_path, family)
    config(tmp_path, **{key: value})
    with pytest.raises(ArtifactError, match=key):
        load_model(tmp_path)


def test_a_folder_saved_again_by_transformers_5_loads(tmp_path: Path) -> None:
    plain = states(made(tmp_path, "dream"))
    config(
        tmp_path,
        rope_theta=None,
        torch_dtype=None,
        dtype="bfloat16",
        rope_parameters={"rope_type": "default", "rope_theta": 1000000.0},
        layer_types=["full_attention"] * 3,
        transformers_version="5.23.0",
    )
    assert torch.equal(states(load_model(tmp_path)), plain)


HEADS = {
    "llada": ("model__transformer__ff_out__weight", "model.transformer.wte.weight", {"weight_tying": True}),
    "dream": ("lm_head__weight", "model.embed_tokens.weight", {"tie_word_embeddings": True}),
    "bert": ("cls__predictions__decoder__weight", "bert.embeddings.word_embeddings.weight", {}),
}


def tied(folder: Path, family: str) -> DiffusionLM:
    if family == "dream":
        return made(folder, family, tie_word_embeddings=True)
    if family == "bert":
        write(folder, family)
    else:
        model = tiny.llada(weight_tying=True)
        write(folder, family, {"weight_tying": True})
        save_file(dict(model.state_dict()), folder / "model.safetensors")
    return load_model(folder)


@pytest.mark.parametrize("family", HEADS)
def test_a_tied_head_may_be_written_out_as_well(tmp_path: Path, family: str) -> None:
    plain = states(tied(tmp_path, family))
    name, original, _ = HEADS[family]
    add_tensors(tmp_path, **{name: load_file(tmp_path / "model.safetensors")[original].clone()})
    assert torch.equal(states(load_model(tmp_path)), plain)
    add_tensors(tmp_path, **{name: load_file(tmp_path / "model.safetensors")[original] + 1})
    with pytest.raises(ArtifactError, match=f"{name.replace('__', '.')} differs from {original}"):
        load_model(tmp_path)


@pytest.mark.parametrize(
    ("family", "name"),
    [
        ("llada", "model__transformer__blocks__0__rotary_emb__inv_freq"),
        ("dream", "model__layers__0__self_attn__rotary_emb__inv_freq"),
        ("dream", "model__rotary_emb__inv_freq"),
    ],
)
def test_rotary_buffers_are_left_out_where_they_are_ours(tmp_path: Path, family: str, name: str) -> None:
    plain = states(made(tmp_path, family))
    size = 8 if family == "llada" else 12
    frequencies = 1.0 / ROTARY[family] ** (torch.arange(0, size, 2, dtype=torch.float32) / size)
    add_tensors(tmp_path, **{name: frequencies})
    assert torch.equal(states(load_model(tmp_path)), plain)
    add_tensors(tmp_path, **{name: frequencies * 1.1})
    with pytest.raises(ArtifactError, match="other rotary frequencies"):
        load_model(tmp_path)


def test_a_whole_file_comes_before_a_stale_index(tmp_path: Path) -> None:
    plain = states(made(tmp_path, "llada"))
    stale = {"weight_map": {"gone": "model-00001-of-00002.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(stale), encoding="utf-8")
    assert torch.equal(states(load_model(tmp_path)), plain)


def test_a_mixture_of_experts_is_a_family_of_its_own(tmp_path: Path) -> None:
    raw = {"model_type": "llada", "architectures": ["LLaDAMoEModelLM"], "hidden_size": 2048, "num_experts": 64}
    (tmp_path / "config.json").write_text(json.dumps(raw), encoding="utf-8")
    with pytest.raises(
        ArtifactError, match="config.json has no .*num_experts_per_tok.* which the lladamoe family needs"
    ):
        load_model(tmp_path)


@pytest.mark.parametrize("family", ["llada", "bert"])
def test_missing_keys_are_listed_without_a_signature(tmp_path: Path, family: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": family}), encoding="utf-8")
    with pytest.raises(ArtifactError, match=r"config\.json has no \w+, \w+") as error:
        load_model(tmp_path)
    assert "__init__" not in str(error.value)


@pytest.mark.parametrize("vocabulary", ["tokenizer.json", "vocab.txt"])
def test_a_plain_bert_takes_its_special_tokens_from_its_tokenizer(tmp_path: Path, vocabulary: str) -> None:
    model = write(tmp_path, "bert")
    config(tmp_path, **dict.fromkeys(("mask_token_id", "sep_token_id", "cls_token_id", "unk_token_id")))
    with pytest.raises(ArtifactError, match="has no mask_token_id, sep_token_id, cls_token_id"):
        load_model(tmp_path)
    if vocabulary == "vocab.txt":
        (tmp_path / vocabulary).write_text("\n".join(tiny.PIECES), encoding="utf-8")
    else:
        tiny.tokenizer().save(str(tmp_path / vocabulary))
    assert load_model(tmp_path).facts == model.facts


def test_parts_of_a_pretrained_bert_that_predict_no_token_are_left_out(tmp_path: Path) -> None:
    plain = states(write(tmp_path, "bert"))
    old = {
        name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): tensor
        for name, tensor in load_file(tmp_path / "model.safetensors").items()
    }
    old |= {
        "bert.pooler.dense.weight": torch.zeros(32, 32),
        "bert.pooler.dense.bias": torch.zeros(32),
        "cls.seq_relationship.weight": torch.zeros(2, 32),
        "cls.seq_relationship.bias": torch.zeros(2),
        "cls.predictions.decoder.bias": old["cls.predictions.bias"].clone(),
        "bert.embeddings.position_ids": torch.arange(96)[None],
    }
    save_file(old, tmp_path / "model.safetensors")
    assert torch.allclose(states(load_model(tmp_path)), plain, rtol=1e-5, atol=1e-5)


def test_quantised_weights_are_refused_as_such(tmp_path: Path) -> None:
    plain = states(made(tmp_path, "dream"))
    config(tmp_path, quantization_config={"quant_method": "gptq", "bits": 4})
    assert torch.equal(states(load_model(tmp_path)), plain)
    add_tensors(tmp_path, model__layers__0__self_attn__q_proj__qweight=torch.zeros(2, 2, dtype=torch.int32))
    with pytest.raises(ArtifactError, match="quantization_config names 'gptq'; quantised weights are not read"):
        load_model(tmp_path)
