"""One TopK SAE from gathered hidden states, trained by SAELens' own trainer and saved in its layout.

TopK SAE and its auxiliary loss: Gao et al. 2024 (arXiv 2406.04093). SAELens belongs to the `train` extra and is
imported where it is used.
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from steerserve.saes.layouts.sae_lens import CONFIG, WEIGHTS
from steerserve.saes.sae import Policy
from steerserve.train.activations import Store


@dataclass(frozen=True)
class SaeRecipe:
    """How wide, how sparse, on how much."""

    features: int = 3072
    k: int = 32
    policies: tuple[Policy, ...] = ("mask", "visible")
    mask_ratios: tuple[float, float] = (0.05, 1.0)
    """Share of masked tokens in a canvas, drawn uniformly between these."""
    gathered: int = 400_000
    """Hidden states kept on disk for each layer and policy, 2 bytes a number."""
    states: int = 800_000
    """Training states of each SAE: as many passes over the gathered ones as it takes."""
    batch: int = 512
    learning_rate: float = 3e-3
    warmup: float = 0.05
    """Share of the steps over which the rate rises from zero."""
    decay: float = 0.3
    """Share of the steps, the last, over which the rate falls to zero."""
    dead_after: int = 25_000
    """States without firing after which a feature is revived by the auxiliary loss."""
    held_out: int = 32_768
    """Held-out states for explained variance and feature statistics."""
    held_out_crops: int = 256
    """Held-out crops for the change of the model's loss."""
    batch_tokens: int = 8192
    """Tokens of one forward of the model, padding counted."""
    context: int = 128
    seed: int = 0

    def __post_init__(self) -> None:
        low, high = self.mask_ratios
        if not 1 <= self.k <= self.features:
            raise ValueError(f"k must be 1 to features ({self.features}), got {self.k}")
        if not 1 <= self.batch <= self.gathered:
            raise ValueError(f"batch must be 1 to gathered ({self.gathered}), got {self.batch}")
        if not (0.0 <= low <= high <= 1.0 and high > 0.0):
            raise ValueError(f"mask_ratios must be two shares in order, the second above 0, got {self.mask_ratios}")
        if "visible" in self.policies and low == 1.0:
            raise ValueError(
                f"mask_ratios must leave visible positions to the policy 'visible', got {self.mask_ratios}"
            )
        if wrong := [policy for policy in self.policies if policy not in ("mask", "visible")]:
            raise ValueError(f"policies must be 'mask' or 'visible', got {wrong}")


def fit(
    store: Store, layer: int, policy: Policy, recipe: SaeRecipe, model_sha256: str, folder: Path, device: str
) -> None:
    """Train one SAE with SAELens and save it as SAELens does, in units of raw hidden states and with unit decoder rows.

    States are scaled to a mean norm of sqrt(hidden_size) while training, and the decoder bias starts at their mean;
    SAELens folds the scale, and then the decoder's norms, into the weights it saves.
    """
    from sae_lens import TopKTrainingSAE, TopKTrainingSAEConfig
    from sae_lens.config import SAETrainerConfig
    from sae_lens.saes.sae import SAEMetadata
    from sae_lens.training.sae_trainer import SAETrainer

    steps = math.ceil(recipe.states / recipe.batch)
    count, hidden_size = store.rows.shape
    sample = store.sample(np.linspace(0, count - 1, min(count, 16_384), dtype=np.int64))
    scale = math.sqrt(hidden_size) / float(sample.norm(dim=1).mean())
    with torch.random.fork_rng():
        torch.manual_seed(recipe.seed)
        sae = TopKTrainingSAE(
            TopKTrainingSAEConfig(
                d_in=hidden_size,
                d_sae=recipe.features,
                k=recipe.k,
                device=device,
                normalize_activations="expected_average_only_in",
                metadata=SAEMetadata(
                    hook_name=f"blocks.{layer}.hook_resid_post",
                    hook_layer=layer,
                    policy=policy,
                    mask_ratios=list(recipe.mask_ratios),
                    context_size=recipe.context,
                    model_sha256=model_sha256,
                ),
            )
        )
    sae.b_dec.data.copy_(sample.mean(0) * scale)
    trainer = SAETrainer(
        SAETrainerConfig(
            total_training_samples=steps * recipe.batch,
            train_batch_size_samples=recipe.batch,
            lr=recipe.learning_rate,
            lr_end=0.0,
            lr_warm_up_steps=int(steps * recipe.warmup),
            lr_decay_steps=int(steps * recipe.decay),
            dead_feature_window=max(1, recipe.dead_after // recipe.batch),
            device=device,
        ),
        sae,
        store.shuffled(recipe.seed, recipe.batch),
    )
    trainer.activation_scaler.scaling_factor = scale
    trainer.fit().to("cpu").save_inference_model(folder)


def halve(folder: Path, residual_norm: float) -> None:
    """Keep the two matrices of a saved SAE as float16, and note the mean norm of held-out states in its config."""
    tensors = load_file(folder / WEIGHTS)
    halved = {name: tensor.half() if name.startswith("W_") else tensor for name, tensor in tensors.items()}
    save_file({name: tensor.contiguous() for name, tensor in halved.items()}, folder / WEIGHTS)
    config = json.loads((folder / CONFIG).read_text())
    config["metadata"]["residual_norm"] = residual_norm
    (folder / CONFIG).write_text(json.dumps(config, indent=2))
