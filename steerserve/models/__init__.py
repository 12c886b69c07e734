"""Diffusion language models: one family a file, loaded strictly from a folder."""

from steerserve.models.base import DiffusionLM, ModelFacts, SamplerDefaults, Sites
from steerserve.models.checkpoint.config import read_config
from steerserve.models.checkpoint.generation_config import read_sampler_defaults
from steerserve.models.checkpoint.loading import Checkpoint, load_model, open_checkpoint
from steerserve.models.checkpoint.weights import weights_sha256
from steerserve.models.families import FAMILIES
from steerserve.models.loader import OpenedModel, open_model
from steerserve.models.text.chat import ChatTemplate, find_chat_template
from steerserve.models.text.tokenizer import load_tokenizer, open_tokenizer

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
