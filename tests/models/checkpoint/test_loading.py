"""Loading is strict: whatever does not fit is an ArtifactError that names it."""

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from steerserve.errors import ArtifactError
from steerserve.models import (
    FAMILIES,
    DiffusionLM,
    SamplerDefaults,
    load_model,
    read_config,
)
from steerserve.models.families import family_of
from steerserve.models.families.llada import LladaDiffusionLM
from tests import tiny

MODELS: dict[str, Callable[[], Any]] = {"bert": tiny.bert, "llada": tiny.llada}


def write(folder: Path, family: str, config: dict[str, Any] | None = None) -> DiffusionLM:
    """A whole model folder; `config` overrides keys of its config.json."""
    model = MODELS[family]()
    folder.mkdir(parents=True, exist_ok=True)
    save_file(dict(model.state_dict()), folder / "model.safetensors")
    raw = {"model_type": family, **asdict(model.config), **(config or {})}
    (folder / "config.json").write_text(json.dumps(raw), encoding="utf-8")
    loaded: DiffusionLM = model
    return loaded


def rewrite(folder: Path, family: str, change: Callable[[dict[str, Tensor]], None]) -> None:
    tensors = dict(write(folder, family).state_dict())
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def shard(folder: Path, family: str) -> None:
    """The same folder as two shards with an index."""
    tensors = dict(write(folder, family).state_dict())
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    weight_map = {name: f"model-0000{1 + i % 2}-of-00002.safetensors" for i, name in enumerate(names)}
    for file in set(weight_map.values()):
        save_file({name: tensors[name] for name in names if weight_map[name] == file}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}), encoding="utf-8")


EACH_FAMILY = pytest.mark.parametrize("family", sorted(MODELS))


@EACH_FAMILY
def test_a_folder_loads_as_it_was_saved(tmp_path: Path, family: str) -> None:
    saved, loaded = write(tmp_path, family), load_model(tmp_path)
    ids = torch.arange(12)[None] + 5
    assert torch.equal(loaded.head(loaded(ids)), saved.head(saved(ids)))
    assert loaded.facts == saved.facts
    assert not loaded.training
    assert not any(parameter.requires_grad for parameter in loaded.parameters())


@EACH_FAMILY
def test_a_sharded_folder_loads_alike(tmp_path: Path, family: str) -> None:
    saved = write(tmp_path / "whole", family)
    shard(tmp_path / "shards", family)
    loaded = load_model(tmp_path / "shards")
    assert all(torch.equal(tensor, saved.state_dict()[name]) for name, tensor in loaded.state_dict().items())


def test_weights_are_brought_to_one_type(tmp_path: Path) -> None:
    rewrite(tmp_path, "llada", lambda t: t.update({name: tensor.bfloat16() for name, tensor in t.items()}))
    assert {p.dtype for p in load_model(tmp_path).parameters()} == {torch.float32}
    assert {p.dtype for p in load_model(tmp_path, torch.bfloat16).parameters()} == {torch.bfloat16}


@EACH_FAMILY
def test_missing_unexpected_and_misshapen_tensors_are_named_together(tmp_path: Path, family: str) -> None:
    names = sorted(MODELS[family]().state_dict())

    def break_it(tensors: dict[str, Tensor]) -> None:
        del tensors[names[0]]
        tensors[names[1]] = torch.zeros(3, 2)
        tensors["model.extra"] = torch.zeros(1)

    rewrite(tmp_path, family, break_it)
    with pytest.raises(ArtifactError) as error:
        load_model(tmp_path)
    assert f"missing tensors: {names[0]}" in str(error.value)
    assert "unexpected tensors: model.extra" in str(error.value)
    assert f"misshapen tensors: {names[1]} is [3, 2], expected" in str(error.value)


def test_a_truncated_file_is_refused(tmp_path: Path) -> None:
    write(tmp_path, "bert")
    path = tmp_path / "model.safetensors"
    for size in (0, 5, path.stat().st_size - 100):
        path.write_bytes(path.read_bytes()[:size])
        with pytest.raises(ArtifactError, match="not a whole safetensors file"):
            load_model(tmp_path)
        write(tmp_path, "bert")


def test_a_tensor_in_two_shards_is_refused(tmp_path: Path) -> None:
    shard(tmp_path, "llada")
    files = sorted(tmp_path.glob("*.safetensors"))
    files[1].write_bytes(files[0].read_bytes())
    with pytest.raises(ArtifactError, match="is in two shards"):
        load_model(tmp_path)


@pytest.mark.parametrize("place", ["../model.safetensors", "sub/model.safetensors", "/etc/passwd"])
def test_a_shard_outside_the_folder_is_refused(tmp_path: Path, place: str) -> None:
    write(tmp_path, "bert")
    folder = tmp_path / "inner"
    write(folder, "bert")
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": place}}), encoding="utf-8")
    with pytest.raises(ArtifactError, match="outside its folder"):
        load_model(folder)


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"weight_map": []}', '{"weight_map": 3}', '{"weight_map": {"a": 3}}']
)
def test_a_broken_index_is_refused(tmp_path: Path, text: str) -> None:
    write(tmp_path, "bert")
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / "model.safetensors.index.json").write_text(text, encoding="utf-8")
    with pytest.raises(ArtifactError):
        load_model(tmp_path)


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    shard(tmp_path, "bert")
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(ArtifactError, match="has no model-00002-of-00002.safetensors"):
        load_model(tmp_path)


