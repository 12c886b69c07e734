"""Dream's checkpoints: what is read from the config, and the refusal of whatever does not fit."""

from pathlib import Path
from typing import Any

import pytest
import torch

from steerserve.errors import ArtifactError
from steerserve.models import load_model
from steerserve.models.families.dream import DreamDiffusionLM
from tests.models.families.dream_reference import CONFIG, MASK, checkpoint, loaded, tokens, write


def test_shards_load_as_one_file(tmp_path: Path) -> None:
    whole, config, tensors = loaded(tmp_path / "whole")
    write(tmp_path / "shards", config, tensors, shards=3)
    ids = tokens(2, 9)
    parts = load_model(tmp_path / "shards")
    assert torch.equal(parts.head(parts(ids)), whole.head(whole(ids)))


def test_facts_are_read_from_the_config(tmp_path: Path) -> None:
    facts = loaded(tmp_path)[0].facts
    assert (facts.family, facts.vocab_size, facts.hidden_size, facts.num_layers) == ("dream", 101, 48, 3)
    assert (facts.max_length, facts.mask_id, facts.eos_id, facts.bos_id) == (128, MASK, 95, None)
    assert (facts.forbidden_ids, facts.turn_end_id, facts.sigma) == ((), None, None)


def test_a_turn_ends_where_the_vocabulary_says_so() -> None:
    published = {"vocab_size": 152064, "mask_token_id": 151666, "eos_token_id": 151643}
    with torch.device("meta"):
        facts = DreamDiffusionLM.from_config(CONFIG | published).facts
        last = DreamDiffusionLM.from_config(CONFIG | {"vocab_size": 151646}).facts
        short = DreamDiffusionLM.from_config(CONFIG | {"vocab_size": 151645}).facts
    assert (facts.mask_id, facts.eos_id, facts.turn_end_id) == (151666, 151643, 151645)
    assert (last.turn_end_id, short.turn_end_id) == (151645, None)


def test_the_end_of_text_is_the_padding_where_it_is_not_named(tmp_path: Path) -> None:
    config = {name: value for name, value in CONFIG.items() if name != "eos_token_id"} | {"pad_token_id": 94}
    write(tmp_path, config, checkpoint(config))
    assert load_model(tmp_path).facts.eos_id == 94
    named = loaded(tmp_path, pad_token_id=94)[0]
    assert named.facts.eos_id == 95


def test_the_published_sizes_give_the_parameters_of_qwen2_5_7b() -> None:
    published = {
        "vocab_size": 152064,
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
    }
    with torch.device("meta"):
        model = DreamDiffusionLM.from_config(CONFIG | published)
    assert sum(parameter.numel() for parameter in model.parameters()) == 7_615_616_512
    assert model.config.head_size == 128


def test_defaults_are_those_of_the_authors_example() -> None:
    defaults = DreamDiffusionLM.defaults
    assert (defaults.temperature, defaults.top_p, defaults.transfer) == (0.2, 0.95, "timesteps")
    assert defaults.order == {"type": "entropy", "filtered": True}


def test_each_missing_tensor_is_named(tmp_path: Path) -> None:
    config = CONFIG | {"num_hidden_layers": 1}
    whole = checkpoint(config)
    for name in whole:
        write(tmp_path, config, {key: tensor for key, tensor in whole.items() if key != name})
        with pytest.raises(ArtifactError) as error:
            load_model(tmp_path)
        assert f"missing tensors: {name}" in str(error.value)


def test_each_misshapen_tensor_is_named(tmp_path: Path) -> None:
    config = CONFIG | {"num_hidden_layers": 1}
    whole = checkpoint(config)
    for name, tensor in whole.items():
        wrong = torch.zeros(tensor.shape[0] + 1, *tensor.shape[1:])
        write(tmp_path, config, whole | {name: wrong})
        with pytest.raises(ArtifactError) as error:
            load_model(tmp_path)
        assert f"misshapen tensors: {name} is {list(wrong.shape)}, expected {list(tensor.shape)}" in str(error.value)


@pytest.mark.parametrize(
    ("changes", "extra"),
    [
        ({}, "model.layers.0.self_attn.o_proj.bias"),
        ({}, "model.layers.0.self_attn.q_norm.weight"),
        ({}, "model.layers.3.input_layernorm.weight"),
        ({"tie_word_embeddings": True}, "lm_head.weight"),
    ],
)
def test_extra_tensors_are_named(tmp_path: Path, changes: dict[str, Any], extra: str) -> None:
    config = CONFIG | changes
    write(tmp_path, config, checkpoint(config) | {extra: torch.zeros(3)})
    with pytest.raises(ArtifactError) as error:
        load_model(tmp_path)
    assert f"unexpected tensors: {extra}" in str(error.value)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("hidden_act", "gelu"),
        ("use_mrope", True),
        ("rope_scaling", {"rope_type": "yarn", "factor": 4.0}),
        ("rope_parameters", {"rope_type": "linear", "factor": 2.0}),
        ("use_sliding_window", True),
        ("block_size", 32),
    ],
)
def test_variants_that_are_not_implemented_are_refused(tmp_path: Path, key: str, value: object) -> None:
    with pytest.raises(ArtifactError) as error:
        loaded(tmp_path, **{key: value})
    assert key in str(error.value)
    assert repr(value) in str(error.value)


@pytest.mark.parametrize(
    "changes",
    [
        {"num_key_value_heads": 3},
        {"num_attention_heads": 5, "num_key_value_heads": 5},
        {"hidden_size": 0},
        {"num_hidden_layers": 2.0},
        {"head_dim": 7},
        {"head_dim": -2},
        {"rope_theta": 0},
        {"rope_theta": "1e6"},
        {"rms_norm_eps": -1e-6},
        {"tie_word_embeddings": "false"},
        {"vocab_size": 90},
        {"mask_token_id": 101},
    ],
)
def test_sizes_that_do_not_fit_are_refused(tmp_path: Path, changes: dict[str, Any]) -> None:
    write(tmp_path, CONFIG | changes, checkpoint(CONFIG))
    with pytest.raises(ArtifactError, match=r"config\.json: "):
        load_model(tmp_path)


@pytest.mark.parametrize(
    "key", ["vocab_size", "num_key_value_heads", "rope_theta", "mask_token_id", "max_position_embeddings"]
)
@pytest.mark.parametrize("null", [False, True])
def test_a_key_that_is_missing_or_null_is_named(tmp_path: Path, key: str, null: bool) -> None:
    config = {name: value for name, value in CONFIG.items() if name != key} | ({key: None} if null else {})
    write(tmp_path, config, checkpoint(CONFIG))
    with pytest.raises(ArtifactError, match=key):
        load_model(tmp_path)


def test_a_null_head_size_follows_from_the_hidden_size() -> None:
    assert DreamDiffusionLM.from_config(CONFIG | {"head_dim": None}).config.head_size == 12
