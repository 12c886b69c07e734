"""Diffusion language models: one family a file, loaded strictly from safetensors."""

from steerserve.models.base import DiffusionLM, ModelFacts, Sites
from steerserve.models.loading import FAMILIES, load_model, load_tokenizer, read_config, weights_sha256

__all__ = [
    "FAMILIES",
    "DiffusionLM",
    "ModelFacts",
    "Sites",
    "load_model",
    "load_tokenizer",
    "read_config",
    "weights_sha256",
]
