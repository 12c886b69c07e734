"""How good an SAE is on held-out text: what it explains, how sparsely, and what the model loses by it."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from steerserve.models.base import DiffusionLM, Sites
from steerserve.models.losses import token_losses
from steerserve.saes.sae import FeatureStats, Policy, SparseAutoencoder
from steerserve.train.activations import NoisedBatch, final_states

Replacement = Callable[[Tensor], Tensor]
"""Hidden states [n, hidden_size] -> what stands in for them."""


class Splice:
    """A `Sites` that replaces one layer's output where chosen tokens [rows, width] are decided."""

    def __init__(self, layer: int, chosen: Tensor, shift: int, replacement: Replacement) -> None:
        self.layer, self.chosen, self.replacement = layer, decides(chosen, shift), replacement

    def __call__(self, layer: int, hidden: Tensor) -> Tensor:
        if layer != self.layer:
            return hidden
        chosen = self.chosen.to(hidden.device)
        out = hidden.clone()
        out[chosen] = self.replacement(hidden[chosen]).to(hidden)
        return out


def decides(chosen: Tensor, shift: int) -> Tensor:
    """The positions [rows, width] whose states decide a token chosen [rows, width]: those `shift` places before it."""
    if shift == 0:
        return chosen
    before = torch.cat([chosen[:, shift:], torch.zeros_like(chosen[:, :shift])], 1)
    before[:, 0] |= chosen[:, :shift].any(1)
    return before


@torch.inference_mode()
def masked_loss(
    model: DiffusionLM, batches: Sequence[NoisedBatch], layer: int, policy: Policy, replacement: Replacement | None
) -> float:
    """Mean cross-entropy in nats at masked text positions, one layer's output replaced where the policy's tokens are
    decided."""
    total, count = 0.0, 0
    for batch in batches:
        sites: Sites | None = None
        if replacement is not None:
            sites = Splice(layer, batch.chosen(policy), model.facts.shift, replacement)
        hidden = final_states(model, batch, sites)
        asked = batch.chosen("mask").to(hidden.device)
        total += float(token_losses(model, hidden[asked], batch.tokens.to(hidden.device)[asked]).double().sum())
        count += int(asked.sum())
    return total / count


@torch.inference_mode()
def reconstruction(sae: SparseAutoencoder, hidden: Tensor) -> tuple[dict[str, float], FeatureStats]:
    """Explained variance, L0 and dead share over hidden states [N, hidden_size], and each feature's statistics.

    Explained variance is `1 - sum |h - h_hat|^2 / sum |h - mean h|^2`; a feature is dead if it is active nowhere here.
    """
    error, fired, summed = 0.0, torch.zeros(sae.facts.features), torch.zeros(sae.facts.features)
    largest = torch.zeros(sae.facts.features)
    for start in range(0, len(hidden), 2048):
        part = hidden[start : start + 2048]
        activations = sae.encode(part)
        error += float((part - sae.decode(activations)).square().sum())
        fired += (activations != 0).sum(0)
        summed += activations.sum(0)
        largest = torch.maximum(largest, activations.amax(0))
    spread = float((hidden - hidden.mean(0)).square().sum())
    scores = {
        "explained_variance": 1.0 - error / spread,
        "l0": float(fired.sum()) / len(hidden),
        "dead_share": float((fired == 0).float().mean()),
        "residual_norm": float(hidden.norm(dim=1).mean()),
        "states": float(len(hidden)),
    }
    return scores, FeatureStats(max_act=largest, mean_act=summed / fired.clamp(min=1), density=fired / len(hidden))


def evaluate_sae(
    model: DiffusionLM, sae: SparseAutoencoder, policy: Policy, hidden: Tensor, batches: Sequence[NoisedBatch]
) -> tuple[dict[str, float], FeatureStats]:
    """Scores on held-out states [N, hidden_size] of the SAE's layer and policy, and on held-out noised batches.

    `loss_delta` is the change of the masked-token loss (nats) when the reconstruction stands in for the layer's output
    where the policy's tokens are decided; `loss_recovered_*` is that change put between no change (1) and ablation (0),
    where ablation puts zeros, or the mean state, at the same positions. It is left out where ablation does no harm:
    visible positions of the last layer, for one, no longer reach the masked ones.
    """
    scores, stats = reconstruction(sae, hidden)
    mean = hidden.mean(0)
    device = next(model.parameters()).device
    on_device = sae.to(device)
    layer = sae.facts.layer
    clean = masked_loss(model, batches, layer, policy, None)
    scores["loss"] = clean
    scores["loss_delta"] = masked_loss(model, batches, layer, policy, on_device) - clean
    ablations: dict[str, Replacement] = {"zero": torch.zeros_like, "mean": lambda states: mean.expand_as(states)}
    for name, ablation in ablations.items():
        harm = masked_loss(model, batches, layer, policy, ablation) - clean
        scores[f"loss_delta_{name}_ablation"] = harm
        if harm > 0:
            scores[f"loss_recovered_{name}"] = 1.0 - scores["loss_delta"] / harm
    sae.to(hidden.device)
    return scores, stats
