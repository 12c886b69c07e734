"""The start-up self-test: a known push must move the logits, through the path that serves, and nothing else."""

from collections.abc import Callable
from dataclasses import replace

import torch

from steerserve.engine.api.params import GenerationParams, Intervention, VectorRef
from steerserve.engine.engine import DiffusionEngine
from steerserve.engine.forward.batch import Batch
from steerserve.engine.runners.packed import PackedRunner
from steerserve.errors import SelfTestError

Measure = Callable[[DiffusionEngine, list[GenerationParams]], torch.Tensor]


@torch.inference_mode()
def check_steering(engine: DiffusionEngine, measure: Measure | None = None) -> None:
    """Push a random direction at each layer in the second of two equal rows; raises SelfTestError naming the layer.

    The pushed row's logits must change, and its neighbour's must be those of a batch without steering, bit for bit.
    measure: logits [rows, ...] of the first step of a batch, where the engine does not have them at hand.
    """
    logits_of = _logits if measure is None else measure
    facts = engine.model.facts
    start = 0 if facts.bos_id is None else 1
    length = max(1, min(8, facts.max_length - start, engine.config.max_canvas - start))
    plain = GenerationParams(max_tokens=length, steps=1)
    direction = torch.randn(facts.hidden_size, generator=torch.Generator().manual_seed(0))
    reference = logits_of(engine, [plain, plain])
    if not bool(torch.isfinite(reference).all()):
        raise SelfTestError("the model's logits are not finite")
    for layer in range(facts.num_layers):
        push = Intervention(
            vector=VectorRef(layer, tuple(direction.tolist())),
            strength=engine.catalogue.residual_norms.get(layer, 1.0),
            unit="raw",
            scope="all",
        )
        logits = logits_of(engine, [plain, replace(plain, interventions=(push,))])
        if not torch.equal(logits[0], reference[0]):
            raise SelfTestError(f"a push at layer {layer} changed the row beside it")
        if not bool((logits[1] - reference[1]).abs().max() > 1e-4 * reference[1].abs().max()):
            raise SelfTestError(
                f"a push at layer {layer} did not move the logits: steering does not take on this model"
            )


def _logits(engine: DiffusionEngine, rows: list[GenerationParams]) -> torch.Tensor:
    """Logits [rows, masked positions, vocabulary] of the first step of a batch."""
    batch = Batch([engine.admit(params) for params in rows], engine.model.facts, engine.device, engine.dtype)
    row, position = batch.candidates()
    runner = PackedRunner(batch, engine.model)
    runner.begin()
    hidden = runner.forward()
    logits: torch.Tensor = engine.model.head(hidden[row, batch.state(position)])
    return logits.float().reshape(len(rows), -1, logits.shape[1])
