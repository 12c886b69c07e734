"""From hidden states at masked positions to a candidate token each, and what the orders need to know of it."""

from collections.abc import Mapping
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from steerserve.engine import noise
from steerserve.engine.forward.head import blocks, pad_rows
from steerserve.models import DiffusionLM

_NUCLEUS = 512
"""Likeliest tokens looked at first for top-p."""


@dataclass(frozen=True)
class Draw:
    """Candidates at N masked positions."""

    token: Tensor
    """[N] int64."""
    probability: Tensor
    """[N] float64: of the candidate under softmax(logits), temperature, top-p and top-k not applied."""
    measures: Mapping[str, Tensor]
    """[N] float64 each: what was asked for of `probability` (as the order shall see it), `margin`, `entropy` (nats),
    `filtered_...` of these under the distribution that is drawn from, and `mass` (log of the sum of exp(logits))."""

    def __getitem__(self, index: slice) -> "Draw":
        measures = {name: measure[index] for name, measure in self.measures.items()}
        return Draw(self.token[index], self.probability[index], measures)


@dataclass(frozen=True)
class Settings:
    """How each of N candidates is drawn; every field [N]."""

    temperature: Tensor
    """0 is the argmax."""
    top_p: Tensor
    top_k: Tensor
    """int64; 0 is all tokens."""
    no_eos: Tensor
    """int64: how many of the tokens that end the text are not drawn, the first ones of the model's."""
    ends_last: Tensor
    """Bool: candidates that end the text have probability 0 for the order."""
    guidance: Tensor
    """Scale of classifier-free guidance, 0 for none."""
    key: Tensor
    """Key of the position's noise, from `noise.keys`."""

    def __getitem__(self, index: slice | Tensor) -> "Settings":
        return Settings(*(getattr(self, field.name)[index] for field in fields(self)))


def draw(
    model: DiffusionLM, hidden: Tensor, settings: Settings, needs: frozenset[str], unguided: Tensor | None = None
) -> Draw:
    """Sample a token for each of hidden [N, hidden_size]; `needs` names what to measure beside the probability.

    unguided [N, hidden_size]: the states without the prompt, of which those with guidance are read; None where there
    is none. The vocabulary-sized work is done in blocks of bounded memory, whose borders change no result.
    """
    parts = [
        _draw_block(model, hidden[at], settings[at], needs, None if unguided is None else unguided[at])
        for at in blocks(len(hidden), model.facts.vocab_size)
    ]
    if len(parts) == 1:
        return parts[0]
    return Draw(
        token=torch.cat([part.token for part in parts]),
        probability=torch.cat([part.probability for part in parts]),
        measures={name: torch.cat([part.measures[name] for part in parts]) for name in parts[0].measures},
    )


