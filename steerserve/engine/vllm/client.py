"""vLLM itself, as the engine uses it: started once, then asked for one forward pass over some rows at a time."""

import json
import os
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from torch import Tensor
from vllm import EngineArgs, PoolingParams
from vllm.platforms import current_platform
from vllm.v1.engine.llm_engine import LLMEngine
from vllm.v1.executor import Executor

from steerserve.engine.vllm.arguments import KV_CACHE_BYTES, Sources, core_shares, engine_arguments, parse_extra
from steerserve.engine.vllm.checkpoint import llama_config
from steerserve.engine.vllm.worker.pooler import POOLING_TASK
from steerserve.models import DiffusionLM
from steerserve.models.checkpoint.config import read_config


class VllmClient:
    """A running vLLM with our model in it; see `steerserve.engine.vllm.workers.Workers`."""

    def __init__(self, arguments: Mapping[str, Any], config: Mapping[str, Any]) -> None:
        """arguments: of vLLM's `EngineArgs`; config: what its `config.json` is to be."""
        with tempfile.TemporaryDirectory(prefix="steerserve-vllm-") as folder:
            Path(folder, "config.json").write_text(json.dumps(config), encoding="utf-8")
            config_made = EngineArgs(**arguments, hf_config_path=folder).create_engine_config()
            # The scheduler runs here: a step waits for its forward pass anyway, and a process between would only add
            # to its round trip.
            self._engine = LLMEngine(config_made, Executor.get_class(config_made), log_stats=False)
        self.call("steerserve_bind")
        self._count = 0

    def run(self, rows: Sequence[tuple[list[int], dict[str, Any]]]) -> list[Tensor]:
        """Run one forward of each row and return the packed replies, in order."""
        places = {}
        for place, (tokens, given) in enumerate(rows):
            self._count += 1
            name = str(self._count)
            params = PoolingParams(task=POOLING_TASK, extra_kwargs=given)
            self._engine.add_request(name, {"prompt_token_ids": tokens}, params)
            places[name] = place
        found: dict[int, Tensor] = {}
        while len(found) < len(rows):
            for output in self._engine.step():
                if output.finished:
                    found[places[output.request_id]] = output.outputs.data
        return [found[place] for place in range(len(rows))]

    def call(self, method: str) -> None:
        """Call a method of the worker extension on every rank."""
        self._engine.collective_rpc(method)

    def close(self) -> None:
        """End vLLM's processes."""
        self._engine.engine_core.shutdown()


def start(
    sources: Sources, shell: DiffusionLM, dtype: str, rows: int, canvas: int, ranks: int, extra: Iterable[str] = ()
) -> VllmClient:
    """Start vLLM; see `engine_arguments`. Raises ArtifactError for an extra option that it does not take."""
    own: dict[str, Any] = {}
    if current_platform.is_cpu():
        own["kv_cache_memory_bytes"] = KV_CACHE_BYTES
        if ranks > 1:
            # By itself vLLM gives each rank a NUMA node, and does not start where there are fewer.
            os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", core_shares(ranks, sorted(os.sched_getaffinity(0))))
    chosen = own | parse_extra(extra, [field.name for field in fields(EngineArgs)])
    arguments = engine_arguments(sources, shell.facts, dtype, rows, canvas, ranks, chosen)
    return VllmClient(arguments, llama_config(shell, read_config(sources.model)))
