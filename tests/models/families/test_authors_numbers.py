"""Every constant of a forward as its authors compute it: frequencies in float32, and whole forwards bit for bit.

Sources: the modelling code of LLaDA (arXiv 2502.09992), Dream (arXiv 2508.15487), MDLM (arXiv 2406.07524) and SEDD
(arXiv 2310.16834), written down from their descriptions; BERT is `transformers`' own.
"""

import math
from collections.abc import Callable
from copy import deepcopy

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from steerserve.models import DiffusionLM
from steerserve.models.llama import rotary_frequencies
from steerserve.models.sigma import Geometric, LogLinear
from tests import tiny

LENGTH = 32
IDS = torch.randint(5, tiny.VOCAB, (2, LENGTH), generator=torch.Generator().manual_seed(0))
HEADS = 4
CPU = torch.device("cpu")


@pytest.mark.parametrize("size", [64, 80, 128])
@pytest.mark.parametrize("theta", [1e4, 5e5, 1e6])
def test_rotary_frequencies_are_the_authors_float32(size: int, theta: float) -> None:
    exponent = torch.arange(0, size, 2).float() / size
    assert torch.equal(rotary_frequencies(size, theta, CPU), 1.0 / (theta**exponent))
    assert not torch.equal(rotary_frequencies(size, theta, CPU), theta**-exponent), "the two ways round alike here"


