"""LLaDA-MoE against a forward written straight from its description, one token and one expert at a time, in float64."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F

from steerserve.errors import ArtifactError
from steerserve.models import load_model
from steerserve.models.families.lladamoe import LladaMoeDiffusionLM
from tests import tiny

VARIANTS: list[dict[str, Any]] = [
    {},
    {"shared_expert_intermediate_size": 24, "moe_layer_freq": [0, 1, 1], "dense_intermediate_size": 40},
    {"qk_layernorm": True, "num_key_value_heads": 2, "moe_router_enable_expert_bias": True},
    {"tie_word_embeddings": True, "num_experts_per_tok": 1},
]


def write(folder: Path, **changes: Any) -> LladaMoeDiffusionLM:
    """A folder as inclusionAI publishes it, with random weights; its model."""
    model = tiny.lladamoe(**changes)
    raw = {"model_type": "llada", "architectures": ["LLaDAMoEModelLM"], "norm_topk_prob": None, **asdict(model.config)}
    (folder / "config.json").write_text(json.dumps(raw), encoding="utf-8")
    save_file(dict(model.state_dict()), folder / "model.safetensors")
    return model


def rms(x: Tensor, weight: Tensor) -> Tensor:
    return weight * x / (x.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt()


def swiglu(w: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    gate, up, down = (w[f"{name}.{part}_proj.weight"] for part in ("gate", "up", "down"))
    return down @ (F.silu(gate @ x) * (up @ x))


def turned(x: Tensor, position: int, theta: float) -> Tensor:
    half = x.shape[-1] // 2
    angle = position / theta ** (torch.arange(half, dtype=torch.float64) * 2 / x.shape[-1])
    first, second = x[..., :half], x[..., half:]
    return torch.cat([first * angle.cos() - second * angle.sin(), second * angle.cos() + first * angle.sin()], -1)


def feed_forward(w: dict[str, Tensor], raw: dict[str, Any], layer: int, x: Tensor) -> Tensor:
    """What a layer's networks make of one token's state."""
    name = f"model.layers.{layer}.mlp"
    if not raw["moe_layer_freq"][layer]:
        return swiglu(w, name, x)
    chances = (w[f"{name}.gate.weight"] @ x).softmax(0) + w.get(f"{name}.expert_bias", torch.zeros(raw["num_experts"]))
    best = sorted(range(raw["num_experts"]), key=lambda expert: -float(chances[expert]))[: raw["num_experts_per_tok"]]
    out = sum((chances[expert] * swiglu(w, f"{name}.experts.{expert}", x) for expert in best), torch.zeros_like(x))
    return (
        out
        if raw["shared_expert_intermediate_size"] is None
        else out + swiglu(w, f"model.layers.{layer}.shared_expert", x)
    )


def reference(model: LladaMoeDiffusionLM, tokens: list[int]) -> Tensor:
    """Logits [length, vocabulary] float64 of one row."""
    w = {name: tensor.double() for name, tensor in model.state_dict().items()}
    raw = asdict(model.config)
    heads, size = raw["num_attention_heads"], raw["hidden_size"] // raw["num_attention_heads"]
    kv_heads = raw["num_key_value_heads"] or heads
    h = [w["model.embed_tokens.weight"][token] for token in tokens]
    for layer in range(raw["num_hidden_layers"]):
        name = f"model.layers.{layer}."
        normed = [rms(x, w[name + "input_layernorm.weight"]) for x in h]
        made = {part: [(w[f"{name}self_attn.{part}_proj.weight"] @ x).view(-1, size) for x in normed] for part in "qkv"}
        if raw["qk_layernorm"]:
            for part in "qk":
                made[part] = [rms(x, w[f"{name}self_attn.{part}_norm.weight"]) for x in made[part]]
        q, k = ([turned(x, i, raw["rope_theta"]) for i, x in enumerate(made[part])] for part in "qk")
        for i in range(len(h)):
            mixed = []
            for head in range(heads):
                own = head * kv_heads // heads
                weights = torch.stack([q[i][head] @ key[own] / size**0.5 for key in k]).softmax(0)
                mixed.append(sum(weights[j] * made["v"][j][own] for j in range(len(h))))
            h[i] = h[i] + w[name + "self_attn.o_proj.weight"] @ torch.cat(mixed)
        for i, x in enumerate(h):
            h[i] = x + feed_forward(w, raw, layer, rms(x, w[name + "post_attention_layernorm.weight"]))
    head = w.get("lm_head.weight", w["model.embed_tokens.weight"])
    return torch.stack([head @ rms(x, w["model.norm.weight"]) for x in h])


@pytest.mark.parametrize("changes", VARIANTS)
def test_logits_are_those_of_the_description(tmp_path: Path, changes: dict[str, Any]) -> None:
    write(tmp_path, **changes)
    model = load_model(tmp_path)
    assert isinstance(model, LladaMoeDiffusionLM)
    tokens = torch.randint(5, tiny.VOCAB, (1, 12), generator=torch.Generator().manual_seed(2))
    expected = reference(model, tokens[0].tolist())
    got = model.head(model(tokens))[0]
    assert float((got - expected).abs().max()) <= 1e-5 * float(expected.abs().max())


def test_a_token_has_the_same_bits_whichever_others_choose_its_experts() -> None:
    model = tiny.lladamoe(num_experts=4)
    rows = torch.randint(5, tiny.VOCAB, (5, 32), generator=torch.Generator().manual_seed(3))
    together = model(rows)
    for row in range(5):
        assert torch.equal(model(rows[row : row + 1])[0], together[row])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"norm_topk_prob": True}, "norm_topk_prob is True"),
        ({"router_num_group": 8}, "router_num_group is 8"),
        ({"moe_router_score_function": "sigmoid"}, "implements 'softmax'"),
        ({"routed_scaling_factor": 2.5}, "routed_scaling_factor is 2.5"),
        ({"moe_layer_freq": [1]}, "moe_layer_freq must tell of each of 3 layers"),
        ({"num_experts_per_tok": 99}, "num_experts_per_tok 99 is more than num_experts 6"),
    ],
)
def test_other_routings_are_refused_by_name(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    write(tmp_path)
    raw = json.loads((tmp_path / "config.json").read_text(encoding="utf-8")) | changes
    (tmp_path / "config.json").write_text(json.dumps(raw), encoding="utf-8")
    with pytest.raises(ArtifactError, match=message):
        load_model(tmp_path)
