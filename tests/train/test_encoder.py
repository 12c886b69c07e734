"""Starting from a pretrained encoder: its layers are kept and its embeddings gathered by piece."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from steerserve.errors import ArtifactError
from steerserve.train.encoder import read_vocabulary, start_from_encoder
from steerserve.train.tokenizer import SPECIAL, Vocabulary

PIECES = [*SPECIAL, "the", "team", "##s", ",", "won"]
POINTER = "version https://git-lfs.github.com/spec/v1\n"


def write_encoder(folder: Path) -> Any:
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(PIECES), hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
        max_position_embeddings=20, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    encoder: Any = BertModel(config)
    encoder.eval()
    save_file(
        {name: tensor.contiguous() for name, tensor in encoder.state_dict().items()}, folder / "model.safetensors"
    )
    (folder / "config.json").write_text(json.dumps(config.to_dict()))
    (folder / "vocab.txt").write_text("\n".join(PIECES))
    return encoder


@torch.no_grad()
def test_hidden_states_are_those_of_the_encoder_for_the_same_pieces(tmp_path: Path) -> None:
    encoder = write_encoder(tmp_path)
    vocabulary = Vocabulary((*SPECIAL, "won", "the", "##,"), (*SPECIAL, "won", "the", ","))
    model = start_from_encoder(tmp_path, vocabulary, context=12)
    old = read_vocabulary(tmp_path)
    tokens = torch.tensor([[2, 6, 5, 7, 3]])
    same = torch.tensor([[old[vocabulary.origins[i]] for i in tokens[0].tolist()]])
    torch.testing.assert_close(model(tokens), encoder(same).last_hidden_state, rtol=1e-5, atol=1e-5)
    assert model.facts.max_length == 12
    assert model.facts.vocab_size == 8


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("config.json", None, "config.json"),
        ("config.json", "{}", "config.json has no hidden_size, num_hidden_layers"),
        ("vocab.txt", None, "vocab.txt"),
        ("vocab.txt", POINTER, "vocab.txt is a Git LFS pointer"),
        ("model.safetensors", None, "model.safetensors"),
        ("model.safetensors", "no tensors", "model.safetensors"),
        ("model.safetensors", POINTER, "model.safetensors is a Git LFS pointer"),
    ],
)
def test_a_folder_that_holds_no_encoder_is_refused(
    tmp_path: Path, file: str, content: str | None, message: str
) -> None:
    write_encoder(tmp_path)
    (tmp_path / file).unlink()
    if content is not None:
        (tmp_path / file).write_text(content)
    with pytest.raises(ArtifactError, match=message):
        start_from_encoder(tmp_path, Vocabulary((*SPECIAL, "won"), (*SPECIAL, "won")), context=12)
