"""LLaDA2 against a forward written straight from its description, one token and one expert at a time, in float64."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F

from steerserve.commands.inspect import inspect_model
from steerserve.errors import ArtifactError
from steerserve.models import load_model
from steerserve.models.experts import StackedExperts, outputs
from steerserve.models.families.llada2 import TURN_END, Llada2DiffusionLM
from tests import tiny

VARIANTS: list[dict[str, Any]] = [
    {},
    {"first_k_dense_replace": 0, "num_shared_experts": 2, "num_experts_per_tok": 1, "partial_rotary_factor": 1.0},
    {"use_qkv_bias": True, "use_bias": True, "use_qk_norm": False, "head_dim": 12, "topk_group": 1},
    {"num_shared_experts": None, "n_group": 8, "topk_group": 3, "num_experts_per_tok": 3, "tie_word_embeddings": True},
]


def write(folder: Path, raw: dict[str, Any] | None = None, **changes: Any) -> Llada2DiffusionLM:
    """A folder as inclusionAI publishes it, with random weights; its model. raw: keys of its config beside the model's
    own, None: one is left out."""
    model = tiny.llada2(**changes)
    published: dict[str, Any] = {
        "model_type": "llada2_moe",
        "architectures": ["LLaDA2MoeModelLM"],
        "rope_scaling": None,
    }
    published |= {"hidden_act": "silu", "score_function": "sigmoid", "norm_topk_prob": True, "sliding_window": 4096}
    whole = published | asdict(model.config) | (raw or {})
    named = {name: value for name, value in whole.items() if value is not None or name == "rope_scaling"}
    (folder / "config.json").write_text(json.dumps(named), encoding="utf-8")
    save_file(dict(model.state_dict()), folder / "model.safetensors")
    return model


def rms(x: Tensor, weight: Tensor) -> Tensor:
    return weight * x / (x.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt()


def swiglu(w: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    gate, up, down = (w[f"{name}.{part}_proj.weight"] for part in ("gate", "up", "down"))
    return down @ (F.silu(gate @ x) * (up @ x))


def turned(x: Tensor, position: int, size: int, theta: float) -> Tensor:
    half = size // 2
    angle = position / theta ** (torch.arange(half, dtype=torch.float64) * 2 / size)
    first, second, rest = x[..., :half], x[..., half:size], x[..., size:]
    return torch.cat([first * angle.cos() - second * angle.sin(), second * angle.cos() + first * angle.sin(), rest], -1)


def shares(w: dict[str, Tensor], name: str, raw: dict[str, Any], x: Tensor) -> dict[int, float]:
    """The experts of one token, and how much each of them counts."""
    scores = (w[f"{name}.gate.weight"] @ x).sigmoid().tolist()
    biased = [score + bias for score, bias in zip(scores, w[f"{name}.gate.expert_bias"].tolist(), strict=True)]
    size = raw["num_experts"] // raw["n_group"]
    groups = [list(range(first, first + size)) for first in range(0, raw["num_experts"], size)]
    groups.sort(key=lambda group: -sum(sorted(biased[expert] for expert in group)[-2:]))
    left = [expert for group in groups[: raw["topk_group"]] for expert in group]
    best = sorted(left, key=lambda expert: -biased[expert])[: raw["num_experts_per_tok"]]
    total = sum(scores[expert] for expert in best) if len(best) > 1 else 1.0
    return {expert: scores[expert] / total * raw["routed_scaling_factor"] for expert in best}


def feed_forward(w: dict[str, Tensor], raw: dict[str, Any], layer: int, x: Tensor) -> Tensor:
    """What a layer's networks make of one token's state."""
    name = f"model.layers.{layer}.mlp"
    if layer < raw["first_k_dense_replace"]:
        return swiglu(w, name, x)
    chosen = shares(w, name, raw, x)
    out = sum((share * swiglu(w, f"{name}.experts.{one}", x) for one, share in chosen.items()), torch.zeros_like(x))
    return out + swiglu(w, f"{name}.shared_experts", x) if raw["num_shared_experts"] else out


def reference(model: Llada2DiffusionLM, tokens: list[int]) -> Tensor:
    """Logits [length, vocabulary] float64 of one row."""
    w, raw = {name: tensor.double() for name, tensor in model.state_dict().items()}, asdict(model.config)
    heads, kv_heads, block = raw["num_attention_heads"], raw["num_key_value_heads"], raw["block_size"]
    size = raw["head_dim"] or raw["hidden_size"] // heads
    part = int(size * raw["partial_rotary_factor"])
    h = [w["model.word_embeddings.weight"][token] for token in tokens]
    for layer in range(raw["num_hidden_layers"]):
        name = f"model.layers.{layer}."
        q, k, v = [], [], []
        for i, x in enumerate(h):
            made = w[name + "attention.query_key_value.weight"] @ rms(x, w[name + "input_layernorm.weight"])
            made = (made + w.get(name + "attention.query_key_value.bias", torch.zeros_like(made))).view(-1, size)
            query, key, value = made[:heads], made[heads : heads + kv_heads], made[heads + kv_heads :]
            if raw["use_qk_norm"]:
                query = rms(query, w[name + "attention.query_layernorm.weight"])
                key = rms(key, w[name + "attention.key_layernorm.weight"])
            q.append(turned(query, i, part, raw["rope_theta"]))
            k.append(turned(key, i, part, raw["rope_theta"]))
            v.append(value)
        for i in range(len(h)):
            seen, mixed = range(min(len(h), (i // block + 1) * block)), []
            for head in range(heads):
                own = head * kv_heads // heads
                weights = torch.stack([q[i][head] @ k[j][own] / size**0.5 for j in seen]).softmax(0)
                mixed.append(sum(weights[j] * v[j][own] for j in seen))
            out = w[name + "attention.dense.weight"] @ torch.cat(mixed)
            h[i] = h[i] + out + w.get(name + "attention.dense.bias", torch.zeros_like(out))
        for i, x in enumerate(h):
            h[i] = x + feed_forward(w, raw, layer, rms(x, w[name + "post_attention_layernorm.weight"]))
    head = w.get("lm_head.weight", w["model.word_embeddings.weight"])
    return torch.stack([head @ rms(x, w["model.norm.weight"]) for x in h])


@pytest.mark.parametrize("changes", VARIANTS)
def test_logits_are_those_of_the_description(tmp_path: Path, changes: dict[str, Any]) -> None:
    write(tmp_path, **changes)
    model = load_model(tmp_path)
    assert isinstance(model, Llada2DiffusionLM)
    tokens = torch.randint(5, tiny.VOCAB, (1, 12), generator=torch.Generator().manual_seed(2))
    expected = reference(model, tokens[0].tolist())
    got = model.head(model(tokens))[0]
    assert float((got - expected).abs().max()) <= 1e-5 * float(expected.abs().max())


def test_a_token_has_the_same_bits_whichever_others_stand_beside_it() -> None:
    model = tiny.llada2(num_experts=4)
    rows = torch.randint(5, tiny.VOCAB, (5, 32), generator=torch.Generator().manual_seed(3))
    together = model(rows)
    for row in range(5):
        assert torch.equal(model(rows[row : row + 1])[0], together[row])
    # Nor do those asked for change by what is left out, or by a row that fills itself up.
    at = torch.arange(8, 24)[None].expand(5, -1)
    assert torch.equal(model(rows, at=at), together[:, 8:24])
    lengths = torch.tensor([32, 21, 9, 32, 3])
    padded = model(rows, lengths)
    for row, length in enumerate(lengths.tolist()):
        alone = model(rows[row : row + 1, : -(-length // 16) * 16], lengths[row : row + 1])
        assert torch.equal(alone[0, :length], padded[row, :length])


def test_no_block_sees_a_later_one() -> None:
    model = tiny.llada2()
    tokens = torch.randint(5, tiny.VOCAB, (2, 24), generator=torch.Generator().manual_seed(4))
    later = tokens.clone()
    later[:, 16:] = tiny.MASK
    assert torch.equal(model(later)[:, :16], model(tokens)[:, :16])
    later[:, 15] = tiny.MASK
    assert not torch.equal(model(later)[:, 8], model(tokens)[:, 8])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_grouped_matrix_products_are_the_experts_one_by_one(dtype: torch.dtype) -> None:
    layer: Any = next(one for one in tiny.llada2(1).layers() if hasattr(one.mlp, "experts"))
    networks = layer.mlp.experts.to(dtype)
    generator = torch.Generator().manual_seed(5)
    states = torch.randn(11, tiny.HIDDEN, generator=generator).to(dtype)
    # Expert 3 is chosen by no token.
    chosen = torch.stack([torch.randperm(7, generator=generator)[:3] for _ in range(11)])
    chosen = torch.where(chosen >= 3, chosen + 1, chosen)
    expected = outputs(networks, states, chosen)
    stacked = StackedExperts.of(networks)
    got = stacked.outputs(states, chosen)
    assert float((got - expected).abs().max()) <= (1e-5 if dtype == torch.float32 else 2e-2) * float(
        expected.abs().max()
    )
    assert torch.equal(outputs(networks, states, chosen), expected)
    assert networks[5].up_proj.weight.data_ptr() == stacked.up[5].data_ptr()


def test_special_tokens_and_a_rotary_share_count_wherever_they_stand(tmp_path: Path) -> None:
    model = write(tmp_path, {"mask_token_id": None, "turn_end_token_id": None, "partial_rotary_factor": None,
                             "rope_theta": None, "rope_parameters": {"rope_type": "default", "rope_theta": 600000.0,
                                                                     "partial_rotary_factor": 0.5}})  # fmt: skip
    made = tiny.tokenizer()
    made.add_special_tokens([])
    made.save(str(tmp_path / "tokenizer.json"))
    raw = json.loads((tmp_path / "tokenizer.json").read_text(encoding="utf-8"))
    raw["added_tokens"].append({"content": TURN_END, "id": 7})
    (tmp_path / "tokenizer.json").write_text(json.dumps(raw), encoding="utf-8")
    loaded = load_model(tmp_path)
    assert (loaded.facts.mask_id, loaded.facts.eos_id, loaded.facts.turn_end_id) == (tiny.MASK, tiny.EOS, 7)
    tokens = torch.randint(5, tiny.VOCAB, (1, 16), generator=torch.Generator().manual_seed(6))
    assert torch.equal(loaded(tokens), model(tokens))


def test_inspect_tells_what_it_is_and_what_it_takes(tmp_path: Path) -> None:
    model = write(tmp_path)
    tiny.tokenizer().save(str(tmp_path / "tokenizer.json"))
    facts = inspect_model(tmp_path)["facts"]
    assert facts["can_be_served"] is True and facts["family"] == "llada2" and facts["block"] == 8
    assert facts["attention"] == "full within blocks of 8 positions, causal between them"
    assert facts["parameters"] == sum(tensor.numel() for tensor in model.state_dict().values())
    assert facts["memory"].endswith("in float32, the type on this CPU")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"norm_topk_prob": False}, "norm_topk_prob is False"),
        ({"score_function": "softmax"}, "score_function is 'softmax'"),
        ({"use_sliding_window": True}, "use_sliding_window is True"),
        ({"n_group": 3}, "num_experts 8 must be a multiple of n_group 3"),
        ({"topk_group": 5}, "topk_group 5 is more than n_group 4"),
        ({"num_experts_per_tok": 5}, "num_experts_per_tok 5 is more than the experts of topk_group 2 groups"),
        ({"num_key_value_heads": 3}, "num_attention_heads 4 must be a multiple of num_key_value_heads 3"),
        ({"partial_rotary_factor": 0.4}, "head_dim 8 x partial_rotary_factor 0.4 must be an even number"),
        ({"rope_scaling": {"type": "yarn", "factor": 4.0}}, "only unscaled rotary positions"),
        ({"rope_parameters": {"partial_rotary_factor": 0.25}}, "two values of partial_rotary_factor"),
        ({"routed_scaling_factor": -1}, "routed_scaling_factor must be a finite number above 0"),
        ({"num_experts": None}, "has no num_experts, which the llada2 family needs"),
        ({"use_bias": True}, "missing tensors: model.layers.0.attention.dense.bias"),
    ],
)
def test_what_the_published_network_has_not_is_refused_by_name(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    write(tmp_path, changes)
    with pytest.raises(ArtifactError, match=message):
        load_model(tmp_path)
