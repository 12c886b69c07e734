"""Folders as `transformers` itself writes them, their networks run straight, and the loop of dLLM written from its
description: what `HuggingFaceLM` is compared with."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests import tiny

CLASSES = {
    "a2d-qwen2": ("Qwen2Config", "Qwen2ForCausalLM"),
    "a2d-qwen3": ("Qwen3Config", "Qwen3ForCausalLM"),
    "a2d-llama": ("LlamaConfig", "LlamaForCausalLM"),
    "sdar": ("Qwen3Config", "Qwen3ForCausalLM"),
    "Fast_dLLM_Qwen": ("Qwen2Config", "Qwen2ForCausalLM"),
    "gpt2": ("GPT2Config", "GPT2LMHeadModel"),
    "llama": ("LlamaConfig", "LlamaForCausalLM"),
    "modernbert": ("ModernBertConfig", "ModernBertForMaskedLM"),
    "roberta": ("RobertaConfig", "RobertaForMaskedLM"),
    "bert": ("BertConfig", "BertForMaskedLM"),
}
"""Classes of `transformers` by the `model_type` of the folder."""


def write(folder: Path, name: str, seed: int = 0, **changes: Any) -> Any:
    """A folder with random weights, saved by the class that it is of, and with `tiny.tokenizer`; that model."""
    raw = {key: value for key, value in tiny.huggingface_config(name, **changes).items() if key != "model_type"}
    kind, network = CLASSES[name]
    torch.manual_seed(seed)
    model = getattr(transformers, network)(getattr(transformers, kind)(**raw)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            # Norms and biases too: a fresh model has them at 1 and 0, where leaving one out would not show.
            parameter.add_(0.2 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    change(folder, model_type=name, **raw)
    tiny.tokenizer().save(str(folder / "tokenizer.json"))
    roles = {"mask_token": "[MASK]", "eos_token": "[SEP]", "pad_token": "[PAD]", "bos_token": "[CLS]"}
    (folder / "tokenizer_config.json").write_text(json.dumps(roles), encoding="utf-8")
    return model


def change(folder: Path, **changes: Any) -> None:
    """Change keys of a folder's config.json; None leaves a key out."""
    raw = json.loads((folder / "config.json").read_text(encoding="utf-8")) | changes
    raw = {key: value for key, value in raw.items() if value is not None}
    (folder / "config.json").write_text(json.dumps(raw), encoding="utf-8")


def rename(folder: Path, names: Any, **extra: Tensor) -> None:
    """Rename the tensors of a folder by a function of their names, which may give None, and add some."""
    file = folder / "model.safetensors"
    renamed = {names(name): tensor for name, tensor in load_file(file).items()}
    save_file({name: tensor for name, tensor in (renamed | extra).items() if name is not None}, file)


@torch.no_grad()
def straight(model: Any, tokens: Tensor, lengths: Sequence[int], block: int | None = None) -> Any:
    """The output of a network of transformers over tokens [rows, length], every position attending to all real ones, or
    to those of its own block and the ones before."""
    inside = torch.arange(tokens.shape[1]) < torch.tensor(lengths)[:, None]
    if type(model).__name__.endswith("ForMaskedLM"):
        position = torch.arange(tokens.shape[1])[None].expand_as(tokens)
        if type(model).__name__.startswith("Roberta"):
            position = position + model.roberta.embeddings.padding_idx + 1
        return model(tokens, attention_mask=inside.long(), position_ids=position, output_hidden_states=True)
    whole = inside[:, None, None, :].expand(-1, 1, tokens.shape[1], -1)
    if block is not None:
        place = torch.arange(tokens.shape[1])
        whole = whole & (place[:, None] // block >= place // block) | (place[:, None] == place)
    return model(tokens, attention_mask=whole, use_cache=False, output_hidden_states=True)


@torch.no_grad()
def masked_loop(model: Any, prompt: list[int], length: int, block: int, steps: int, shift: int, mask: int) -> list[int]:
    """dLLM's loop for masked diffusion at temperature 0, one row: in each block at each step the masked positions with
    the likeliest tokens take them, as many as are left over the steps that are left; the response."""
    canvas = torch.tensor([prompt + [mask] * length])
    for first in range(len(prompt), len(prompt) + length, block):
        last = min(first + block, canvas.shape[1])
        left = -(-steps // -(-length // block))
        while left:
            masked = [i for i in range(first, last) if canvas[0, i] == mask]
            count = round(len(masked) / left)
            left -= 1
            if not count:
                continue
            logits = straight(model, canvas, [canvas.shape[1]]).logits[0].float()
            logits = torch.cat([logits[:1], logits[:-1]]) if shift else logits
            chance, token = logits.softmax(-1).max(-1)
            chosen = sorted(masked, key=lambda i: -float(chance[i]))[:count]
            canvas[0, chosen] = token[chosen]
    return canvas[0, len(prompt) :].tolist()


@torch.no_grad()
def block_loop(model: Any, prompt: list[int], length: int, block: int, threshold: float | None, mask: int) -> list[int]:
    """SDAR's loop at temperature 0 with as many steps as a block has tokens: blocks count from the start of the text,
    and each is written with nothing behind it. At each step all masked positions whose token is likelier than the
    threshold take it, or the likeliest one; without a threshold the likeliest one. The response."""
    canvas = prompt + [mask] * length
    for first in range(len(prompt) // block * block, len(canvas), block):
        for _ in range(block + 1):
            masked = [i for i in range(first, first + block) if canvas[i] == mask]
            if not masked:
                break
            seen = torch.tensor([canvas[: first + block]])
            logits = straight(model, seen, [first + block], block).logits[0].float()
            chance, token = logits.softmax(-1).max(-1)
            chosen = [i for i in masked if threshold is not None and chance[i] > threshold]
            for i in chosen or [max(masked, key=lambda i: float(chance[i]))]:
                canvas[i] = int(token[i])
    return canvas[len(prompt) :]
