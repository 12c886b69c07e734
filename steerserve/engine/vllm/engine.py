"""The vLLM engine: step-level batching of denoising rows whose forward passes vLLM makes."""

from dataclasses import replace
from typing import Final

import torch
from tokenizers import Tokenizer
from torch import Tensor

from steerserve.config import EngineConfig
from steerserve.engine.admission.catalogue import Catalogue
from steerserve.engine.api.params import GenerationParams
from steerserve.engine.engine import DiffusionEngine
from steerserve.engine.request.request import Request
from steerserve.engine.vllm.runner import vllm_batches
from steerserve.engine.vllm.workers import Workers
from steerserve.errors import RequestError
from steerserve.models import DiffusionLM

PROBED: Final = 64
"""Likeliest tokens whose log-probabilities the self-test compares."""
MEASURED: Final = "limits.max_kl"
REFUSED: Final = {
    "cache": "reuse of keys and values: every step makes its canvases anew",
    "measure_kl": "measurement of the KL: vLLM may run a row and its twin without pushes in different steps",
    MEASURED: "measurement of the KL; limits.max_predicted_kl holds the predicted one, of calibrated attributes",
    "refine": "refinement of finished texts: to judge them it would have to read them",
    "verdicts": "reading of finished texts: the model's layers are vLLM's",
    "quality": "reading of finished texts: the model's layers are vLLM's",
    "cfg_scale": "guidance by the prompt: vLLM may run a row and its twin without the prompt in different steps",
}
"""What requests may not ask for, and why."""


class VllmEngine(DiffusionEngine):
    """The diffusion engine with a `VllmRunner`, less what that cannot do."""

    def __init__(
        self, shell: DiffusionLM, tokenizer: Tokenizer, catalogue: Catalogue, config: EngineConfig, workers: Workers
    ) -> None:
        """shell: the model without its weights, which are vLLM's to load."""
        known: set[str] = set()
        super().__init__(
            shell,
            tokenizer,
            catalogue,
            config,
            lambda requests: vllm_batches(requests, shell.facts, workers, known),
        )
        self.device, self.dtype = torch.device("cpu"), torch.float32
        # What is free here says nothing of the workers' memory, which vLLM sets aside when it starts.
        self.batcher.limits = replace(self.batcher.limits, bytes=config.max_batch_bytes)
        self.workers = workers

    def admit(self, params: GenerationParams) -> Request:
        """Check params and resolve every name; raises RequestError also for what this engine cannot do."""
        if params.prompt_logprobs:
            raise RequestError(
                "leave out echo or logprobs: the vLLM engine has no log-probabilities of prompts, since its workers "
                "tell of the positions alone that are drawn",
                "prompt_logprobs",
            )
        for name, reason in REFUSED.items():
            given = params.limits and params.limits.max_kl if name == MEASURED else getattr(params, name)
            if given:
                said = f"{name} must be left out here, got {given!r}: the vLLM engine has no {reason}"
                raise RequestError(said, name)
        if params.trace is not None and params.trace.positions and params.trace.features:
            raise RequestError(
                "trace.positions goes with attributes only here: the vLLM engine has the states of single positions as "
                "they arrive at a layer, and features are read after the pushes",
                "trace.positions",
            )
        request = super().admit(params)
        if request.transfer.edits:
            raise RequestError(
                "this transfer replaces committed tokens, of which vLLM's workers tell nothing: use threshold",
                "transfer",
            )
        return request

    def close(self) -> None:
        """Release the model, and end the workers."""
        super().close()
        self.workers.close()


def first_logits(engine: DiffusionEngine, rows: list[GenerationParams]) -> Tensor:
    """Log-probabilities [rows, masked positions, K] of the likeliest tokens at the first step of a batch; for
    `steerserve.runtime.self_test.check_steering`."""
    assert isinstance(engine, VllmEngine)
    facts = engine.model.facts
    count = min(PROBED, facts.vocab_size - len(facts.forbidden_ids) - 1)
    asked = [engine.admit(replace(one, logprobs=True, top_logprobs=count)) for one in rows]
    [(batch, runner)] = engine.batches_of(asked)
    row, position = batch.candidates()
    runner.begin()
    values: Tensor = runner.run(row, position).alternatives(row, position, count)[1]
    return values.reshape(len(rows), -1, count)
