"""A model folder as its configuration wants it: found whole, pinned and placed, before any weight is loaded."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer

from steerserve.config import ModelConfig
from steerserve.errors import ArtifactError
from steerserve.models.base import DiffusionLM, ModelFacts, SamplerDefaults
from steerserve.models.checkpoint.available_memory import available_bytes, check_room
from steerserve.models.checkpoint.generation_config import FILE, read_sampler_defaults, unused_settings
from steerserve.models.checkpoint.loading import Checkpoint, open_checkpoint
from steerserve.models.checkpoint.placement import choose_device, choose_dtype
from steerserve.models.checkpoint.weights import weights_sha256
from steerserve.models.text.chat import ChatTemplate, find_chat_template
from steerserve.models.text.tokenizer import open_tokenizer


@dataclass(frozen=True)
class OpenedModel:
    """Everything of a model folder but the weights in memory."""

    checkpoint: Checkpoint
    tokenizer: Tokenizer
    chat: ChatTemplate | None
    defaults: SamplerDefaults
    sha256: str
    device: torch.device
    dtype: torch.dtype
    unused: Mapping[str, Any]
    """Settings of its `generation_config.json` that no sampler of ours follows."""

    @property
    def facts(self) -> ModelFacts:
        """Facts of the model."""
        return self.checkpoint.facts

    def load(self, name: str, say: Callable[[str], None] | None = None, others: int = 0) -> DiffusionLM:
        """The model, once it is sure to fit; raises ArtifactError where it does not.

        `say` is told, a line at a time, how the weights were read and what memory they take; others: bytes that are to
        be placed beside them.
        """
        room = check_room(name, self.checkpoint.parameters, self.dtype, others, available_bytes(self.device))
        unused = [f"{name} {value!r} of {FILE} is not followed" for name, value in self.unused.items()]
        notes = (*unused, *self.checkpoint.weights.notes, *self.checkpoint.weights.keep_converted())
        for line in (*notes, room):
            if say is not None:
                say(line)
        return self.checkpoint.load(self.dtype, self.device)


def open_model(folder: Path, config: ModelConfig) -> OpenedModel:
    """Open a model folder; raises ArtifactError naming what is wrong with it, or that it is not the one pinned."""
    device = choose_device(config.device)
    # A pin is of the files as published: a conversion beside them could hold anything.
    checkpoint = open_checkpoint(folder, config.sha256 is not None, config.denoiser, config.tokenizer)
    place = config.tokenizer or folder
    tokenizer, theirs = open_tokenizer(place, checkpoint.facts.family)
    if tokenizer.get_vocab_size() > checkpoint.facts.vocab_size:
        raise ArtifactError(
            f"{place}: the tokenizer has {tokenizer.get_vocab_size()} tokens, the model {checkpoint.facts.vocab_size}"
        )
    chat = find_chat_template(place, theirs, checkpoint.shell.template)
    defaults = read_sampler_defaults(folder, checkpoint.shell.defaults)
    # Nor does what is remembered of them do for it.
    sha256 = weights_sha256(folder, anew=config.sha256 is not None)
    if config.sha256 is not None and config.sha256.lower() != sha256:
        raise ArtifactError(f"{folder}: the weights have the sha256 {sha256}, not {config.sha256} as pinned")
    dtype = choose_dtype(config.dtype, device, checkpoint.dtype)
    return OpenedModel(checkpoint, tokenizer, chat, defaults, sha256, device, dtype, unused_settings(folder))
