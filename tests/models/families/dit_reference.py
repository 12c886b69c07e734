"""A DiT written out position by position from its description, and small checkpoints in the published layout."""

import json
import math
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from steerserve.models import DiffusionLM

VOCAB, LENGTH, HIDDEN, COND, BLOCKS, HEADS = 23, 16, 16, 10, 3, 2
MASK, EOS = VOCAB - 1, VOCAB - 2
IDS = [5, MASK, 4, 17, MASK, MASK, 9, 5]

PARTS = {
    "norm1.weight": (HIDDEN,),
    "attn_qkv.weight": (3 * HIDDEN, HIDDEN),
    "attn_out.weight": (HIDDEN, HIDDEN),
    "norm2.weight": (HIDDEN,),
    "mlp.0.weight": (4 * HIDDEN, HIDDEN),
    "mlp.0.bias": (4 * HIDDEN,),
    "mlp.2.weight": (HIDDEN, 4 * HIDDEN),
    "mlp.2.bias": (HIDDEN,),
    "adaLN_modulation.weight": (6 * HIDDEN, COND),
    "adaLN_modulation.bias": (6 * HIDDEN,),
}
LAYOUT: dict[str, tuple[int, ...]] = {
    "vocab_embed.embedding": (VOCAB, HIDDEN),
    "sigma_map.mlp.0.weight": (COND, 256),
    "sigma_map.mlp.0.bias": (COND,),
    "sigma_map.mlp.2.weight": (COND, COND),
    "sigma_map.mlp.2.bias": (COND,),
    **{f"blocks.{block}.{name}": shape for block in range(BLOCKS) for name, shape in PARTS.items()},
    "output_layer.norm_final.weight": (HIDDEN,),
    "output_layer.linear.weight": (VOCAB, HIDDEN),
    "output_layer.linear.bias": (VOCAB,),
    "output_layer.adaLN_modulation.weight": (2 * HIDDEN, COND),
    "output_layer.adaLN_modulation.bias": (2 * HIDDEN,),
}


def checkpoint(seed: int = 0) -> dict[str, Tensor]:
    """Seeded tensors under the bare published names; every one matters to the logits."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, shape in LAYOUT.items():
        noise = torch.randn(shape, generator=generator)
        tensors[name] = 1 + 0.1 * noise if "norm" in name else noise / math.sqrt(shape[-1])
    return tensors


def frequencies(base: float = 10000.0) -> Tensor:
    """The buffer that published files carry as `rotary_emb.inv_freq`."""
    size = HIDDEN // HEADS
    return torch.tensor([1 / base ** (i / size) for i in range(0, size, 2)])


def prefixed(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {prefix + name: tensor for name, tensor in tensors.items()}


def built(family: type[Any], raw: dict[str, Any], tensors: dict[str, Tensor], dtype: torch.dtype) -> DiffusionLM:
    """A family's model of a config and the tensors of a file, as a loader builds it: strictly."""
    with torch.device("meta"):
        model: DiffusionLM = family.from_config(raw)
    own = family.adapt(raw, tensors)
    model.load_state_dict({name: tensor.to(dtype) for name, tensor in own.items()}, strict=True, assign=True)
    return model.requires_grad_(False).eval()


def saved(folder: Path, raw: dict[str, Any], tensors: dict[str, Tensor]) -> Path:
    """The folder, with the config and the tensors written as they are published."""
    (folder / "config.json").write_text(json.dumps(raw), encoding="utf-8")
    save_file(tensors, folder / "model.safetensors")
    return folder


def silu(x: Tensor) -> Tensor:
    return x / (1 + torch.exp(-x))


def gelu(x: Tensor) -> Tensor:
    return x / 2 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def normed(x: Tensor, weight: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    centred = x - x.mean()
    return centred / math.sqrt(float((centred * centred).mean()) + 1e-5) * weight * (1 + scale) + shift


def turned(x: Tensor, position: int) -> Tensor:
    """Rotate-half: x_i and x_{i + size/2} are one plane, turned by position * 10000^(-2i / size)."""
    half = len(x) // 2
    out = x.clone()
    for i in range(half):
        angle = position * 10000.0 ** (-i / half)
        a, b = float(x[i]), float(x[i + half])
        out[i] = a * math.cos(angle) - b * math.sin(angle)
        out[i + half] = b * math.cos(angle) + a * math.sin(angle)
    return out


def reference(tensors: dict[str, Tensor], ids: list[int], sigma: float) -> tuple[Tensor, list[Tensor]]:
    """Raw logits [length, vocabulary] of one row and each block's output [length, hidden], in float64."""
    t = {name: tensor.double() for name, tensor in tensors.items()}
    angles = [sigma * math.exp(-math.log(10000.0) * i / 128) for i in range(128)]
    features = torch.tensor([*map(math.cos, angles), *map(math.sin, angles)], dtype=torch.float64)
    inner = silu(t["sigma_map.mlp.0.weight"] @ features + t["sigma_map.mlp.0.bias"])
    c = silu(t["sigma_map.mlp.2.weight"] @ inner + t["sigma_map.mlp.2.bias"])
    size = HIDDEN // HEADS
    states = [t["vocab_embed.embedding"][token] for token in ids]
    outputs = []
    for block in range(BLOCKS):
        w = {name: t[f"blocks.{block}.{name}"] for name in PARTS}
        modulation = w["adaLN_modulation.weight"] @ c + w["adaLN_modulation.bias"]
        shift, scale, gate, mlp_shift, mlp_scale, mlp_gate = modulation.reshape(6, HIDDEN)
        packed = [w["attn_qkv.weight"] @ normed(x, w["norm1.weight"], shift, scale) for x in states]
        mixed = [torch.zeros(HIDDEN, dtype=torch.float64) for _ in ids]
        for head in range(HEADS):
            q, k, v = (slice(part * HIDDEN + head * size, part * HIDDEN + (head + 1) * size) for part in range(3))
            keys = [turned(p[k], i) for i, p in enumerate(packed)]
            for i, own in enumerate(packed):
                query = turned(own[q], i)
                weights = [math.exp(float(query @ key) / math.sqrt(size)) for key in keys]
                for weight, other in zip(weights, packed, strict=True):
                    mixed[i][head * size : (head + 1) * size] += weight / sum(weights) * other[v]
        states = [x + gate * (w["attn_out.weight"] @ m) for x, m in zip(states, mixed, strict=True)]
        for i, x in enumerate(states):
            wide = gelu(w["mlp.0.weight"] @ normed(x, w["norm2.weight"], mlp_shift, mlp_scale) + w["mlp.0.bias"])
            states[i] = x + mlp_gate * (w["mlp.2.weight"] @ wide + w["mlp.2.bias"])
        outputs.append(torch.stack(states))
    out = "output_layer"
    shift, scale = (t[f"{out}.adaLN_modulation.weight"] @ c + t[f"{out}.adaLN_modulation.bias"]).reshape(2, HIDDEN)
    last = [normed(x, t[f"{out}.norm_final.weight"], shift, scale) for x in states]
    logits = [t[f"{out}.linear.weight"] @ x + t[f"{out}.linear.bias"] for x in last]
    return torch.stack(logits), outputs
