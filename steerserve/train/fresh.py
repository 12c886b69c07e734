"""Start a model and its vocabulary from nothing but texts, and write a trained model as a folder that can be served."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, trainers
from torch import nn

from steerserve.errors import ArtifactError
from steerserve.models.families.bert import BertConfig, BertDiffusionLM
from steerserve.train.tokenizer import SPECIAL, Vocabulary, build_tokenizer

INITIAL_DEVIATION = 0.02


@dataclass(frozen=True)
class FreshSize:
    """How large a model is that starts from random weights."""

    hidden_size: int = 384
    """Width of the hidden states."""
    num_layers: int = 6
    """Number of layers."""
    num_heads: int = 12
    """Attention heads; they divide the width."""
    inner_size: int = 1536
    """Width inside the feed-forward part."""


def learn_vocabulary(texts: Sequence[str], size: int) -> Vocabulary:
    """WordPiece pieces learnt from `texts`, the same in every run; every printable ASCII character is among them.

    They are at most `size`, unless the characters alone, in front of a word and within one, are more.
    """
    tokenizer = build_tokenizer(SPECIAL)
    normalize = tokenizer.normalizer.normalize_str
    ascii_characters = [chr(code) for code in range(33, 127)]
    within = {character for text in texts for word in normalize(text).split() for character in word[1:]}
    trainer = trainers.WordPieceTrainer(
        vocab_size=size,
        # The trainer numbers what it meets within words in an order that changes from run to run, and breaks ties
        # between merges by these numbers. What it is told beforehand has its number.
        special_tokens=[*SPECIAL, *(f"##{character}" for character in sorted(within))],
        initial_alphabet=ascii_characters,
        continuing_subword_prefix="##",
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    ids = tokenizer.get_vocab()
    pieces = tuple(sorted(ids, key=lambda piece: ids[piece]))
    return Vocabulary(pieces, pieces)


def start_fresh(vocabulary: Vocabulary, size: FreshSize, context: int, seed: int) -> BertDiffusionLM:
    """A model with random weights: normal with deviation 0.02 as BERT (arXiv 1810.04805), biases 0, norms 1."""
    if size.hidden_size % size.num_heads:
        raise ArtifactError(f"num_heads {size.num_heads} does not divide hidden_size {size.hidden_size}")
    ids = {piece: i for i, piece in enumerate(vocabulary.pieces)}
    model = BertDiffusionLM(
        BertConfig(
            vocab_size=len(ids),
            hidden_size=size.hidden_size,
            num_hidden_layers=size.num_layers,
            num_attention_heads=size.num_heads,
            intermediate_size=size.inner_size,
            max_position_embeddings=context,
            mask_token_id=ids["[MASK]"],
            sep_token_id=ids["[SEP]"],
            cls_token_id=ids["[CLS]"],
            pad_token_id=ids["[PAD]"],
            unk_token_id=ids["[UNK]"],
        )
    )
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=INITIAL_DEVIATION, generator=generator)
        if isinstance(module, nn.Linear):
            nn.init.zeros_(module.bias)
    return model


def save_model_folder(
    model: BertDiffusionLM, tokenizer: Tokenizer, folder: Path, dtype: torch.dtype = torch.bfloat16
) -> None:
    """Write `config.json`, `model.safetensors` and `tokenizer.json`: what `load_model` and `load_tokenizer` read."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.detach().to(dtype).contiguous() for name, tensor in model.state_dict().items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = {"architectures": ["BertForMaskedLM"], "model_type": "bert", **asdict(model.config)}
    (folder / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
    tokenizer.save(str(folder / "tokenizer.json"))
