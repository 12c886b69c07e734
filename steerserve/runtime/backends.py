"""The engine that a server is started with: the torch engine, or the vLLM engine where vLLM is installed."""

import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from steerserve.config import BackendConfig, EngineConfig, ModelConfig, SaeConfig
from steerserve.engine.admission.catalogue import Catalogue
from steerserve.engine.vllm.engine import REFUSED, VllmEngine, first_logits
from steerserve.errors import ArtifactError
from steerserve.models import OpenedModel
from steerserve.models.checkpoint.placement import type_name
from steerserve.runtime.self_test import check_steering


@dataclass(frozen=True)
class Folders:
    """Folders of a model and its SAEs."""

    model: Path
    saes: Path | None


def check_backend(backend: BackendConfig, model_config: ModelConfig) -> None:
    """Raise ArtifactError for vLLM where it is not installed, and for a device that is not its own choice."""
    if backend.engine != "vllm":
        return
    if importlib.util.find_spec("vllm") is None:
        raise ArtifactError("--engine vllm: vLLM is not installed; docs/vllm.md says how it is, beside steerserve")
    if model_config.device != "auto":
        raise ArtifactError(f"--device {model_config.device}: with --engine vllm the device is vLLM's own choice")


def check_graphs(config: EngineConfig, backend: BackendConfig, device: torch.device) -> None:
    """Raise ArtifactError for CUDA graphs without a CUDA device, and for those of ours where vLLM has its own."""
    if not config.cuda_graphs:
        return
    if backend.engine == "vllm":
        raise ArtifactError("--cuda-graphs: with --engine vllm CUDA graphs are vLLM's own")
    if device.type != "cuda":
        raise ArtifactError(f"--cuda-graphs: needs a CUDA device, the model is on {device}")


def backend_facts(backend: BackendConfig) -> dict[str, Any]:
    """Facts of the backend for `/capabilities` beside those of every engine."""
    if backend.engine != "vllm":
        return {}
    return {
        "engine": "vllm",
        "device": "vllm",
        "tensor_parallel_size": backend.tensor_parallel_size,
        "limits": ["max_predicted_kl", "max_delta"],
        "refused": dict(REFUSED),
    }


def vllm_engine(
    opened: OpenedModel,
    catalogue: Catalogue,
    config: EngineConfig,
    backend: BackendConfig,
    folders: Folders,
    sae_config: SaeConfig,
) -> VllmEngine:
    """Start vLLM with a model and test that steering takes in it; raises ArtifactError or SelfTestError."""
    from steerserve.engine.vllm.arguments import Sources
    from steerserve.engine.vllm.client import start

    shell = opened.checkpoint.shell
    sources = Sources(folders.model, folders.saes, sae_config)
    workers = start(
        sources,
        shell,
        type_name(opened.dtype),
        config.max_rows,
        config.max_canvas,
        backend.tensor_parallel_size,
        backend.vllm_arg,
    )
    engine = VllmEngine(shell, opened.tokenizer, catalogue, config, workers)
    try:
        check_steering(engine, first_logits)
    except BaseException:
        engine.close()
        raise
    return engine
