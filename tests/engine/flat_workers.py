"""The workers' side of the vLLM engine in this process: the same steps and replies, around a model in plain torch."""

from collections.abc import Mapping, Sequence
from random import Random
from typing import Any

import torch
from torch import Tensor

from steerserve.engine.vllm.worker.steering_worker import StepMaker
from steerserve.models import DiffusionLM
from steerserve.saes import SparseAutoencoder


class FlatWorkers:
    """Lays the rows of a step end to end in an order of its own, and in several batches, as a scheduler may."""

    def __init__(self, model: DiffusionLM, saes: Mapping[str, SparseAutoencoder], seed: int | None = None) -> None:
        """seed: of the order and the batches; None keeps all rows in one batch and in theirs."""
        self.model = model
        self.make = StepMaker(model.facts, torch.float32, saes)
        self.random = None if seed is None else Random(seed)
        self.closed = False

    @torch.inference_mode()
    def run(self, rows: Sequence[tuple[list[int], dict[str, Any]]]) -> list[Tensor]:
        """See `Workers.run`."""
        places = list(range(len(rows)))
        cut = len(rows)
        if self.random is not None:
            self.random.shuffle(places)
            cut = self.random.randint(1, len(rows))
        found: dict[int, Tensor] = {}
        for part in (places[:cut], places[cut:]):
            if part:
                found |= dict(zip(part, self._batch([rows[place] for place in part]), strict=True))
        return [found[place] for place in range(len(rows))]

    def close(self) -> None:
        """See `Workers.close`."""
        self.closed = True

    def _batch(self, rows: Sequence[tuple[list[int], dict[str, Any]]]) -> list[Tensor]:
        lengths = torch.tensor([len(canvas) for canvas, _ in rows])
        width = -(-int(lengths.max()) // 16) * 16
        tokens = torch.tensor([canvas + [0] * (width - len(canvas)) for canvas, _ in rows])
        inside = torch.arange(width) < lengths[:, None]
        starts = [0, *lengths.cumsum(0).tolist()]
        step = self.make([given for _, given in rows], starts, tokens[inside])

        def sites(layer: int, hidden: Tensor) -> Tensor:
            changed = hidden.clone()
            changed[inside] = step(layer, hidden[inside])
            return changed

        hidden = self.model(tokens, lengths, sites)
        return step.replies(self.model, hidden[inside])
