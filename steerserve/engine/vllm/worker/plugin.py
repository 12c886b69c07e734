"""The `vllm.general_plugins` entry point: it makes our model known to every process of vLLM."""

from steerserve.engine.vllm.checkpoint import ARCHITECTURE


def register() -> None:
    """Register the model; vLLM may call this any number of times."""
    from vllm import ModelRegistry

    if ARCHITECTURE not in ModelRegistry.get_supported_archs():
        ModelRegistry.register_model(ARCHITECTURE, "steerserve.engine.vllm.worker.model:SteeredDiffusionLM")
