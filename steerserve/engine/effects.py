"""What a steering does to the predictions on a text: the change of log-probabilities at its masked positions."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor

from steerserve.engine.api.base import EffectQuery
from steerserve.engine.api.events import Failed
from steerserve.engine.api.params import GenerationParams
from steerserve.engine.engine import DiffusionEngine
from steerserve.engine.features import noised_text
from steerserve.engine.feedback.unapplied import missed, unapplied
from steerserve.engine.forward.batch import Batch
from steerserve.engine.request.request import Request
from steerserve.engine.runners.packed import PackedRunner
from steerserve.errors import RequestError

CHUNK: Final = 64
"""Positions whose log-probabilities are in memory at once."""


@dataclass(frozen=True)
class Prepared:
    """A checked text: its tokens, which are masked, and how many are told of each position."""

    tokens: tuple[int, ...]
    masked: tuple[bool, ...]
    k: int


class LoadedEffects:
    """Effects of steering in a torch engine.

    The whole text is a response of which all but the masked positions are committed, so that progress is the share that
    is not masked, and schedules and scopes hold as they do there.
    """

    def __init__(self, engine: DiffusionEngine) -> None:
        self._engine = engine

    def prepare(self, query: EffectQuery) -> tuple[Prepared, GenerationParams]:
        """Check a text and tokenize it, without a forward."""
        ids, masked = noised_text(self._engine, query.text, query.mask_ratio, query.seed)
        if not any(masked):
            raise RequestError("text must have a masked position, by a mask token in it or by mask_ratio", "mask_ratio")
        return Prepared(tuple(ids), tuple(masked), query.k), GenerationParams(max_tokens=len(ids))

    @torch.inference_mode()
    def measure(self, prepared: Prepared, steered: Request, plain: Request) -> dict[str, Any] | Failed:
        """Run one forward of the text steered and not steered, and compare them."""
        _check(steered)
        engine, rows = self._engine, [steered, plain]
        for row in rows:
            for i, (token, hidden) in enumerate(zip(prepared.tokens, prepared.masked, strict=True)):
                row.canvas[row.start + i] = row.mask_id if hidden else token
        batch = Batch(rows, engine.model.facts, engine.device, engine.dtype)
        runner = PackedRunner(batch, engine.model)
        runner.begin()
        gains = [float(runner.gain(one.pushes[0])) if one.pushes else 0.0 for one in steered.interventions]
        states = runner.forward()
        lost = runner.packed.plans.lost()
        runner.count()
        runner.flush()
        failed = missed(rows) | unapplied(batch.forward_rows.requests, lost)
        if failed:
            return next(iter(failed.values()))
        places = [i for i, hides in enumerate(prepared.masked) if hides]
        state = batch.state(torch.tensor(places, device=engine.device) + steered.start)
        data, summed = list[dict[str, Any]](), torch.zeros(engine.model.facts.vocab_size, dtype=torch.float64)
        for first in range(0, len(places), CHUNK):
            at = state[first : first + CHUNK]
            after, before = (self._log_probabilities(states[of, at]) for of in (0, 1))
            change = torch.where(before.isneginf(), 0.0, after - before)
            kl = torch.where(after.isneginf(), 0.0, after.exp() * change).sum(1).clamp(min=0.0)
            summed += change.sum(0)
            for i, place in enumerate(places[first : first + CHUNK]):
                told = self._told(change[i], after[i], prepared.k)
                data.append({"position": place, "kl": float(kl[i]), **told})
        mean = summed / len(places)
        return {
            "progress": steered.progress,
            "gains": gains,
            "mean": {name: self._named(mean, ids) for name, ids in self._ends(mean, prepared.k).items()},
            "data": data,
        }

    def _log_probabilities(self, states: Tensor) -> Tensor:
        """Log-probabilities [N, vocab_size], float64, of what may be drawn at states [N, hidden_size]."""
        model = self._engine.model
        logits = model.head(states).double().cpu()
        logits[:, self._barred] = -torch.inf
        return logits.log_softmax(1)

    @property
    def _barred(self) -> list[int]:
        facts = self._engine.model.facts
        return [*facts.forbidden_ids, *([facts.mask_id] if facts.parameterisation == "score" else [])]

    def _ends(self, change: Tensor, k: int) -> dict[str, list[int]]:
        """The k tokens that rise most and the k that fall most, those of no change left out."""
        most = min(k, len(change))
        return {
            "up": [i for i in change.topk(most).indices.tolist() if change[i] > 0],
            "down": [i for i in (-change).topk(most).indices.tolist() if change[i] < 0],
        }

    def _told(self, change: Tensor, after: Tensor, k: int) -> dict[str, Any]:
        return {
            name: [one | {"logprob": float(after[one["token_id"]])} for one in self._named(change, ids)]
            for name, ids in self._ends(change, k).items()
        }

    def _named(self, change: Tensor, ids: Sequence[int]) -> list[dict[str, Any]]:
        engine = self._engine
        return [
            {
                "token_id": i,
                "token": engine.vocabulary.token_name(i, engine.decode([i])),
                "change": float(change[i]),
            }
            for i in ids
        ]


def _check(steered: Request) -> None:
    """Raise RequestError for what one forward cannot show."""
    for i, one in enumerate(steered.interventions):
        if one.controller is not None:
            raise RequestError(
                "an effect is that of one forward: it has neither conditions nor a closed loop", f"interventions[{i}]"
            )
    if steered.kl_limit is not None:
        raise RequestError("this key limits the measured KL, to which no effect is held", "interventions")
