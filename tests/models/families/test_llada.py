"""The LLaDA family against its description, written out head by head and position by position."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from steerserve.models.families.llada import LladaDiffusionLM
from tests import tiny


def norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x / math.sqrt(float((x * x).mean()) + eps) * weight


def turned(x: Tensor, position: int, theta: float) -> Tensor:
    """Rotate-half: x_i and x_{i + size/2} are one plane, turned by position * theta^(-2i / size)."""
    size = len(x)
    out = x.clone()
    for i in range(size // 2):
        angle = position * theta ** (-2 * i / size)
        a, b = float(x[i]), float(x[i + size // 2])
        out[i] = a * math.cos(angle) - b * math.sin(angle)
        out[i + size // 2] = b * math.cos(angle) + a * math.sin(angle)
    return out


def reference(model: LladaDiffusionLM, ids: list[int]) -> Tensor:
    """Logits [length, vocabulary] in float64 of one row."""
    config = model.config
    t = {name: tensor.double() for name, tensor in model.state_dict().items()}
    size = config.d_model // config.n_heads
    group = config.n_heads // config.kv_heads
    states = [t["model.transformer.wte.weight"][token] for token in ids]
    for layer in range(config.n_layers):
        w = {
            name: t[f"model.transformer.blocks.{layer}.{name}.weight"]
            for name in (
                *("attn_norm", "ff_norm", "q_proj", "k_proj", "v_proj"),
                *("attn_out", "ff_proj", "up_proj", "ff_out"),
            )
        }
        normed = [norm(h, w["attn_norm"], config.rms_norm_eps) for h in states]
        mixed = [torch.zeros(config.d_model, dtype=torch.float64) for _ in ids]
        for head in range(config.n_heads):
            mine = slice(head * size, (head + 1) * size)
            theirs = slice(head // group * size, (head // group + 1) * size)
            queries = [turned((w["q_proj"] @ n)[mine], i, config.rope_theta) for i, n in enumerate(normed)]
            keys = [turned((w["k_proj"] @ n)[theirs], i, config.rope_theta) for i, n in enumerate(normed)]
            values = [(w["v_proj"] @ n)[theirs] for n in normed]
            for i, query in enumerate(queries):
                scores = [math.exp(float(query @ key) / math.sqrt(size)) for key in keys]
                for score, value in zip(scores, values, strict=True):
                    mixed[i][mine] += score / sum(scores) * value
        states = [h + w["attn_out"] @ m for h, m in zip(states, mixed, strict=True)]
        for i, h in enumerate(states):
            n = norm(h, w["ff_norm"], config.rms_norm_eps)
            gate = w["ff_proj"] @ n
            states[i] = h + w["ff_out"] @ (gate / (1 + torch.exp(-gate)) * (w["up_proj"] @ n))
    head_name = "model.transformer.wte.weight" if config.weight_tying else "model.transformer.ff_out.weight"
    weight = t[head_name][: config.vocab_size]
    scale = 1 / math.sqrt(config.d_model) if config.scale_logits else 1.0
    final = [norm(h, t["model.transformer.ln_f.weight"], config.rms_norm_eps) for h in states]
    return torch.stack([weight @ h * scale for h in final])


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"weight_tying": True},
        {"n_kv_heads": 2},
        {"n_kv_heads": 1, "scale_logits": True},
        {"embedding_size": None, "mlp_hidden_size": None, "mlp_ratio": 2, "rope_theta": 10000.0},
    ],
    ids=["plain", "tied", "grouped", "one-kv-scaled", "defaults"],
)
@torch.no_grad()
def test_logits_follow_the_description(changes: dict[str, Any]) -> None:
    model = tiny.llada(3, **changes)
    ids = [5, tiny.MASK, 40, 41, tiny.MASK, 7, 96, 5]
    logits = model.head(model(torch.tensor([ids])))[0]
    assert logits.shape == (len(ids), tiny.VOCAB)
    torch.testing.assert_close(logits.double(), reference(model, ids), atol=2e-4, rtol=1e-4)


def test_names_are_those_of_the_published_checkpoints() -> None:
    names = set(tiny.llada(n_layers=1).state_dict())
    block = "model.transformer.blocks.0"
    parts = ("attn_norm", "ff_norm", "q_proj", "k_proj", "v_proj", "attn_out", "ff_proj", "up_proj", "ff_out")
    assert names == {
        "model.transformer.wte.weight",
        "model.transformer.ln_f.weight",
        "model.transformer.ff_out.weight",
        *(f"{block}.{part}.weight" for part in parts),
    }


def test_a_tied_head_has_no_tensor() -> None:
    assert "model.transformer.ff_out.weight" not in tiny.llada(weight_tying=True).state_dict()
