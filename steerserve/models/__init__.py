"""Diffusion language models: one family a file, loaded strictly from a folder."""

from steerserve.models.base import DiffusionLM, ModelFacts, SamplerDefaults, Sites
from steerserve.models.chat import ChatTemplate, find_chat_template
from steerserve.models.defaults import read_sampler_defaults
from steerserve.models.folder import FAMILIES, read_config
from steerserve.models.loading import Checkpoint, load_model, open_checkpoint
from steerserve.models.opened import OpenedModel, open_model
from steerserve.models.tokenizer import load_tokenizer, open_tokenizer
from steerserve.models.weights import weights_sha256

__all__ = [
    "FAMILIES",
    "Checkpoint",
    "ChatTemplate",
    "DiffusionLM",
    "ModelFacts",
    "OpenedModel",
    "SamplerDefaults",
    "Sites",
    "find_chat_template",
    "load_model",
    "load_tokenizer",
    "open_checkpoint",
    "open_model",
    "open_tokenizer",
    "read_config",
    "read_sampler_defaults",
    "weights_sha256",
]
