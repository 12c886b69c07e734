"""Workers whose model can be robbed of its sites."""

from typing import Any

from torch import Tensor

from steerserve.engine.vllm.worker.steering_worker import SteeringWorker


class RobbedWorker(SteeringWorker):
    """As it should be, until told to leave the sites out."""

    def remove_sites(self) -> None:
        """Have the layers run without sites from now on."""
        backbone = self.model_runner.get_model().model
        forward = backbone.forward

        def without(tokens: Tensor, positions: Tensor, step: Any) -> Tensor:  # noqa: ARG001
            out: Tensor = forward(tokens, positions, None)
            return out

        backbone.forward = without


class SitelessWorker(RobbedWorker):
    """Without sites from the start."""

    def steerserve_bind(self) -> None:
        """See `SteeringWorker.steerserve_bind`."""
        super().steerserve_bind()
        self.remove_sites()
