"""Straight forwards from token ids to the logits of every position, as model code that comes with checkpoints has them.

They read the weights of a loaded model by name and share nothing else with it: no padding, no masks, no packing.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from steerserve.models import DiffusionLM

Forward = Callable[[Tensor], Tensor]
"""Tokens [rows, length] -> logits [rows, length, vocabulary]."""


def forward_of(model: DiffusionLM) -> Forward:
    """The family's forward over the very tensors of the model."""
    made = {"bert": bert, "mdlm": mdlm, "llada": llada, "dream": dream}[model.facts.family]
    return made(model)


def weights(model: DiffusionLM) -> tuple[dict[str, Tensor], Any]:
    """Its tensors by name, and its config."""
    return dict(model.state_dict()), model.config


def heads(x: Tensor, count: int) -> Tensor:
    return x.view(*x.shape[:2], count, -1).transpose(1, 2)


def merged(x: Tensor) -> Tensor:
    return x.transpose(1, 2).reshape(x.shape[0], x.shape[2], -1)


def turned(x: Tensor, base: float) -> Tensor:
    """Rotate-half rotary positions."""
    size = x.shape[-1]
    angles = torch.outer(
        torch.arange(x.shape[-2], device=x.device).float(),
        1.0 / base ** (torch.arange(0, size, 2, device=x.device).float() / size),
    )
    cos, sin = torch.cat([angles.cos()] * 2, -1), torch.cat([angles.sin()] * 2, -1)
    half = torch.cat([-x[..., size // 2 :], x[..., : size // 2]], -1)
    return (x.float() * cos + half.float() * sin).to(x.dtype)


def rms(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    wide = x.float()
    return weight * (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)).to(x.dtype)


def bert(model: DiffusionLM) -> Forward:
    w, config = weights(model)
    count, eps, layers = config.num_attention_heads, config.layer_norm_eps, config.num_hidden_layers
    words, width = w["bert.embeddings.word_embeddings.weight"], config.hidden_size

    def dense(x: Tensor, name: str) -> Tensor:
        return F.linear(x, w[f"{name}.weight"], w[f"{name}.bias"])

    def norm(x: Tensor, name: str) -> Tensor:
        return F.layer_norm(x, (width,), w[f"{name}.LayerNorm.weight"], w[f"{name}.LayerNorm.bias"], eps)

    def run(tokens: Tensor) -> Tensor:
        x = words[tokens] + w["bert.embeddings.position_embeddings.weight"][: tokens.shape[1]]
        x = norm(x + w["bert.embeddings.token_type_embeddings.weight"][0], "bert.embeddings")
        for i in range(layers):
            at = f"bert.encoder.layer.{i}"
            q, k, v = (heads(dense(x, f"{at}.attention.self.{one}"), count) for one in ("query", "key", "value"))
            mixed = merged(F.scaled_dot_product_attention(q, k, v))
            x = norm(x + dense(mixed, f"{at}.attention.output.dense"), f"{at}.attention.output")
            inner = F.gelu(dense(x, f"{at}.intermediate.dense"))
            x = norm(x + dense(inner, f"{at}.output.dense"), f"{at}.output")
        x = F.gelu(dense(x, "cls.predictions.transform.dense"))
        return F.linear(norm(x, "cls.predictions.transform"), words, w["cls.predictions.bias"])

    return run


def mdlm(model: DiffusionLM) -> Forward:
    """Without time conditioning: the modulations are constants, computed before the loop as a cache would."""
    w, config = weights(model)
    width, count = config.hidden_size, config.num_heads

    def norm(x: Tensor, name: str, shift: Tensor, scale: Tensor) -> Tensor:
        return F.layer_norm(x.float(), (width,)) * w[f"{name}.weight"] * (1 + scale) + shift

    def run(tokens: Tensor) -> Tensor:
        x = w["backbone.vocab_embed.embedding"][tokens]
        for i in range(config.num_layers):
            at = f"backbone.blocks.{i}"
            shift, scale, gate, shift2, scale2, gate2 = w[f"{at}.adaLN_modulation.constant"].chunk(6)
            packed = F.linear(norm(x, f"{at}.norm1", shift, scale), w[f"{at}.attn_qkv.weight"])
            q, k, v = (heads(one, count) for one in packed.chunk(3, -1))
            mixed = F.scaled_dot_product_attention(turned(q, 1e4), turned(k, 1e4), v)
            x = x + gate * F.linear(merged(mixed), w[f"{at}.attn_out.weight"])
            inner = F.linear(norm(x, f"{at}.norm2", shift2, scale2), w[f"{at}.mlp.0.weight"], w[f"{at}.mlp.0.bias"])
            inner = F.gelu(inner, approximate="tanh")
            x = x + gate2 * F.linear(inner, w[f"{at}.mlp.2.weight"], w[f"{at}.mlp.2.bias"])
        shift, scale = w["backbone.output_layer.adaLN_modulation.constant"].chunk(2)
        x = norm(x, "backbone.output_layer.norm_final", shift, scale)
        return F.linear(x, w["backbone.output_layer.linear.weight"], w["backbone.output_layer.linear.bias"])

    return run


def llada(model: DiffusionLM) -> Forward:
    w, config = weights(model)
    eps, base, at0 = config.rms_norm_eps, config.rope_theta, "model.transformer"

    def run(tokens: Tensor) -> Tensor:
        x = w[f"{at0}.wte.weight"][tokens]
        for i in range(config.n_layers):
            at = f"{at0}.blocks.{i}"
            n = rms(x, w[f"{at}.attn_norm.weight"], eps)
            q, k, v = (F.linear(n, w[f"{at}.{one}_proj.weight"]) for one in "qkv")
            q, k, v = heads(q, config.n_heads), heads(k, config.kv_heads), heads(v, config.kv_heads)
            gqa = config.kv_heads != config.n_heads
            mixed = F.scaled_dot_product_attention(turned(q, base), turned(k, base), v, enable_gqa=gqa)
            x = x + F.linear(merged(mixed), w[f"{at}.attn_out.weight"])
            n = rms(x, w[f"{at}.ff_norm.weight"], eps)
            inner = F.silu(F.linear(n, w[f"{at}.ff_proj.weight"])) * F.linear(n, w[f"{at}.up_proj.weight"])
            x = x + F.linear(inner, w[f"{at}.ff_out.weight"])
        tied = f"{at0}.wte.weight" if config.weight_tying else f"{at0}.ff_out.weight"
        return F.linear(rms(x, w[f"{at0}.ln_f.weight"], eps), w[tied])[..., : config.vocab_size]

    return run


def dream(model: DiffusionLM) -> Forward:
    w, config = weights(model)
    eps, base, size = config.rms_norm_eps, config.rope_theta, config.head_size

    def run(tokens: Tensor) -> Tensor:
        x = w["model.embed_tokens.weight"][tokens]
        for i in range(config.num_hidden_layers):
            at = f"model.layers.{i}"
            n = rms(x, w[f"{at}.input_layernorm.weight"], eps)
            q, k, v = (
                F.linear(n, w[f"{at}.self_attn.{one}_proj.weight"], w[f"{at}.self_attn.{one}_proj.bias"])
                for one in "qkv"
            )
            q, k, v = (heads(one, one.shape[-1] // size) for one in (q, k, v))
            mixed = F.scaled_dot_product_attention(turned(q, base), turned(k, base), v, enable_gqa=True)
            x = x + F.linear(merged(mixed), w[f"{at}.self_attn.o_proj.weight"])
            n = rms(x, w[f"{at}.post_attention_layernorm.weight"], eps)
            gate, up = (F.linear(n, w[f"{at}.mlp.{one}_proj.weight"]) for one in ("gate", "up"))
            x = x + F.linear(F.silu(gate) * up, w[f"{at}.mlp.down_proj.weight"])
        tied = "model.embed_tokens.weight" if config.tie_word_embeddings else "lm_head.weight"
        return F.linear(rms(x, w["model.norm.weight"], eps), w[tied])

    return run
