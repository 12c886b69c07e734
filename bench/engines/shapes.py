"""The models that are measured: the bundled one, and published shapes with random weights made in memory."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models

from bench.engines.forwards import Forward, forward_of
from bench.shapes import DREAM, LLADA
from steerserve.config import EngineConfig
from steerserve.engine.admission.catalogue import Catalogue
from steerserve.engine.engine import DiffusionEngine
from steerserve.models import DiffusionLM
from steerserve.models.families.dream import DreamDiffusionLM
from steerserve.models.families.llada import LladaDiffusionLM
from steerserve.models.families.mdlm import MdlmDiffusionLM
from steerserve.numerics import round_rows_alike
from steerserve.runtime.load import load_runtime

MDLM: dict[str, Any] = {
    "vocab_size": 50258, "model_length": 2048, "hidden_dim": 768, "cond_dim": 128, "n_blocks": 12, "n_heads": 12,
}  # fmt: skip
"""mdlm-owt, but for a longer context."""
SMALL_DREAM = DREAM | {
    "vocab_size": 50258, "hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12,
    "num_key_value_heads": 4, "intermediate_size": 2048, "max_position_embeddings": 2048, "mask_token_id": 50257,
    "eos_token_id": 50256, "pad_token_id": 50256,
}  # fmt: skip
"""Dream's architecture at the size of MDLM's."""
RANDOM: dict[str, tuple[type[Any], dict[str, Any]]] = {
    "mdlm-124m": (MdlmDiffusionLM, MDLM),
    "dream-124m": (DreamDiffusionLM, SMALL_DREAM),
    "llada-8b": (LladaDiffusionLM, LLADA),
    "dream-7b": (DreamDiffusionLM, DREAM),
}
CPU_SHAPES = ("bundled", "mdlm-124m", "dream-124m")
LOOPS = {
    "bundled": ("llada", "llada-hot", "mdlm"),
    "mdlm-124m": ("llada", "llada-hot", "mdlm"),
    "dream-124m": ("dream-entropy", "dream-origin"),
    "llada-8b": ("llada",),
    "dream-7b": ("dream-entropy",),
}
"""The published loops that a shape is run with."""


@dataclass(frozen=True)
class Subject:
    """A model, the engine over it, and the forward that the published loops run on its weights."""

    name: str
    engine: DiffusionEngine
    forward: Forward
    length: int
    """Longest canvas of the comparison."""
    attributes: tuple[str, ...]
    saes: tuple[str, ...]
    weights: int
    """Weights of its matrices, the head left out: each is a multiplication a token."""


def subject(name: str, rows: int, device: str) -> Subject:
    """The shape of that name; an engine of so many rows at once."""
    config = EngineConfig(max_rows=rows, max_queue=4 * rows)
    if name == "bundled":
        runtime = load_runtime(None, None, None, config)
        catalogue = runtime.engine.catalogue
        return _subject(name, runtime.engine, 128, tuple(catalogue.attributes), tuple(catalogue.saes))
    round_rows_alike()
    family, raw = RANDOM[name]
    with torch.device("meta"):
        empty: DiffusionLM = family.from_config(raw)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    model = empty.to_empty(device=device).to(dtype).eval().requires_grad_(False)
    generator = torch.Generator(device).manual_seed(0)
    for path, parameter in model.named_parameters():
        parameter.normal_(0.0, 0.02, generator=generator)
        if parameter.ndim == 1 and path.endswith("weight"):
            parameter.add_(1.0)
    facts = model.facts
    special = {"[MASK]": facts.mask_id, "[EOS]": facts.eos_id, "[UNK]": 0}
    tokenizer = Tokenizer(models.WordLevel(special, unk_token="[UNK]"))
    norms = dict.fromkeys(range(facts.num_layers), 1.0)
    engine = DiffusionEngine(model, tokenizer, Catalogue(facts, {}, {}, norms, model.defaults), config)
    return _subject(name, engine, 192 if Path(name).name.endswith("b") else 128, (), ())


def _subject(
    name: str, engine: DiffusionEngine, length: int, attributes: tuple[str, ...], saes: tuple[str, ...]
) -> Subject:
    model = engine.model
    matrices = [p for path, p in model.named_parameters() if p.ndim == 2 and not _of_vocabulary(path)]
    return Subject(name, engine, forward_of(model), length, attributes, saes, sum(p.numel() for p in matrices))


def _of_vocabulary(path: str) -> bool:
    words = ("embed", "wte", "lm_head", "output_layer.linear", "transformer.ff_out", "cls.")
    return any(word in path for word in words)