def alternatives(
    model: DiffusionLM, hidden: Tensor, settings: Settings, count: int, unguided: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The likeliest tokens at hidden [N, hidden_size] and their log-probabilities: [N, count], largest first.

    Of the distribution that `Draw.probability` is of, which temperature, top-p and top-k do not change. In blocks, as
    `draw`.
    """
    tokens, values = [], []
    for at in blocks(len(hidden), model.facts.vocab_size):
        logits = _guided(model, hidden[at], settings[at], None if unguided is None else unguided[at])
        bar_ends(logits, settings[at].no_eos, model.facts.end_ids)
        best = logits.topk(min(count, logits.shape[1]), dim=1)
        tokens.append(best.indices)
        values.append(best.values - logits.logsumexp(1, keepdim=True))
    return torch.cat(tokens), torch.cat(values)


def scores(model: DiffusionLM, hidden: Tensor, token: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probability [N] of token [N] at hidden [N, hidden_size], and of the likeliest tokens there [N, count] with
    theirs, largest first: of the model's own distribution, from which nothing but the mask token is left out."""
    own, tokens, values = [], [], []
    for at in blocks(len(hidden), model.facts.vocab_size):
        logits = _logits(model, hidden[at])
        logits[:, model.facts.mask_id] = -torch.inf
        log_p = logits.log_softmax(dim=1)
        best = log_p.topk(min(count, log_p.shape[1]), dim=1)
        own.append(log_p.gather(1, token[at, None])[:, 0])
        tokens.append(best.indices)
        values.append(best.values)
    return torch.cat(own), torch.cat(tokens), torch.cat(values)


def bar_ends(logits: Tensor, barred: Tensor, end_ids: tuple[int, ...]) -> None:
    """Take end tokens out of logits [N, vocabulary], in place: of each row as many as barred [N] int64 says."""
    ends = list(end_ids)
    number = torch.arange(len(ends), device=logits.device)
    logits[:, ends] = logits[:, ends].masked_fill(number < barred[:, None], -torch.inf)


def _draw_block(
    model: DiffusionLM, hidden: Tensor, settings: Settings, needs: frozenset[str], unguided: Tensor | None
) -> Draw:
    facts = model.facts
    logits = _guided(model, hidden, settings, unguided)
    measures = {}
    if "mass" in needs:
        measures["mass"] = logits.logsumexp(1).double()
    bar_ends(logits, settings.no_eos, facts.end_ids)
    filtered = None
    if any(name.startswith("filtered_") for name in needs):
        filtered = _filtered(logits.clone(), settings)
    token = logits.argmax(dim=1)
    hot = (settings.temperature > 0).nonzero()[:, 0]
    if len(hot):
        cut = _filtered(logits[hot], settings[hot]) if filtered is None else filtered[hot]
        token[hot] = (cut - noise.exponential(settings.key[hot], cut.shape[1]).log_()).argmax(dim=1)
    measures |= _measures(logits, token, needs, "")
    if filtered is not None:
        measures |= _measures(filtered, token, needs, "filtered_")
    probability = _probability(logits, token)
    if "probability" in needs:
        measures["probability"] = _shown(logits, token, probability, settings.ends_last, facts.end_ids)
    return Draw(token, probability, measures)


def _guided(model: DiffusionLM, hidden: Tensor, settings: Settings, unguided: Tensor | None) -> Tensor:
    """Logits [N, vocabulary] with guidance, of the tokens that may be text."""
    facts = model.facts
    logits = _logits(model, hidden)
    if unguided is not None:
        guided = (settings.guidance > 0).nonzero()[:, 0]
        plain = _logits(model, unguided[guided])
        logits[guided] = plain + (settings.guidance[guided, None] + 1) * (logits[guided] - plain)
    if facts.forbidden_ids:
        logits[:, list(facts.forbidden_ids)] = -torch.inf
    return logits


def _logits(model: DiffusionLM, hidden: Tensor) -> Tensor:
    return model.head(pad_rows(hidden))[: len(hidden)].float()


def _filtered(logits: Tensor, settings: Settings) -> Tensor:
    """logits [N, vocabulary] over temperature, cut to the smallest set of mass top_p, then to the top_k likeliest.

    The largest is shifted to 0: it stays finite at any temperature, and a draw is the argmax near 0.
    """
    heat = torch.where(settings.temperature > 0, settings.temperature, 1.0)
    scaled = (logits - logits.amax(dim=1, keepdim=True)) / heat[:, None]
    nucleus = (settings.top_p < 1).nonzero()[:, 0]
    if len(nucleus):
        cut = scaled[nucleus]
        scaled[nucleus] = cut.masked_fill(cut < _least_kept(cut, settings.top_p[nucleus]), -torch.inf)
    few = (settings.top_k > 0).nonzero()[:, 0]
    if len(few):
        count = settings.top_k[few].clamp(max=logits.shape[1])
        best = scaled[few].topk(int(count.max()), dim=1).values
        least = best.gather(1, count[:, None] - 1)
        scaled[few] = scaled[few].masked_fill(scaled[few] < least, -torch.inf)
    return scaled


def _least_kept(logits: Tensor, top_p: Tensor) -> Tensor:
    """The smallest logit [N, 1] of the smallest set of likeliest tokens of mass top_p [N]; logits [N, vocabulary].

    Most sets are small: only rows whose first tokens do not hold the mass are sorted whole.
    """
    total = logits.logsumexp(dim=1, keepdim=True)
    few = min(_NUCLEUS, logits.shape[1])
    best = logits.topk(few, dim=1).values
    least = _last_within(best, total, top_p)
    wide = ((best - total).exp().sum(1) < top_p).nonzero()[:, 0]
    if few < logits.shape[1] and len(wide):
        ordered = logits[wide].sort(dim=1, descending=True).values
        least[wide] = _last_within(ordered, total[wide], top_p[wide])
    return least


def _last_within(ordered: Tensor, total: Tensor, top_p: Tensor) -> Tensor:
    """In descending logits [N, K] find the last [N, 1] before which less than top_p [N] lies; total [N, 1]
    logsumexp."""
    share = (ordered - total).exp()
    kept = (share.cumsum(dim=1) - share < top_p[:, None]).sum(1, keepdim=True).clamp(min=1)
    return ordered.gather(1, kept - 1)


def _measures(logits: Tensor, token: Tensor, needs: frozenset[str], prefix: str) -> dict[str, Tensor]:
    """What is needed of softmax(logits) [N, vocabulary], under names with the prefix."""
    found = {}
    if f"{prefix}margin" in needs:
        best = (logits.topk(2, dim=1).values - logits.logsumexp(1, keepdim=True)).double().exp()
        found[f"{prefix}margin"] = best[:, 0] - best[:, 1]
    if f"{prefix}entropy" in needs:
        if prefix:
            # The filtered one is Dream's, which adds so much to each probability.
            p = logits.softmax(dim=1)
            found[f"{prefix}entropy"] = -(p * (p + 1e-10).log()).sum(1).double()
        else:
            log_p = logits.log_softmax(dim=1)
            found["entropy"] = -(log_p.exp() * log_p.clamp(min=-1e4)).sum(1).double()
    if prefix and f"{prefix}probability" in needs:
        found[f"{prefix}probability"] = _probability(logits, token)
    return found


def _probability(logits: Tensor, token: Tensor) -> Tensor:
    """softmax(logits) at token [N] float64."""
    chosen = logits.gather(1, token[:, None])
    # Against the rest of the mass, not against all of it: 1 - p keeps its precision where p rounds to 1 in float32,
    # so that near-certain positions are still ranked.
    rest = logits.scatter_(1, token[:, None], -torch.inf).logsumexp(1)
    logits.scatter_(1, token[:, None], chosen)
    # Not torch.sigmoid, whose last bit depends on where in the tensor an element stands: equal candidates must tie.
    return ((rest.double() - chosen[:, 0].double()).exp() + 1).reciprocal()


def _shown(logits: Tensor, token: Tensor, probability: Tensor, ends_last: Tensor, end_ids: tuple[int, ...]) -> Tensor:
    """The probability [N] that an order sees: without the end tokens where those are to come last."""
    late = ends_last.nonzero()[:, 0]
    if not len(late):
        return probability
    without = logits[late]
    without[:, list(end_ids)] = -torch.inf
    shown = probability.clone()
    shown[late] = _probability(without, token[late])
    return shown
