"""What the SAEs beside a vLLM engine have to tell; the states of a text come from vLLM's workers."""

from collections.abc import Mapping

from torch import Tensor

from steerserve.engine.features import LoadedFeatures
from steerserve.engine.vllm.engine import VllmEngine
from steerserve.engine.vllm.reply import unpack
from steerserve.engine.vllm.task import RowTask, to_parameters
from steerserve.saes.feature_store import FeatureStore


class FarFeatures(LoadedFeatures):
    """Features of the SAEs of a vLLM engine."""

    def __init__(
        self,
        engine: VllmEngine,
        labels: Mapping[str, Mapping[int, str]] | None = None,
        stores: Mapping[str, FeatureStore] | None = None,
    ) -> None:
        super().__init__(engine, labels, stores)
        self._workers = engine.workers

    def _outputs(self, canvas: Tensor, sigma: Tensor | None, layer: int) -> Tensor:  # noqa: ARG002 (no family has any)
        tokens: list[int] = canvas[0].tolist()
        task = RowTask.reading(layer, len(tokens))
        [data] = self._workers.run([(tokens, to_parameters(task, {}, ()))])
        states: Tensor = unpack(data, task).states.float()
        return states
