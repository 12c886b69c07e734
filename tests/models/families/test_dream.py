"""The Dream family against its description, and against transformers' Qwen2 with every position in sight."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from steerserve.models import load_model
from steerserve.models.base import deciding
from tests.models.families.dream_reference import CONFIG, IDS, checkpoint, head_size, loaded, reference, tokens, write

SIZES = pytest.mark.parametrize(
    "changes",
    [
        {"num_key_value_heads": 4},
        {"num_key_value_heads": 2},
        {"num_key_value_heads": 1, "rope_theta": 10000.0, "rms_norm_eps": 1e-2},
        {"tie_word_embeddings": True, "num_hidden_layers": 1},
        {"head_dim": 16, "vocab_size": 103, "intermediate_size": 40},
        {"hidden_size": 64, "num_attention_heads": 8, "num_key_value_heads": 2, "num_hidden_layers": 4},
    ],
    ids=["groups-of-1", "groups-of-2", "groups-of-4", "tied", "head-dim", "wider"],
)


@SIZES
def test_logits_follow_the_description(tmp_path: Path, changes: dict[str, Any]) -> None:
    model, config, tensors = loaded(tmp_path, **changes)
    logits = model.head(model(torch.tensor([IDS])))[0]
    assert logits.shape == (len(IDS), config["vocab_size"])
    torch.testing.assert_close(logits.double(), reference(config, tensors, IDS)[0], atol=1e-5, rtol=1e-5)


@SIZES
@torch.no_grad()
def test_logits_are_those_of_a_qwen2_that_sees_every_position(tmp_path: Path, changes: dict[str, Any]) -> None:
    from transformers import Qwen2Config, Qwen2ForCausalLM

    model, config, tensors = loaded(tmp_path, **changes)
    same = (
        *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
        *("num_key_value_heads", "rms_norm_eps", "tie_word_embeddings", "max_position_embeddings"),
    )
    settings: dict[str, Any] = {name: config[name] for name in same} | {
        "head_dim": head_size(config),
        "rope_parameters": {"rope_type": "default", "rope_theta": config["rope_theta"]},
        "attn_implementation": "eager",
    }
    theirs: Any = Qwen2ForCausalLM(Qwen2Config(**settings))
    theirs.eval()
    tied = {"lm_head.weight": tensors["model.embed_tokens.weight"]} if config["tie_word_embeddings"] else {}
    theirs.load_state_dict(tensors | tied)
    ids, lengths = tokens(3, 40), torch.tensor([40, 11, 23])
    inside = torch.arange(40) < lengths[:, None]
    sight = torch.zeros(3, 1, 40, 40).masked_fill(~inside[:, None, None, :], torch.finfo(torch.float32).min)
    expected = theirs(ids, attention_mask=sight).logits
    torch.testing.assert_close(model.head(model(ids, lengths))[inside], expected[inside], atol=1e-5, rtol=1e-5)


def test_the_state_before_a_token_decides_it(tmp_path: Path) -> None:
    model, config, tensors = loaded(tmp_path)
    assert model.facts.shift == 1
    logits = model.head(deciding(model(torch.tensor([IDS])), model.facts.shift))[0]
    own = reference(config, tensors, IDS)[0]
    torch.testing.assert_close(logits.double(), torch.cat([own[:1], own[:-1]]), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_padded_rows_are_rows_alone(tmp_path: Path, kv_heads: int) -> None:
    model, _, _ = loaded(tmp_path, num_key_value_heads=kv_heads)
    ids, lengths = tokens(4, 33), torch.tensor([33, 1, 8, 20])
    padded = model(ids, lengths)
    for row, length in enumerate(lengths.tolist()):
        alone = model(ids[row : row + 1, :length])[0]
        torch.testing.assert_close(padded[row, :length], alone, atol=1e-5, rtol=1e-5)


def test_what_stands_in_the_padding_is_never_seen(tmp_path: Path) -> None:
    model, _, _ = loaded(tmp_path)
    ids, lengths = tokens(2, 24), torch.tensor([24, 9])
    other = ids.clone()
    other[1, 9:] = tokens(1, 15, seed=5)[0]
    assert torch.equal(model(ids, lengths)[1, :9], model(other, lengths)[1, :9])


def test_sites_see_the_output_of_each_layer_once_and_in_order(tmp_path: Path) -> None:
    model, config, tensors = loaded(tmp_path)
    seen: list[tuple[int, Tensor]] = []

    def record(layer: int, hidden: Tensor) -> Tensor:
        seen.append((layer, hidden))
        return hidden

    ids = torch.tensor([IDS])
    assert torch.equal(model(ids, sites=record), model(ids))
    assert [layer for layer, _ in seen] == [0, 1, 2]
    for (_, hidden), expected in zip(seen, reference(config, tensors, IDS)[1], strict=True):
        torch.testing.assert_close(hidden[0].double(), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("layer", [0, 1, 2])
def test_sites_change_what_later_layers_see(tmp_path: Path, layer: int) -> None:
    model, config, tensors = loaded(tmp_path)
    push = torch.randn(len(IDS), config["hidden_size"], generator=torch.Generator().manual_seed(layer))
    ids = torch.tensor([IDS])
    logits = model.head(model(ids, sites=lambda at, hidden: hidden + push if at == layer else hidden))[0]
    expected = reference(config, tensors, IDS, {layer: push.double()})[0]
    torch.testing.assert_close(logits.double(), expected, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(logits, model.head(model(ids))[0], atol=1e-2)


def test_bfloat16_weights_load_in_either_type(tmp_path: Path) -> None:
    tensors = {name: tensor.bfloat16() for name, tensor in checkpoint(CONFIG).items()}
    write(tmp_path, CONFIG, tensors)
    wide, narrow = load_model(tmp_path), load_model(tmp_path, torch.bfloat16)
    ids = torch.tensor([IDS])
    exact = reference(CONFIG, tensors, IDS)[0]
    torch.testing.assert_close(wide.head(wide(ids))[0].double(), exact, atol=1e-5, rtol=1e-5)
    logits = narrow.head(narrow(ids, torch.tensor([len(IDS)])))[0]
    assert logits.dtype == torch.bfloat16
    torch.testing.assert_close(logits.double(), exact, atol=0.1, rtol=0.02)
