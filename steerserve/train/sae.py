"""Train SAEs on a diffusion model's hidden states: two policies a layer, all fed by one pass through the model.

Policies after DLM-Scope (arXiv 2602.05859): one SAE for masked positions, one for visible ones. DLM-Scope noised at
ratios 0.05 to 0.50 and so never saw the first denoising steps, where all is masked; here the ratios run to 1.
"""

import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.torch import save_file
from tokenizers import Tokenizer
from torch import Tensor

from steerserve.errors import ArtifactError
from steerserve.models.base import DiffusionLM
from steerserve.saes.reading import STATS, load_sae
from steerserve.saes.sae import Policy
from steerserve.train.activations import NoisedBatch, Store, gather, noised_batches
from steerserve.train.dlm import Documents
from steerserve.train.sae_fit import SaeRecipe, fit, halve
from steerserve.train.sae_quality import evaluate_sae, reconstruction

__all__ = ["SaeRecipe", "evaluate_sae", "train_saes"]

CARD = "card.json"
SCRATCH = ".activations"
"""Folder of gathered states inside the output folder; removed when the last SAE is saved."""


def train_saes(
    model: DiffusionLM,
    tokenizer: Tokenizer,
    data: Path,
    out: Path,
    layers: Sequence[int],
    recipe: SaeRecipe,
    model_sha256: str,
) -> dict[str, dict[str, Any]]:
    """Train one SAE per layer and policy into `out/layer-<l>-<policy>`; returns their cards by folder name.

    Folders already finished are kept, so a run that was stopped goes on where it was; one made by another recipe or
    from another model is an ArtifactError.
    """
    if wrong := [layer for layer in layers if not 0 <= layer < model.facts.num_layers]:
        raise ArtifactError(f"layers: {wrong}, but the model has layers 0 to {model.facts.num_layers - 1}")
    every = [(layer, policy) for layer in layers for policy in recipe.policies]
    origin = {"model_sha256": model_sha256, "recipe": json.loads(json.dumps(asdict(recipe)))}
    cards = {name: card for name in map(folder_name, every) if (card := _finished(out / name, origin)) is not None}
    wanted = [key for key in every if folder_name(key) not in cards]
    if wanted:
        scratch = out / SCRATCH
        stores = _training_states(model, tokenizer, data, scratch, wanted, recipe, origin)
        documents = _documents(model, tokenizer, data, recipe, held_out=True)

        def noised(seed: int) -> Iterator[NoisedBatch]:
            return noised_batches(documents, model, recipe.mask_ratios, recipe.seed + seed, recipe.batch_tokens)

        held_out = gather(model, noised(30_000), wanted, recipe.held_out, scratch / "held_out")
        # Of their own seed, so that every SAE is scored on the same canvases whichever are trained together.
        batches, crops = [], 0
        for batch in noised(40_000):
            batches.append(batch)
            crops += len(batch.tokens)
            if crops >= recipe.held_out_crops:
                break
        for key in wanted:
            folder = scratch / folder_name(key)
            hidden = held_out[key].sample(np.arange(recipe.held_out))
            cards[folder.name] = _train_one(model, key, stores[key], hidden, batches, recipe, origin, folder)
            # Moved only when whole, so that a folder in `out` is always a finished SAE.
            folder.rename(out / folder.name)
        shutil.rmtree(scratch)
    return {folder_name(key): cards[folder_name(key)] for key in every}


def folder_name(key: tuple[int, Policy]) -> str:
    """The folder, and so the id, of the SAE of a layer and policy."""
    return f"layer-{key[0]}-{key[1]}"


def _train_one(
    model: DiffusionLM,
    key: tuple[int, Policy],
    store: Store,
    hidden: Tensor,
    batches: Sequence[NoisedBatch],
    recipe: SaeRecipe,
    origin: Mapping[str, Any],
    folder: Path,
) -> dict[str, Any]:
    """Train, save, evaluate; returns the card, written beside the weights as plain numbers."""
    layer, policy = key
    fit(store, layer, policy, recipe, origin["model_sha256"], folder, str(next(model.parameters()).device))
    whole, _ = reconstruction(load_sae(folder), hidden)
    halve(folder, whole["residual_norm"])
    sae = load_sae(folder)
    scores, stats = evaluate_sae(model, sae, policy, hidden, batches)
    scores["explained_variance_before_float16"] = whole["explained_variance"]
    save_file({name: tensor.contiguous() for name, tensor in vars(stats).items()}, folder / STATS)
    card = {
        "id": folder.name,
        "layer": layer,
        "policy": policy,
        "sha256": sae.facts.sha256,
        **origin,
        "results": scores,
    }
    (folder / CARD).write_text(json.dumps(card, indent=2))
    return card


def _finished(folder: Path, origin: Mapping[str, Any]) -> dict[str, Any] | None:
    """The card of a finished SAE, or None; raises where it is not what this run would make."""
    if not folder.exists():
        return None
    if not (folder / CARD).exists():
        raise ArtifactError(
            f"{folder} exists but has no {CARD}: it was not made by this recipe, and is not overwritten"
        )
    card: dict[str, Any] = json.loads((folder / CARD).read_text())
    if changed := [name for name in origin if card.get(name) != origin[name]]:
        raise ArtifactError(
            f"{folder} was made with another {' and '.join(changed)}: remove it, or choose another folder"
        )
    return card


def _documents(model: DiffusionLM, tokenizer: Tokenizer, data: Path, recipe: SaeRecipe, held_out: bool) -> Documents:
    if model.facts.bos_id is None:
        raise ArtifactError("bos_id: None, but the recipe reads canvases that begin with a BOS token")
    return Documents(data, tokenizer, held_out, recipe.context, model.facts.bos_id, model.facts.eos_id)


def _training_states(
    model: DiffusionLM,
    tokenizer: Tokenizer,
    data: Path,
    scratch: Path,
    wanted: Sequence[tuple[int, Policy]],
    recipe: SaeRecipe,
    origin: Mapping[str, Any],
) -> Mapping[tuple[int, Policy], Store]:
    """Gathered states of every SAE wanted; those of a stopped run are used again where they are whole."""
    manifest = scratch / "manifest.json"
    paths = {key: scratch / f"{folder_name(key)}.f16" for key in wanted}
    if (
        manifest.exists()
        and json.loads(manifest.read_text()) == origin
        and all(path.exists() for path in paths.values())
    ):
        return {key: Store(path, recipe.gathered, model.facts.hidden_size) for key, path in paths.items()}
    shutil.rmtree(scratch, ignore_errors=True)
    documents = _documents(model, tokenizer, data, recipe, held_out=False)
    batches = noised_batches(documents, model, recipe.mask_ratios, recipe.seed + 20_000, recipe.batch_tokens)
    stores = gather(model, batches, wanted, recipe.gathered, scratch)
    manifest.write_text(json.dumps(origin))
    return stores
