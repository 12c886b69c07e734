"""Diffusion language models: one family a file, loaded strictly from safetensors."""

from steerserve.models.base import DiffusionLM, ModelFacts, SamplerDefaults, Sites
from steerserve.models.loading import (
    FAMILIES,
    load_model,
    load_tokenizer,
    read_config,
    read_sampler_defaults,
    weights_sha256,
)

__all__ = [
    "FAMILIES",
    "DiffusionLM",
    "ModelFacts",
    "SamplerDefaults",
    "Sites",
    "load_model",
    "load_tokenizer",
    "read_config",
    "read_sampler_defaults",
    "weights_sha256",
]
