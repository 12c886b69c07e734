"""Checkpoints, SAEs and engines of models small enough to be made on the spot, in their real layouts.

Heads are 32 wide: vLLM's attention on CPUs has no kernel for narrower ones.
"""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from safetensors.torch import save_file

from steerserve.config import EngineConfig, SaeConfig
from steerserve.engine.admission.catalogue import Catalogue
from steerserve.engine.engine import DiffusionEngine
from steerserve.engine.vllm.arguments import Sources
from steerserve.engine.vllm.client import start
from steerserve.engine.vllm.engine import VllmEngine
from steerserve.models import DiffusionLM, load_model, open_checkpoint
from steerserve.models.families.dream import DreamDiffusionLM
from steerserve.models.families.llada import LladaDiffusionLM
from steerserve.saes import load_saes
from steerserve.steering.attribute import Attribute, AttributeSite
from tests import tiny

HIDDEN = 64
ROWS = 16
SIZES: dict[str, Any] = {
    "llada": {"d_model": HIDDEN, "n_heads": 2, "mlp_hidden_size": 96},
    "dream": {"hidden_size": HIDDEN, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32},
}


def write_model(folder: Path, family: str, **changes: Any) -> Path:
    """A folder with config.json, weights and tokenizer of a LLaDA or a Dream of random weights."""
    folder.mkdir(parents=True)
    model: DiffusionLM
    model = tiny.llada(**SIZES[family] | changes) if family == "llada" else tiny.dream(**SIZES[family] | changes)
    assert isinstance(model, LladaDiffusionLM | DreamDiffusionLM)
    state = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    kind = "llada" if family == "llada" else "Dream"
    (folder / "config.json").write_text(json.dumps({"model_type": kind, **asdict(model.config)}))
    save_file(state, folder / "model.safetensors")
    tiny.tokenizer().save(str(folder / "tokenizer.json"))
    return folder


def write_saes(folder: Path) -> Path:
    """SAEs of random weights in SAELens' layout: one at layer 1, and a pair at layer 2."""
    for layer, policy, seed in ((1, "mask", 1), (2, "mask", 2), (2, "visible", 3)):
        generator = torch.Generator().manual_seed(100 + seed)
        made = folder / f"layer-{layer}-{policy}"
        made.mkdir(parents=True)
        rows = torch.nn.functional.normalize(torch.randn(tiny.FEATURES, HIDDEN, generator=generator), dim=1)
        tensors = {
            "W_enc": rows.T.contiguous(),
            "W_dec": rows,
            "b_enc": torch.zeros(tiny.FEATURES),
            "b_dec": torch.zeros(HIDDEN),
        }
        save_file(tensors, made / "sae_weights.safetensors")
        metadata = {"hook_name": f"blocks.{layer}.hook_resid_post", "policy": policy, "residual_norm": 5.0 + layer}
        config = {"architecture": "topk", "k": 8, "d_in": HIDDEN, "d_sae": tiny.FEATURES, "metadata": metadata}
        (made / "cfg.json").write_text(json.dumps(config))
    return folder


def attribute(name: str, layers: tuple[int, ...], seed: int) -> Attribute:
    """An attribute of random directions, without a profile."""
    generator = torch.Generator().manual_seed(seed)
    return Attribute(
        name=name,
        model_sha256=tiny.MODEL_SHA,
        layers=layers,
        strength=0.6,
        unit="residual",
        scope="masked",
        schedule={"type": "uniform"},
        sites={layer: AttributeSite(5.0 + layer, "", "", ()) for layer in layers},
        directions={
            (layer, kind): tiny.unit(torch.randn(HIDDEN, generator=generator))
            for layer in layers
            for kind in ("sae", "diff_means")
        },
        profile=None,
        provenance={},
    )


def catalogue(model: DiffusionLM, saes: Path) -> Catalogue:
    """The SAEs of `write_saes`, and two attributes."""
    attributes = [attribute("topic/sports", (1,), 1), attribute("register/archaic", (0, 2), 2)]
    norms = {layer: 5.0 + layer for layer in range(model.facts.num_layers)}
    return Catalogue(model.facts, {one.name: one for one in attributes}, load_saes(saes), norms, model.defaults)


def torch_engine(model: Path, saes: Path) -> DiffusionEngine:
    """The reference: the same checkpoint in this process."""
    loaded = load_model(model)
    return DiffusionEngine(loaded, tiny.tokenizer(), catalogue(loaded, saes), EngineConfig(max_rows=ROWS))


def vllm_engine(model: Path, saes: Path, ranks: int = 1, extra: tuple[str, ...] = ()) -> VllmEngine:
    """The same through vLLM, in workers whose sites can be removed; extra options as `--vllm-arg` takes them."""
    shell = open_checkpoint(model).shell
    config = EngineConfig(max_rows=ROWS)
    sources = Sources(model, saes, SaeConfig())
    with patch("steerserve.engine.vllm.arguments.WORKER", "tests.vllm.siteless.RobbedWorker"):
        workers = start(sources, shell, "float32", ROWS, config.max_canvas, ranks, extra)
    return VllmEngine(shell, tiny.tokenizer(), catalogue(shell, saes), config, workers)
