"""The channel of steering under Model Runner V2: a model state that remembers what each request asks for.

Written from vLLM 0.32 and 0.33 (`v1/worker/gpu/model_states`); V2 needs a GPU, or a Triton with a CPU backend.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from vllm.v1.worker.gpu.model_states.encoder_only import EncoderOnlyModelState

if TYPE_CHECKING:
    from vllm.v1.core.sched.output import NewRequestData
    from vllm.v1.worker.gpu.input_batch import InputBatch
    from vllm.v1.worker.gpu.states import RequestState


class SteeredModelState(EncoderOnlyModelState):
    """Hands the parameters of the rows of a batch on to the forward pass that it is prepared for."""

    def __init__(self, *given: Any) -> None:
        super().__init__(*given)
        self.parameters: dict[str, Mapping[str, Any]] = {}
        """What each request travels with, by its id."""
        self.batch: tuple[list[Mapping[str, Any]], list[int]] = ([], [])

    def add_request(self, req_index: int, new_req_data: "NewRequestData") -> None:
        """Add a request, and keep the parameters it travels with."""
        super().add_request(req_index, new_req_data)
        params = new_req_data.pooling_params
        self.parameters[new_req_data.req_id] = (params.extra_kwargs if params is not None else None) or {}

    def remove_request(self, req_id: str) -> None:
        """Remove a request and its parameters."""
        super().remove_request(req_id)
        self.parameters.pop(req_id, None)

    def prepare_inputs(self, input_batch: "InputBatch", req_states: "RequestState") -> dict[str, Any]:
        """Prepare the inputs of a forward; rows are in the order in which they lie in the batch."""
        inputs: dict[str, Any] = super().prepare_inputs(input_batch, req_states)
        count = input_batch.num_reqs
        given = [self.parameters.get(name, {}) for name in input_batch.req_ids[:count]]
        self.batch = (given, input_batch.query_start_loc_np[: count + 1].tolist())
        return inputs

    def take(self) -> tuple[list[Mapping[str, Any]], list[int]]:
        """Parameters and starts of the rows last prepared, once: trial runs are not prepared, and find none."""
        found, self.batch = self.batch, ([], [])
        return found