def turned(x: Tensor, theta: float, dtype: torch.dtype) -> Tensor:
    """x [rows, heads, length, size], its halves turned in that dtype."""
    size = x.shape[3]
    angle = torch.outer(torch.arange(x.shape[2]).float(), 1.0 / (theta ** (torch.arange(0, size, 2).float() / size)))
    angle = torch.cat([angle, angle], dim=1)
    wide = x.to(dtype)
    swapped = torch.cat([-wide[..., size // 2 :], wide[..., : size // 2]], dim=3)
    return (wide * angle.cos().to(dtype) + swapped * angle.sin().to(dtype)).to(x.dtype)


def mixed(q: Tensor, k: Tensor, v: Tensor, theta: float, dtype: torch.dtype) -> Tensor:
    """Full attention of [rows, length, heads * size] over as many heads or a divisor of them."""
    size = q.shape[2] // HEADS
    q, k, v = (one.reshape(*one.shape[:2], -1, size).transpose(1, 2) for one in (q, k, v))
    q, k = turned(q, theta, dtype), turned(k, theta, dtype)
    k, v = (one.repeat_interleave(HEADS // one.shape[1], dim=1) for one in (k, v))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


def rms(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    wide = x.float()
    return weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype)


def llada(w: dict[str, Tensor]) -> Tensor:
    h = w["model.transformer.wte.weight"][IDS]
    for layer in range(3):
        b = {name.split(".", 4)[4]: t for name, t in w.items() if name.startswith(f"model.transformer.blocks.{layer}.")}
        n = rms(h, b["attn_norm.weight"], 1e-5)
        q, k, v = (F.linear(n, b[f"{part}_proj.weight"]) for part in "qkv")
        h = h + F.linear(mixed(q, k, v, 500000.0, torch.float32), b["attn_out.weight"])
        n = rms(h, b["ff_norm.weight"], 1e-5)
        gate = F.silu(F.linear(n, b["ff_proj.weight"])) * F.linear(n, b["up_proj.weight"])
        h = h + F.linear(gate, b["ff_out.weight"])
    return F.linear(rms(h, w["model.transformer.ln_f.weight"], 1e-5), w["model.transformer.ff_out.weight"])


def dream(w: dict[str, Tensor]) -> Tensor:
    h = w["model.embed_tokens.weight"][IDS]
    for layer in range(3):
        b = {name.split(".", 3)[3]: t for name, t in w.items() if name.startswith(f"model.layers.{layer}.")}
        n = rms(h, b["input_layernorm.weight"], 1e-6)
        q, k, v = (F.linear(n, b[f"self_attn.{p}_proj.weight"], b[f"self_attn.{p}_proj.bias"]) for p in "qkv")
        h = h + F.linear(mixed(q, k, v, 1e6, h.dtype), b["self_attn.o_proj.weight"])
        n = rms(h, b["post_attention_layernorm.weight"], 1e-6)
        gate = F.silu(F.linear(n, b["mlp.gate_proj.weight"])) * F.linear(n, b["mlp.up_proj.weight"])
        h = h + F.linear(gate, b["mlp.down_proj.weight"])
    return F.linear(rms(h, w["model.norm.weight"], 1e-6), w["lm_head.weight"])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("model", "authors"),
    # A head without padding: a product with more rows than are asked for may take another kernel.
    [(tiny.llada(3, embedding_size=tiny.VOCAB), llada), (tiny.dream(3), dream)],
    ids=["llada", "dream"],
)
def test_a_forward_has_the_bits_of_the_authors(
    model: DiffusionLM, authors: Callable[[dict[str, Tensor]], Tensor], dtype: torch.dtype
) -> None:
    model = deepcopy(model).to(dtype)
    assert torch.equal(model.head(model(IDS)), authors(dict(model.state_dict())))


def dit(w: dict[str, Tensor], sigma: Tensor) -> Tensor:
    w = {name.removeprefix("backbone."): tensor for name, tensor in w.items()}
    steps = torch.arange(128).float()
    angle = sigma[:, None] * torch.exp(-math.log(10000) * steps / 128)[None]
    c = torch.cat([angle.cos(), angle.sin()], 1)
    # As many noise levels as the model pads its own to: products of fewer rows take other kernels.
    c = F.pad(c, (0, 0, 0, 16 - len(c)))
    for layer in (0, 2):
        c = F.silu(F.linear(c, w[f"sigma_map.mlp.{layer}.weight"], w[f"sigma_map.mlp.{layer}.bias"]))

    def norm(x: Tensor, name: str, shift: Tensor, scale: Tensor) -> Tensor:
        return F.layer_norm(x, x.shape[-1:]) * w[f"{name}.weight"] * (1 + scale) + shift

    def parts(name: str, count: int) -> tuple[Tensor, ...]:
        made = F.linear(c[:, None], w[f"{name}.adaLN_modulation.weight"], w[f"{name}.adaLN_modulation.bias"])
        return made[: len(IDS)].chunk(count, dim=2)

    h = w["vocab_embed.embedding"][IDS]
    for block in range(3):
        b = f"blocks.{block}"
        shift, scale, gate, late_shift, late_scale, late_gate = parts(b, 6)
        q, k, v = F.linear(norm(h, f"{b}.norm1", shift, scale), w[f"{b}.attn_qkv.weight"]).chunk(3, dim=2)
        h = h + gate * F.linear(mixed(q, k, v, 10000.0, torch.float32), w[f"{b}.attn_out.weight"])
        inner = F.linear(norm(h, f"{b}.norm2", late_shift, late_scale), w[f"{b}.mlp.0.weight"], w[f"{b}.mlp.0.bias"])
        inner = F.gelu(inner, approximate="tanh")
        h = h + late_gate * F.linear(inner, w[f"{b}.mlp.2.weight"], w[f"{b}.mlp.2.bias"])
    shift, scale = parts("output_layer", 2)
    last = norm(h, "output_layer.norm_final", shift, scale)
    return F.linear(last, w["output_layer.linear.weight"], w["output_layer.linear.bias"])


def test_a_dit_has_the_bits_of_the_authors_at_every_noise_level() -> None:
    model, sigma = tiny.sedd(2), torch.tensor([4.3, 0.02])
    assert torch.equal(model.head(model(IDS, sigma=sigma)), dit(dict(model.state_dict()), sigma))


def test_bert_has_the_bits_of_transformers() -> None:
    transformers = pytest.importorskip("transformers")
    model = tiny.bert(4)
    config = transformers.BertConfig(
        vocab_size=tiny.VOCAB, hidden_size=tiny.HIDDEN, num_hidden_layers=3, num_attention_heads=HEADS,
        intermediate_size=48, max_position_embeddings=tiny.CONTEXT,
    )  # fmt: skip
    theirs = transformers.BertForMaskedLM(config).eval()
    theirs.load_state_dict(model.state_dict(), strict=False)
    with torch.inference_mode():
        assert torch.equal(model.head(model(IDS)), theirs(IDS).logits)


@pytest.mark.parametrize("time", [1.0, 0.75, 0.3, 1e-5])
def test_noise_levels_are_the_authors_float32(time: float) -> None:
    t = torch.tensor([time])
    assert torch.equal(LogLinear().total(t), -torch.log1p(-(1 - 1e-3) * t))
    assert torch.equal(LogLinear().rate(t), (1 - 1e-3) / (1 - (1 - 1e-3) * t))
    low, high = torch.tensor([1e-4, 20.0])
    total = low ** (1 - t) * high**t
    assert torch.equal(Geometric().total(t), total)
    torch.testing.assert_close(Geometric().rate(t), total * (high.log() - low.log()), rtol=1e-6, atol=0)
