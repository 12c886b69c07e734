"""The part of a worker that knows which request lies where in the batch, and what each asks for.

Steering travels in each request's own pooling parameters, which the runner holds beside the order of its batch; both
are read at the moment of the forward pass, so that nothing depends on how requests were batched or reordered.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from steerserve.engine.admission.catalogue import Catalogue
from steerserve.engine.vllm.task import TASK, from_parameters
from steerserve.engine.vllm.worker.step import WorkerStep
from steerserve.models import ModelFacts
from steerserve.saes import SparseAutoencoder, load_saes

if TYPE_CHECKING:
    from steerserve.engine.vllm.worker.model import SteeredDiffusionLM


class StepMaker:
    """Makes the step of a batch from the parameters of its requests; keeps directions between steps."""

    def __init__(self, facts: ModelFacts, dtype: torch.dtype, saes: Mapping[str, SparseAutoencoder]) -> None:
        self.facts, self.dtype, self.saes = facts, dtype, saes
        self.pair = Catalogue(facts, {}, saes, {}).pair
        self.directions: dict[str, Tensor] = {}

    def __call__(self, given: Sequence[Mapping[str, Any]], starts: Sequence[int], tokens: Tensor) -> WorkerStep:
        """given [R]: the parameters of each request, in the order of the batch; see `WorkerStep`."""
        tasks = []
        forget: set[str] = set()
        for one in given:
            task, directions, gone = from_parameters(one)
            self.directions |= directions
            forget |= set(gone)
            tasks.append(task)
        step = WorkerStep(tasks, starts, tokens, self.facts, self.dtype, dict(self.directions), self.saes, self.pair)
        for digest in forget:
            self.directions.pop(digest, None)
        return step


class SteeringWorker:
    """vLLM's `worker_extension_cls`: its methods are called on every rank."""

    model_runner: Any

    def steerserve_bind(self) -> None:
        """Let the model know its runner; once, after the weights are loaded."""
        runner = self.model_runner
        model: SteeredDiffusionLM = runner.get_model()
        told = runner.vllm_config.additional_config["steerserve"]
        saes = told["saes"]
        loaded = {} if saes is None else load_saes(Path(saes["folder"]), saes["layers"], saes["k"])
        weight = next(model.parameters())
        make = StepMaker(model.facts, runner.model_config.dtype, {k: v.to(weight.device) for k, v in loaded.items()})

        batch_of = partial(_of_second, runner) if hasattr(runner, "model_state") else partial(_of_first, runner)

        def announced(tokens: Tensor) -> WorkerStep | None:
            given, starts = batch_of()
            return make(given, starts, tokens) if any(TASK in one for one in given) else None

        model.announced = announced


def _of_first(runner: Any) -> tuple[list[Mapping[str, Any]], list[int]]:
    """Parameters and starts of the rows that lie in the batch of a Model Runner V1, as they lie there now."""
    given = [one.extra_kwargs or {} for one in runner.input_batch.get_pooling_params()]
    return given, runner.query_start_loc.np[: len(given) + 1].tolist()


def _of_second(runner: Any) -> tuple[list[Mapping[str, Any]], list[int]]:
    """The same of a Model Runner V2, whose model state was told of them just before."""
    found: tuple[list[Mapping[str, Any]], list[int]] = runner.model_state.take()
    return found
