"""Which tokens a feature promotes: by its decoder row alone, and measured by a push."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from tqdm import tqdm

from steerserve.models.base import DiffusionLM
from steerserve.models.sigma import level_of_share
from steerserve.train.activations import NoisedBatch, final_states
from steerserve.train.sae_quality import decides


class _Replace:
    """A `Sites` that puts other states in the place of the last layer's output."""

    def __init__(self, last: int, states: Tensor) -> None:
        self.last, self.states = last, states

    def __call__(self, layer: int, hidden: Tensor) -> Tensor:
        return self.states.to(hidden)[None] if layer == self.last else hidden


class _Push:
    """A `Sites` that adds a vector a row to one layer's output at chosen positions."""

    def __init__(self, layer: int, chosen: Tensor, vectors: Tensor) -> None:
        self.layer, self.chosen, self.vectors = layer, chosen, vectors

    def __call__(self, layer: int, hidden: Tensor) -> Tensor:
        if layer != self.layer:
            return hidden
        return hidden + self.chosen[..., None].to(hidden) * self.vectors[:, None].to(hidden)


@torch.inference_mode()
def decoder_logits(model: DiffusionLM, rows: Tensor) -> Iterator[tuple[int, Tensor]]:
    """Logits of vectors [n, hidden_size] put through the model's final norm and head, as if they were the last layer's
    output: the index of the first of each part, and its logits [part, vocab_size]."""
    facts, device = model.facts, next(model.parameters()).device
    sigma = None if facts.sigma is None else level_of_share(facts.sigma, torch.ones(1)).to(device)
    for start in range(0, len(rows), facts.max_length):
        part = rows[start : start + facts.max_length]
        canvas = torch.full((1, len(part)), facts.mask_id, device=device)
        final = model(canvas, None, _Replace(facts.num_layers - 1, part), sigma)
        yield start, model.head(final[0]).float()


def promoted_by_decoder(
    model: DiffusionLM, rows: Tensor, count: int, forbidden: Sequence[int]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Tokens whose logits each vector [n, hidden_size] raises and lowers most, measured from the mean over the vectors.

    Returns ids and logits of the raised ones, then of the lowered ones, each [n, count]. The mean is taken away since
    it is of no feature: it says which tokens are frequent.
    """
    total = torch.zeros(model.facts.vocab_size, dtype=torch.float64)
    for _, logits in decoder_logits(model, rows):
        total += logits.double().sum(0).cpu()
    mean = (total / max(1, len(rows))).float()
    parts = [ends(logits.cpu() - mean, count, forbidden) for _, logits in decoder_logits(model, rows)]
    return tuple(torch.cat(column) for column in zip(*parts, strict=True))  # type: ignore[return-value]


def ends(values: Tensor, count: int, forbidden: Sequence[int]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Ids and values of the largest and of the smallest values [n, vocab_size] of each row, forbidden ids left out."""
    values = values.clone()
    values[:, list(forbidden)] = -torch.inf
    up = values.topk(count, dim=1)
    values[:, list(forbidden)] = torch.inf
    down = values.topk(count, dim=1, largest=False)
    return up.indices, up.values, down.indices, down.values


@torch.inference_mode()
def push_effects(
    model: DiffusionLM,
    batch: NoisedBatch,
    chosen: Tensor,
    layer: int,
    size: float,
    batch_tokens: int,
    title: str,
) -> Tensor:
    """How the log-probabilities at masked positions change by a small push along each coordinate of a layer's output.

    The push is added where the tokens chosen [rows, width] are decided; the change is its mean over the masked text
    positions of the batch, divided by the size of the push: row i of the result [hidden_size, vocab_size] is a
    derivative. The effect of a small push along any direction is that direction times the result, so that one
    measurement serves every feature of a layer.
    """
    facts, device = model.facts, next(model.parameters()).device
    asked = batch.chosen("mask")
    at = decides(chosen, facts.shift).to(device)

    def log_probabilities(vectors: Tensor) -> Tensor:
        """Mean over the masked positions [vectors, vocab_size] for vectors [vectors, hidden_size]."""
        many = len(vectors)
        repeated = NoisedBatch(*(value.repeat(many, *[1] * (value.ndim - 1)) for value in vars(batch).values()))
        push = _Push(layer, at.repeat(many, 1), vectors.repeat_interleave(len(batch.tokens), 0))
        final = final_states(model, repeated, push)
        found = [model.head(states[asked.to(device)]).float().log_softmax(-1).mean(0) for states in final.chunk(many)]
        return torch.stack(found).cpu()

    plain = log_probabilities(torch.zeros(1, facts.hidden_size, device=device))
    axes = torch.eye(facts.hidden_size, device=device) * size
    together = max(1, batch_tokens // batch.tokens.numel())
    found = [
        log_probabilities(axes[start : start + together]) - plain
        for start in tqdm(range(0, len(axes), together), desc=title, unit="push", leave=False)
    ]
    return torch.cat(found) / size


def promoted_by_push(
    effects: Tensor, directions: Tensor, size: float, count: int, forbidden: Sequence[int]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Tokens whose log-probability a push of so many hidden units along each direction [n, hidden_size] raises and
    lowers most, to first order: ids and nats of the raised ones, then of the lowered ones, each [n, count]."""
    parts = [ends(part.float() @ effects * size, count, forbidden) for part in torch.split(directions, 256)]
    return tuple(torch.cat(column) for column in zip(*parts, strict=True))  # type: ignore[return-value]


def nearest(rows: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Ids and cosines of the nearest other vectors of each vector [n, hidden_size], each [n, count]."""
    units = torch.nn.functional.normalize(rows.float(), dim=1)
    found_ids, found_values = [], []
    for start in range(0, len(units), 1024):
        cosines = units[start : start + 1024] @ units.T
        own = torch.arange(len(cosines))
        cosines[own, start + own] = -torch.inf
        best = cosines.topk(min(count, len(units) - 1), dim=1)
        found_ids.append(best.indices)
        found_values.append(best.values)
    return torch.cat(found_ids), torch.cat(found_values)
