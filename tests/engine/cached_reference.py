"""The loop of Fast-dLLM with its prefix and dual caches (arXiv 2505.22618, algorithm 1), written straight from its
description: one canvas, plain lists, float64, every layer spelled out."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from steerserve.models import DiffusionLM
from tests import tiny

Past = list[tuple[Tensor, Tensor]]
"""Keys and values [canvas, heads, size] of each layer."""


@dataclass
class Net:
    """A model taken apart: its weights in float64 under their published names."""

    weights: dict[str, Tensor]
    family: str
    heads: int
    kv_heads: int
    theta: float = 0.0
    push: tuple[int, Tensor] | None = None
    """A layer, and what is added to every state at its output."""

    @classmethod
    def of(cls, model: DiffusionLM, push: tuple[int, Tensor] | None = None) -> "Net":
        weights = {name: tensor.double() for name, tensor in model.state_dict().items()}
        family = model.facts.family
        heads = {"llada": 4, "dream": 4, "bert": 4}[family]
        theta = {"llada": 500000.0, "dream": 1e6, "bert": 0.0}[family]
        return cls(weights, family, heads, 2 if family == "dream" else 4, theta, push)

    def states(self, canvas: Sequence[int], places: Sequence[int], past: Past) -> Tensor:
        """Final states of the canvas at `places`, whose keys and values take their places in `past`."""
        where = torch.tensor(places)
        layer = {"llada": self._llada, "dream": self._dream, "bert": self._bert}[self.family]
        h = self._embedded(torch.tensor([canvas[i] for i in places]), where)
        for index in range(3):
            h = layer(h, where, past[index], index)
            if self.push is not None and self.push[0] == index:
                h = h + self.push[1].double()
        if self.family == "llada":
            return self._rms(h, "model.transformer.ln_f.weight", 1e-5)
        return self._rms(h, "model.norm.weight", 1e-6) if self.family == "dream" else h

    def logits(self, states: Tensor) -> Tensor:
        w = self.weights
        if self.family == "llada":
            return states @ w["model.transformer.ff_out.weight"][: tiny.VOCAB].T
        if self.family == "dream":
            return states @ w["lm_head.weight"].T
        states = F.gelu(self._linear(states, "cls.predictions.transform.dense"))
        states = self._norm(states, "cls.predictions.transform.LayerNorm")
        return states @ w["bert.embeddings.word_embeddings.weight"].T + w["cls.predictions.bias"]

    def _embedded(self, tokens: Tensor, where: Tensor) -> Tensor:
        w = self.weights
        if self.family == "llada":
            return w["model.transformer.wte.weight"][tokens]
        if self.family == "dream":
            return w["model.embed_tokens.weight"][tokens]
        h = w["bert.embeddings.word_embeddings.weight"][tokens] + w["bert.embeddings.position_embeddings.weight"][where]
        return self._norm(h + w["bert.embeddings.token_type_embeddings.weight"][0], "bert.embeddings.LayerNorm")

    def _llada(self, h: Tensor, where: Tensor, past: tuple[Tensor, Tensor], index: int) -> Tensor:
        name = f"model.transformer.blocks.{index}."
        n = self._rms(h, name + "attn_norm.weight", 1e-5)
        q, k, v = (self._linear(n, name + part) for part in ("q_proj", "k_proj", "v_proj"))
        h = h + self._linear(self._attend(q, k, v, where, past), name + "attn_out")
        n = self._rms(h, name + "ff_norm.weight", 1e-5)
        gated = F.silu(self._linear(n, name + "ff_proj")) * self._linear(n, name + "up_proj")
        return h + self._linear(gated, name + "ff_out")

    def _dream(self, h: Tensor, where: Tensor, past: tuple[Tensor, Tensor], index: int) -> Tensor:
        name = f"model.layers.{index}."
        n = self._rms(h, name + "input_layernorm.weight", 1e-6)
        q, k, v = (self._linear(n, f"{name}self_attn.{part}") for part in ("q_proj", "k_proj", "v_proj"))
        h = h + self._linear(self._attend(q, k, v, where, past), name + "self_attn.o_proj")
        n = self._rms(h, name + "post_attention_layernorm.weight", 1e-6)
        gated = F.silu(self._linear(n, name + "mlp.gate_proj")) * self._linear(n, name + "mlp.up_proj")
        return h + self._linear(gated, name + "mlp.down_proj")

    def _bert(self, h: Tensor, where: Tensor, past: tuple[Tensor, Tensor], index: int) -> Tensor:
        name = f"bert.encoder.layer.{index}."
        q, k, v = (self._linear(h, f"{name}attention.self.{part}") for part in ("query", "key", "value"))
        mixed = self._linear(self._attend(q, k, v, where, past), name + "attention.output.dense")
        h = self._norm(h + mixed, name + "attention.output.LayerNorm")
        inner = F.gelu(self._linear(h, name + "intermediate.dense"))
        return self._norm(h + self._linear(inner, name + "output.dense"), name + "output.LayerNorm")

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, where: Tensor, past: tuple[Tensor, Tensor]) -> Tensor:
        heads = (self.heads, self.kv_heads, self.kv_heads)
        q, k, v = (one.reshape(len(one), count, -1) for one, count in zip((q, k, v), heads, strict=True))
        if self.theta:
            q, k = self._turn(q, where), self._turn(k, where)
        past[0][where], past[1][where] = k, v
        mixed = []
        for head in range(self.heads):
            group = head * self.kv_heads // self.heads
            scores = q[:, head] @ past[0][:, group].T / math.sqrt(q.shape[2])
            mixed.append(scores.softmax(1) @ past[1][:, group])
        return torch.cat(mixed, 1)

    def _turn(self, x: Tensor, where: Tensor) -> Tensor:
        half = x.shape[2] // 2
        angle = where[:, None] * self.theta ** (-torch.arange(half, dtype=torch.float64) / half)
        cos, sin = angle.cos()[:, None], angle.sin()[:, None]
        return torch.cat([x[..., :half] * cos - x[..., half:] * sin, x[..., half:] * cos + x[..., :half] * sin], 2)

    def _linear(self, x: Tensor, name: str) -> Tensor:
        out = x @ self.weights[name + ".weight"].T
        return out + self.weights[name + ".bias"] if name + ".bias" in self.weights else out

    def _rms(self, x: Tensor, name: str, eps: float) -> Tensor:
        return x / (x.pow(2).mean(1, keepdim=True) + eps).sqrt() * self.weights[name]

    def _norm(self, x: Tensor, name: str) -> Tensor:
        centred = x - x.mean(1, keepdim=True)
        scaled = centred / (centred.pow(2).mean(1, keepdim=True) + 1e-12).sqrt()
        return scaled * self.weights[name + ".weight"] + self.weights[name + ".bias"]

    def empty(self, length: int) -> Past:
        size = tiny.HIDDEN // self.heads
        shape = (length, self.kv_heads, size)
        return [(torch.zeros(shape, dtype=torch.float64), torch.zeros(shape, dtype=torch.float64)) for _ in range(3)]


def denoise(
    net: Net,
    prompt: Sequence[int],
    suffix: Sequence[int],
    length: int,
    block_length: int,
    steps: int,
    cache: str,
    refresh: Callable[[int], bool],
    never: Sequence[int],
) -> tuple[list[int], int, int]:
    """Greedy, most confident first, as many tokens at each step of a block: the response, and how many forwards were
    of the whole canvas and of a part. `refresh` says so of a forward by its number in the block, from 1."""
    shift = 1 if net.family == "dream" else 0
    canvas = [*prompt, *[tiny.MASK] * length, *suffix]
    past = net.empty(len(canvas))
    whole = part = 0
    for first in range(len(prompt), len(prompt) + length, block_length):
        last, per_block = first + block_length, steps * block_length // length
        for step in range(per_block):
            masked = [i for i in range(first, last) if canvas[i] == tiny.MASK]
            if not masked:
                break
            if step == 0 or refresh(step):
                places, whole = list(range(len(canvas))), whole + 1
            else:
                stop = last if cache == "dual" else len(canvas)
                places, part = list(range(max(0, first - shift), stop)), part + 1
            states = dict(zip(places, net.states(canvas, places, past), strict=True))
            found = []
            for i in masked:
                logits = net.logits(states[max(0, i - shift)][None])[0]
                logits[list(never)] = -math.inf
                token = int(logits.argmax())
                found.append((-float(logits.softmax(0)[token]), i, token))
            count = block_length // per_block + (step < block_length % per_block)
            for _, i, token in sorted(found)[:count]:
                canvas[i] = token
    return canvas[len(prompt) : len(prompt) + length], whole, part
