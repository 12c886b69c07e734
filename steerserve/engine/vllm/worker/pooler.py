"""The pooler: instead of states it returns what the orders need to know of each row's masked positions."""

from typing import TYPE_CHECKING

from torch import Tensor
from vllm.model_executor.layers.pooler.abstract import Pooler

from steerserve.engine.vllm.task import TASK
from steerserve.models import DiffusionLM

if TYPE_CHECKING:
    from collections.abc import Set

    from vllm.tasks import PoolingTask
    from vllm.v1.pool.metadata import PoolingMetadata

    from steerserve.engine.vllm.worker.step import WorkerStep

POOLING_TASK = "token_embed"
"""The task of vLLM's that stands for a denoising step: one result of any length a request."""


class StepPooler(Pooler):
    """Draws the candidates of the step that has just run."""

    def __init__(self, model: DiffusionLM) -> None:
        super().__init__()
        self.model = model
        self.step: WorkerStep | None = None
        """The rows of the forward pass before."""

    def get_supported_tasks(self) -> "Set[PoolingTask]":
        """Tasks of vLLM's `Pooler` that this one does."""
        return {POOLING_TASK}

    def forward(self, hidden_states: Tensor, pooling_metadata: "PoolingMetadata") -> list[Tensor]:
        """One packed reply a request; requests without a task are vLLM's own trial runs."""
        given = [params.extra_kwargs or {} for params in pooling_metadata.pooling_params]
        step, self.step = self.step, None
        if not any(TASK in one for one in given):
            return [hidden_states.new_zeros(1) for _ in given]
        if step is None or len(step.tasks) != len(given) or pooling_metadata.get_pooling_cursor().is_partial_prefill():
            raise RuntimeError("the rows of this step did not run whole and together: steering was not applied")
        return step.replies(self.model, hidden_states)
