"""Start a BERT-family diffusion model from a pretrained encoder with other pieces in its vocabulary."""

from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from steerserve.errors import ArtifactError
from steerserve.models.checkpoint.config import read_config
from steerserve.models.families.bert import BertConfig, BertDiffusionLM
from steerserve.pointers import refuse_pointer
from steerserve.train.tokenizer import Vocabulary

SIZES = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
"""Keys of `config.json` that say what the encoder is."""


def read_vocabulary(encoder: Path) -> dict[str, int]:
    """Pieces of an encoder folder's `vocab.txt` with their ids; raises ArtifactError where it cannot be read."""
    path = encoder / "vocab.txt"
    refuse_pointer(path)
    try:
        return {piece: i for i, piece in enumerate(path.read_text(encoding="utf-8").splitlines())}
    except (OSError, UnicodeDecodeError) as error:
        raise ArtifactError(f"{encoder} is no encoder to start from: vocab.txt: {error}") from error


def start_from_encoder(encoder: Path, vocabulary: Vocabulary, context: int) -> BertDiffusionLM:
    """A model whose layers are the encoder's, whose embeddings are gathered by piece, and whose head is new.

    The new head's dense layer starts as the identity, so that the tied output sees the encoder's own last state.
    Raises ArtifactError for a folder that holds no BERT encoder in `model.safetensors`.
    """
    raw = read_config(encoder)
    if missing := [name for name in SIZES if name not in raw]:
        raise ArtifactError(f"{encoder} is no encoder to start from: config.json has no {', '.join(missing)}")
    ids = {piece: i for i, piece in enumerate(vocabulary.pieces)}
    config = BertConfig(
        vocab_size=len(vocabulary.pieces),
        hidden_size=raw["hidden_size"],
        num_hidden_layers=raw["num_hidden_layers"],
        num_attention_heads=raw["num_attention_heads"],
        intermediate_size=raw["intermediate_size"],
        max_position_embeddings=context,
        mask_token_id=ids["[MASK]"],
        sep_token_id=ids["[SEP]"],
        cls_token_id=ids["[CLS]"],
        pad_token_id=ids["[PAD]"],
        unk_token_id=ids["[UNK]"],
        layer_norm_eps=raw.get("layer_norm_eps", 1e-12),
    )
    model = BertDiffusionLM(config)
    source = _weights(encoder / "model.safetensors")
    old = read_vocabulary(encoder)
    gather = torch.tensor([old[origin] for origin in vocabulary.origins])
    tensors = {f"bert.{name}": value for name, value in source.items() if name.startswith(("embeddings.", "encoder."))}
    words = tensors["bert.embeddings.word_embeddings.weight"]
    tensors["bert.embeddings.word_embeddings.weight"] = words[gather].clone()
    tensors["bert.embeddings.position_embeddings.weight"] = tensors["bert.embeddings.position_embeddings.weight"][
        :context
    ].clone()
    tensors.pop("bert.embeddings.position_ids", None)
    fresh = {name: value for name, value in model.state_dict().items() if name.startswith("cls.")}
    fresh["cls.predictions.transform.dense.weight"] = torch.eye(config.hidden_size)
    fresh["cls.predictions.transform.dense.bias"] = torch.zeros(config.hidden_size)
    model.load_state_dict(tensors | fresh)
    return model


def _weights(file: Path) -> dict[str, Tensor]:
    refuse_pointer(file)
    try:
        return load_file(file)
    except (OSError, SafetensorError) as error:
        raise ArtifactError(f"{file.parent} is no encoder to start from: {file.name}: {error}") from error
