"""Load a checkpoint folder strictly: every tensor of the family and no other, each in its shape."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from steerserve.errors import ArtifactError
from steerserve.models.base import DiffusionLM, ModelFacts
from steerserve.models.checkpoint.config import read_config, read_tokens, token_ids
from steerserve.models.checkpoint.generation_config import FILE, read_generation_config
from steerserve.models.checkpoint.weights import Weights, read_weights
from steerserve.models.families import Family, family_of
from steerserve.models.families.bert import BertDiffusionLM
from steerserve.models.families.huggingface import HuggingFaceFamily
from steerserve.models.families.llada2 import TURN_END, Llada2DiffusionLM
from steerserve.models.families.lladamoe import LladaMoeDiffusionLM
from steerserve.models.state_dict import check_layout
from steerserve.numerics import aligned


@dataclass(frozen=True)
class Checkpoint:
    """A model folder that was found whole, before any weight is read into memory."""

    folder: Path
    shell: DiffusionLM
    """The model without its weights, on the meta device."""
    weights: Weights
    tensors: Mapping[str, Tensor]
    """The model's tensors under its own names, in the type on disk."""

    @property
    def facts(self) -> ModelFacts:
        """Facts of the model."""
        return self.shell.facts

    @property
    def parameters(self) -> int:
        """How many numbers the model has."""
        return sum(tensor.numel() for tensor in self.tensors.values())

    @property
    def dtype(self) -> torch.dtype:
        """The type most of the numbers have on disk."""
        sizes: dict[torch.dtype, int] = {}
        for tensor in self.tensors.values():
            sizes[tensor.dtype] = sizes.get(tensor.dtype, 0) + tensor.numel()
        return max(sizes, key=lambda dtype: sizes[dtype])

    def load(self, dtype: torch.dtype, device: torch.device | str = "cpu") -> DiffusionLM:
        """The model in evaluation mode. On the CPU, tensors that have the type already stay mapped, so that a restart
        reads only what is not in the page cache; float32 ones that do not start on a 64-byte line are copied."""
        placed = {name: aligned(tensor.to(device=device, dtype=dtype)) for name, tensor in self.tensors.items()}
        self.shell.load_state_dict(placed, strict=True, assign=True)
        self.shell.requires_grad_(False)
        return self.shell.eval()


def open_checkpoint(
    folder: Path, originals: bool = False, denoiser: str | None = None, place: Path | None = None
) -> Checkpoint:
    """Find everything of a model folder; raises ArtifactError naming what is missing, unexpected or misshapen.

    originals: see `read_weights`; denoiser: see `family_of`; place: the folder of the tokenizer, where it is another.
    """
    raw = read_config(folder)
    family = family_of(folder, raw, denoiser, partial(read_tokens, place or folder))
    if family in (BertDiffusionLM, Llada2DiffusionLM, LladaMoeDiffusionLM):
        raw = token_ids(folder) | raw
    if family is Llada2DiffusionLM:
        raw = {"turn_end_token_id": read_tokens(place or folder).vocabulary.get(TURN_END)} | raw
    raw, ends = with_one_end(folder, raw)
    try:
        weights = None
        if isinstance(family, HuggingFaceFamily):
            weights = read_weights(folder, originals)
            raw = family.resized(raw, weights.tensors)
        shell = _shell(family, raw, ends)
        # Dream's own loop takes the mask of this file, which would be another token than its model was trained with.
        mask = read_generation_config(folder).get("mask_token_id", shell.facts.mask_id)
        if mask != shell.facts.mask_id:
            raise ArtifactError(f"{FILE}: mask_token_id is {mask!r}, by config.json it is {shell.facts.mask_id}")
        weights = weights or read_weights(folder, originals)
        tensors = shell.adapt(raw, dict(weights.tensors))
    except ArtifactError as error:
        # A family sees only a parsed config: which folder it is from is known here.
        raise error if str(folder) in str(error) else ArtifactError(f"{folder}: {error}") from error
    try:
        check_layout(str(folder), {name: tensor.shape for name, tensor in shell.state_dict().items()}, tensors)
    except ArtifactError as error:
        # A list of tensors does not say it; the key alone may be left from before.
        if not isinstance(quantised := raw.get("quantization_config"), dict):
            raise
        raise ArtifactError(
            f"{folder}: config.json: quantization_config names {quantised.get('quant_method', 'a method')!r}; "
            f"quantised weights are not read, take the checkpoint in bfloat16 or float32. {error}"
        ) from error
    return Checkpoint(folder, shell, weights, tensors)


def load_model(
    folder: Path,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    denoiser: str | None = None,
) -> DiffusionLM:
    """The model of a folder, in evaluation mode; raises ArtifactError as `open_checkpoint` does."""
    checkpoint = open_checkpoint(folder, denoiser=denoiser)
    checkpoint.weights.keep_converted()
    return checkpoint.load(dtype, device)


def with_one_end(folder: Path, raw: dict[str, Any]) -> tuple[dict[str, Any], tuple[int, ...]]:
    """A parsed `config.json` with one `eos_token_id`, and all end tokens that it and `generation_config.json` name.

    Either may list several; the first of `config.json` is the family's end of text.
    """
    found: list[int] = []
    for name, said in (("config.json", raw), (FILE, read_generation_config(folder))):
        value = said.get("eos_token_id")
        ends = value if isinstance(value, list) else [] if value is None else [value]
        if any(isinstance(end, bool) or not isinstance(end, int) for end in ends):
            raise ArtifactError(f"{folder / name}: eos_token_id must be an id or a list of ids, got {value!r}")
        found += ends
    return (raw | {"eos_token_id": found[0]}, tuple(found)) if found else (raw, ())


class Uninitialised(TorchFunctionMode):
    """Leaves the parameters of modules that are made under it as they are allocated.

    A shell's are on `meta` and get no values; drawing them there would import all of torch's compiler, which takes
    longer than to load a small model.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """The function's result, or the tensor that it would have filled."""
        del types
        kwargs = kwargs or {}
        if getattr(func, "__module__", None) == "torch.nn.init":
            return kwargs["tensor"] if "tensor" in kwargs else args[0]
        return func(*args, **kwargs)


def _shell(family: Family, raw: dict[str, Any], ends: tuple[int, ...]) -> DiffusionLM:
    with torch.device("meta"), Uninitialised():
        shell = family.from_config(raw)
    more = tuple(end for end in ends if end not in shell.facts.end_ids)
    shell.facts = replace(shell.facts, more_end_ids=shell.facts.more_end_ids + more)
    _check_ids(shell.facts)
    return shell


def _check_ids(facts: ModelFacts) -> None:
    ids: list[tuple[str, object]] = [("mask", facts.mask_id), ("eos", facts.eos_id)]
    ids += [("bos", facts.bos_id)] if facts.bos_id is not None else []
    ids += [("end of turn", facts.turn_end_id)] if facts.turn_end_id is not None else []
    ids += [("eos", end) for end in facts.more_end_ids]
    for name, token in [*ids, *(("special", token) for token in facts.forbidden_ids)]:
        if isinstance(token, bool) or not isinstance(token, int) or not 0 <= token < facts.vocab_size:
            raise ArtifactError(
                f"config.json, {FILE}: {name} token {token!r} is no id from 0 to {facts.vocab_size - 1}"
            )