@pytest.mark.parametrize(
    ("family", "key", "value"),
    [
        ("llada", "block_type", "sequential"),
        ("llada", "alibi", True),
        ("llada", "rope", False),
        ("llada", "rope_full_precision", False),
        ("llada", "layer_norm_type", "default"),
        ("llada", "activation_type", "swiglu"),
        ("llada", "include_bias", True),
        ("llada", "attention_layer_norm", True),
        ("llada", "input_emb_norm", True),
        ("llada", "multi_query_attention", True),
        ("llada", "block_group_size", 4),
        ("llada", "n_heads", 5),
        ("llada", "n_kv_heads", 3),
        ("llada", "embedding_size", 90),
        ("llada", "d_model", "32"),
        ("llada", "mask_token_id", 97),
        ("llada", "eos_token_id", -1),
        ("llada", "mask_token_id", None),
        ("bert", "mask_token_id", "4"),
        ("bert", "hidden_act", "relu"),
        ("bert", "position_embedding_type", "relative_key"),
        ("bert", "is_decoder", True),
        ("bert", "tie_word_embeddings", False),
        ("bert", "num_attention_heads", 5),
        ("bert", "num_attention_heads", 0),
        ("bert", "hidden_size", -1),
        ("bert", "vocab_size", 9.5),
        ("bert", "num_hidden_layers", True),
        ("bert", "mask_token_id", 97),
    ],
)
def test_a_config_that_is_not_implemented_is_refused(tmp_path: Path, family: str, key: str, value: Any) -> None:
    write(tmp_path, family, {key: value})
    said = {"mask_token_id": "mask token", "eos_token_id": "eos token"}.get(key, key)
    with pytest.raises(ArtifactError, match=said) as error:
        load_model(tmp_path)
    assert str(value) in str(error.value)


@EACH_FAMILY
def test_the_published_values_are_taken(tmp_path: Path, family: str) -> None:
    said: dict[str, dict[str, Any]] = {
        "llada": {"block_type": "llama", "rope": True, "multi_query_attention": None, "precision": "amp_bf16"},
        "bert": {"hidden_act": "gelu", "position_embedding_type": "absolute", "architectures": ["BertForMaskedLM"]},
    }
    write(tmp_path, family, said[family])
    assert load_model(tmp_path).facts.family == family


@pytest.mark.parametrize(("family", "key"), [("bert", "hidden_size"), ("llada", "d_model"), ("llada", "mask_token_id")])
def test_a_missing_key_is_named(tmp_path: Path, family: str, key: str) -> None:
    write(tmp_path, family)
    raw = read_config(tmp_path)
    del raw[key]
    (tmp_path / "config.json").write_text(json.dumps(raw), encoding="utf-8")
    with pytest.raises(ArtifactError, match=key):
        load_model(tmp_path)


@pytest.mark.parametrize("text", [None, "", "{", "[1]", "{}", '{"model_type": "mamba"}', '{"model_type": ["bert"]}'])
def test_a_folder_that_is_no_model_is_refused(tmp_path: Path, text: str | None) -> None:
    if text is not None:
        (tmp_path / "config.json").write_text(text, encoding="utf-8")
    with pytest.raises(ArtifactError):
        load_model(tmp_path)


@pytest.mark.parametrize("family", ["bert", "llada", "Dream", "mdlm", "sedd"])
def test_a_config_names_its_family(tmp_path: Path, family: str) -> None:
    assert family_of(tmp_path, {"model_type": family}) is FAMILIES[family]


def test_sedd_is_told_by_its_training_configuration(tmp_path: Path) -> None:
    sections: dict[str, Any] = {"graph": {}, "noise": {}, "model": {}}
    assert family_of(tmp_path, sections) is FAMILIES["sedd"]
    for section in sections:
        with pytest.raises(ArtifactError, match="known families are Dream, .* sedd"):
            family_of(tmp_path, {**sections, section: "x"})


def test_an_error_of_a_family_names_the_folder(tmp_path: Path) -> None:
    write(tmp_path, "llada", {"alibi": True})
    with pytest.raises(ArtifactError) as error:
        load_model(tmp_path)
    assert str(error.value).startswith(f"{tmp_path}: config.json: alibi is True")


def test_llada_is_sampled_as_published_and_ends_a_turn_with_its_own_token() -> None:
    assert LladaDiffusionLM.defaults == SamplerDefaults(temperature=0.0, order="confidence", transfer="linear")
    published = {"d_model": 8, "n_layers": 1, "n_heads": 1, "vocab_size": 126464, "max_sequence_length": 16}
    ids = {"mask_token_id": 126336, "eos_token_id": 126081}
    with torch.device("meta"):
        facts = LladaDiffusionLM.from_config(published | ids).facts
        # Another vocabulary, in which that id means something else or nothing.
        others = [{"mask_token_id": 5, "eos_token_id": 2}, {"vocab_size": 126340}]
        others_facts = [LladaDiffusionLM.from_config(published | ids | one).facts for one in others]
    assert (facts.turn_end_id, facts.bos_id) == (126348, None)
    assert [one.turn_end_id for one in others_facts] == [None, None]


def test_a_model_is_loaded_without_torch_s_compiler(tmp_path: Path) -> None:
    """Its import takes longer than to load a small model."""
    write(tmp_path, "bert")
    program = f"""
import sys
from pathlib import Path
from steerserve.models import load_model
load_model(Path({str(tmp_path)!r}))
assert "torch._dynamo" not in sys.modules
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
