"""From hidden states at masked positions to a candidate token each, and what the orders need to know of it."""

from dataclasses import dataclass

import torch
from torch import Tensor

from steerserve.engine import noise
from steerserve.models import DiffusionLM

_CHUNK_BYTES = 64 << 20
"""Bound on one block of logits; a block of [rows, vocabulary] and a few copies of it live at once."""
_TILE = 16
"""Matrix products of fewer rows take other kernels on CPUs, whose last bits differ; shorter blocks are padded."""


@dataclass(frozen=True)
class Draw:
    """Candidates at N masked positions."""

    token: Tensor
    """[N] int64."""
    probability: Tensor
    """[N] float64: of the candidate under softmax(logits), temperature and top-p not applied (LLaDA's confidence)."""
    margin: Tensor | None
    """[N] float64: p1 - p2 of the two likeliest tokens."""
    entropy: Tensor | None
    """[N] float64, nats."""


@dataclass(frozen=True)
class Settings:
    """How each of N candidates is drawn; every field [N]."""

    temperature: Tensor
    """0 is the argmax."""
    top_p: Tensor
    no_eos: Tensor
    """Bool: the end-of-text token is not drawn."""
    key: Tensor
    """Of the position's noise, `noise.keys`."""

    def __getitem__(self, index: slice | Tensor) -> "Settings":
        return Settings(self.temperature[index], self.top_p[index], self.no_eos[index], self.key[index])


def draw(model: DiffusionLM, hidden: Tensor, settings: Settings, needs: frozenset[str]) -> Draw:
    """Sample a token for each of hidden [N, hidden_size]; `needs` names what to compute beside the probability.

    The vocabulary-sized work is done in blocks of bounded memory, whose borders change no result.
    """
    size = max(_TILE, _CHUNK_BYTES // (4 * model.facts.vocab_size) // _TILE * _TILE)
    parts = [
        _draw_block(model, hidden[i : i + size], settings[i : i + size], needs)
        for i in range(0, max(1, len(hidden)), size)
    ]
    if len(parts) == 1:
        return parts[0]
    return Draw(
        token=torch.cat([part.token for part in parts]),
        probability=torch.cat([part.probability for part in parts]),
        margin=torch.cat([p.margin for p in parts if p.margin is not None]) if "margin" in needs else None,
        entropy=torch.cat([p.entropy for p in parts if p.entropy is not None]) if "entropy" in needs else None,
    )


def pad_rows(hidden: Tensor) -> Tensor:
    """hidden [N, hidden_size] with rows of zeros added up to the height from which matrix products round rows alike."""
    missing = _TILE - len(hidden)
    return torch.cat([hidden, hidden.new_zeros(missing, hidden.shape[1])]) if missing > 0 else hidden


def _draw_block(model: DiffusionLM, hidden: Tensor, settings: Settings, needs: frozenset[str]) -> Draw:
    logits = model.head(pad_rows(hidden))[: len(hidden)].float()
    if model.facts.forbidden_ids:
        logits[:, list(model.facts.forbidden_ids)] = -torch.inf
    eos = model.facts.eos_id
    logits[:, eos] = logits[:, eos].masked_fill(settings.no_eos, -torch.inf)
    token = logits.argmax(dim=1)
    hot = (settings.temperature > 0).nonzero()[:, 0]
    if len(hot):
        token[hot] = _sample(logits[hot], settings[hot])
    chosen = logits.gather(1, token[:, None])
    margin = entropy = None
    if "margin" in needs:
        best = (logits.topk(2, dim=1).values - logits.logsumexp(1, keepdim=True)).double().exp()
        margin = best[:, 0] - best[:, 1]
    if "entropy" in needs:
        log_p = logits.log_softmax(dim=1)
        entropy = -(log_p.exp() * log_p.clamp(min=-1e4)).sum(1).double()
    # Against the rest of the mass, not against all of it: 1 - p keeps its precision where p rounds to 1 in float32,
    # so that near-certain positions are still ranked.
    rest = logits.scatter_(1, token[:, None], -torch.inf).logsumexp(1)
    # Not torch.sigmoid, whose last bit depends on where in the tensor an element stands: equal candidates must tie.
    probability = ((rest.double() - chosen[:, 0].double()).exp() + 1).reciprocal()
    return Draw(token, probability, margin, entropy)


def _sample(logits: Tensor, settings: Settings) -> Tensor:
    """Gumbel-max draws from softmax(logits / temperature), cut to the smallest set of mass top_p."""
    # Shifted so that the largest is 0: it stays finite at any temperature, and the draw is the argmax near 0.
    scaled = (logits - logits.amax(dim=1, keepdim=True)) / settings.temperature[:, None]
    nucleus = (settings.top_p < 1).nonzero()[:, 0]
    if len(nucleus):
        ordered, index = scaled[nucleus].sort(dim=1, descending=True, stable=True)
        share = ordered.softmax(dim=1)
        beyond = share.cumsum(dim=1) - share >= settings.top_p[nucleus, None]
        beyond[:, 0] = False
        scaled[nucleus] = scaled[nucleus].masked_fill(beyond.scatter(1, index, beyond), -torch.inf)
    return (scaled - noise.exponential(settings.key, logits.shape[1]).log_()).argmax(dim=1)
