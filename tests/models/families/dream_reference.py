"""Dream checkpoints in the published layout, and the forward pass written out head by head and position by position."""

import json
import math
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from steerserve.models import DiffusionLM, load_model

CONFIG: dict[str, Any] = {
    "architectures": ["DreamModel"],
    "attention_dropout": 0.0,
    "auto_map": {"AutoConfig": "configuration_dream.DreamConfig", "AutoModel": "modeling_dream.DreamModel"},
    "bos_token_id": 95,
    "eos_token_id": 95,
    "hidden_act": "silu",
    "hidden_size": 48,
    "initializer_range": 0.02,
    "intermediate_size": 72,
    "mask_token_id": 100,
    "max_position_embeddings": 128,
    "max_window_layers": 28,
    "model_type": "Dream",
    "num_attention_heads": 4,
    "num_hidden_layers": 3,
    "num_key_value_heads": 2,
    "pad_token_id": 95,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 1000000.0,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "use_mrope": False,
    "use_sliding_window": False,
    "vocab_size": 101,
}
MASK = 100


def head_size(config: dict[str, Any]) -> int:
    return int(config.get("head_dim", config["hidden_size"] // config["num_attention_heads"]))


def checkpoint(config: dict[str, Any], seed: int = 0) -> dict[str, Tensor]:
    """Random tensors of every name of the published checkpoints, scaled so that logits stay near 1."""
    width, inner, rows = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    wide = config["num_attention_heads"] * head_size(config)
    narrow = config["num_key_value_heads"] * head_size(config)
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (rows, width), "model.norm.weight": (width,)}
    for layer in range(config["num_hidden_layers"]):
        shapes |= {
            f"model.layers.{layer}.{name}": shape
            for name, shape in {
                "input_layernorm.weight": (width,),
                "self_attn.q_proj.weight": (wide, width),
                "self_attn.q_proj.bias": (wide,),
                "self_attn.k_proj.weight": (narrow, width),
                "self_attn.k_proj.bias": (narrow,),
                "self_attn.v_proj.weight": (narrow, width),
                "self_attn.v_proj.bias": (narrow,),
                "self_attn.o_proj.weight": (width, wide),
                "post_attention_layernorm.weight": (width,),
                "mlp.gate_proj.weight": (inner, width),
                "mlp.up_proj.weight": (inner, width),
                "mlp.down_proj.weight": (width, inner),
            }.items()
        }
    if not config["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (rows, width)
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, shape in shapes.items():
        noise = torch.randn(shape, generator=generator)
        norm = "norm" in name
        tensors[name] = 1 + 0.1 * noise if norm else noise * (0.5 if name.endswith("bias") else shape[-1] ** -0.5)
    return tensors


def write(folder: Path, config: dict[str, Any], tensors: dict[str, Tensor], shards: int = 1) -> None:
    """A checkpoint folder: config.json, and one safetensors file or shards with their index."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    if shards == 1:
        save_file(tensors, folder / "model.safetensors")
        return
    files = {name: f"model-{1 + i % shards:05}-of-{shards:05}.safetensors" for i, name in enumerate(sorted(tensors))}
    for file in set(files.values()):
        save_file({name: tensors[name] for name in files if files[name] == file}, folder / file)
    index = {"metadata": {"total_size": sum(t.nbytes for t in tensors.values())}, "weight_map": files}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")


def loaded(folder: Path, **changes: Any) -> tuple[DiffusionLM, dict[str, Any], dict[str, Tensor]]:
    """A model loaded from a folder, with the config and the tensors that it was written of."""
    config = CONFIG | changes
    tensors = checkpoint(config)
    write(folder, config, tensors)
    return load_model(folder), config, tensors


def norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x / math.sqrt(float((x * x).mean()) + eps) * weight


def turned(x: Tensor, position: int, theta: float) -> Tensor:
    """x_i and x_{i + size/2} are one plane, turned by position * theta^(-2i / size)."""
    half = len(x) // 2
    out = torch.empty_like(x)
    for i in range(half):
        angle = position / theta ** (i / half)
        out[i] = math.cos(angle) * x[i] - math.sin(angle) * x[i + half]
        out[i + half] = math.sin(angle) * x[i] + math.cos(angle) * x[i + half]
    return out


def reference(
    config: dict[str, Any], tensors: dict[str, Tensor], ids: list[int], pushes: dict[int, Tensor] | None = None
) -> tuple[Tensor, list[Tensor]]:
    """Logits [length, vocabulary] of one row and the output [length, hidden] of every layer, in float64.

    `pushes` are added to the outputs of layers.
    """
    t = {name: tensor.double() for name, tensor in tensors.items()}
    size, eps, theta = head_size(config), config["rms_norm_eps"], config["rope_theta"]
    queries_per_key = config["num_attention_heads"] // config["num_key_value_heads"]
    states = [t["model.embed_tokens.weight"][token] for token in ids]
    outputs = []
    for layer in range(config["num_hidden_layers"]):
        w = {name.split(".", 3)[3]: tensor for name, tensor in t.items() if name.startswith(f"model.layers.{layer}.")}
        normed = [norm(h, w["input_layernorm.weight"], eps) for h in states]
        query, key, value = (
            [w[f"self_attn.{part}_proj.weight"] @ n + w[f"self_attn.{part}_proj.bias"] for n in normed]
            for part in ("q", "k", "v")
        )
        mixed: list[list[Tensor]] = [[] for _ in ids]
        for head in range(config["num_attention_heads"]):
            mine = slice(head * size, (head + 1) * size)
            theirs = slice(head // queries_per_key * size, (head // queries_per_key + 1) * size)
            keys = [turned(k[theirs], j, theta) for j, k in enumerate(key)]
            for i, q in enumerate(query):
                scores = torch.stack([turned(q[mine], i, theta) @ k for k in keys]) / math.sqrt(size)
                weights = scores.exp() / scores.exp().sum()
                mixed[i].append(sum((a * v[theirs] for a, v in zip(weights, value, strict=True)), torch.zeros(size)))
        for i, h in enumerate(states):
            h = h + w["self_attn.o_proj.weight"] @ torch.cat(mixed[i])
            n = norm(h, w["post_attention_layernorm.weight"], eps)
            gate = w["mlp.gate_proj.weight"] @ n
            states[i] = h + w["mlp.down_proj.weight"] @ (gate / (1 + (-gate).exp()) * (w["mlp.up_proj.weight"] @ n))
        outputs.append(torch.stack(states))
        if pushes and layer in pushes:
            states = list(torch.stack(states) + pushes[layer])
    head_name = "model.embed_tokens.weight" if config["tie_word_embeddings"] else "lm_head.weight"
    return torch.stack([t[head_name] @ norm(h, t["model.norm.weight"], eps) for h in states]), outputs


def tokens(rows: int, length: int, seed: int = 0) -> Tensor:
    return torch.randint(0, CONFIG["vocab_size"], (rows, length), generator=torch.Generator().manual_seed(seed))


IDS = [5, MASK, 40, 41, MASK, MASK, 95, 5, 99]
