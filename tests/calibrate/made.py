"""Labelled texts and SAEs for the tiny model: everything a calibration reads."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from steerserve.calibrate.recipe import CalibrationRecipe
from steerserve.models import weights_sha256
from tests.conftest import SENTENCES

HIDDEN, FEATURES = 32, 48
TASKS: list[dict[str, Any]] = [
    {"name": "who/king", "file": "who", "field": "who", "target": "king", "contrast": ["team", "crew"]},
    {"name": "who/crew", "file": "who", "field": "who", "target": "crew", "contrast": ["team", "king"]},
    {"name": "deed/won", "file": "who", "field": "deed", "target": "won", "contrast": "lost", "confidence": 0.6},
]
SMALL: dict[str, Any] = {
    "texts": 20,
    "candidates": 20,
    "kept": 8,
    "steering": 4,
    "p_value": 0.9,
    "judge_texts": 60,
    "samples": 5,
    "sample_tokens": 12,
    "sample_steps": 12,
    "slices": 64,
    "min_confident": 2,
    "strengths": (0.2, 0.6, 1.2),
    "search_texts": 2,
    "confirm_texts": 3,
    "trial_tokens": 8,
    "trial_steps": 4,
    "quality_masks": 2,
}


def make_data(folder: Path) -> Path:
    """SENTENCES with who did what as labels, twice in other words, so that every split has some of every label."""
    folder.mkdir(parents=True)
    rows = []
    for sentence in SENTENCES:
        words = sentence.split()
        for text in (sentence, f"then {sentence}", f"{sentence} nobody saw it"):
            rows.append({"text": text, "who": words[1], "deed": next(w for w in words[2:] if w != "man")})
    (folder / "who.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    return folder


def make_saes(folder: Path, model: Path) -> Path:
    """SAEs of random weights in SAELens' layout: two for masked positions and one for visible ones."""
    for layer, policy in ((0, "mask"), (1, "mask"), (1, "visible")):
        generator = torch.Generator().manual_seed(layer)
        made = folder / f"layer-{layer}-{policy}"
        made.mkdir(parents=True)
        rows = torch.randn(FEATURES, HIDDEN, generator=generator)
        rows = rows / rows.norm(dim=1, keepdim=True)
        tensors = {
            "W_enc": rows.T.contiguous(),
            "W_dec": rows,
            "b_enc": torch.zeros(FEATURES),
            "b_dec": torch.zeros(HIDDEN),
        }
        save_file(tensors, made / "sae_weights.safetensors")
        metadata = {
            "hook_name": f"blocks.{layer}.hook_resid_post",
            "policy": policy,
            "model_sha256": weights_sha256(model),
        }
        config = {"architecture": "topk", "k": 8, "d_in": HIDDEN, "d_sae": FEATURES, "metadata": metadata}
        (made / "cfg.json").write_text(json.dumps(config))
    return folder


def make_recipe(folder: Path, **changes: Any) -> CalibrationRecipe:
    """The smallest recipe that goes through every step."""
    path = folder / "tasks.json"
    path.write_text(json.dumps(TASKS))
    return CalibrationRecipe(**({"tasks": path} | SMALL | changes))
