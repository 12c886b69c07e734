"""The sparse autoencoder: definition in design words, whatever the layout it was read from."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from steerserve.errors import ArtifactError, NotFoundError
from steerserve.saes.activation import Activation

Policy = Literal["mask", "visible"]
"""Which positions an SAE was trained on: the masked ones of noised canvases, or the visible ones."""


@dataclass(frozen=True)
class SaeFacts:
    """What is known of an SAE on disk."""

    id: str
    layer: int
    """Index of the layer whose output it reads, from 0."""
    hidden_size: int
    features: int
    activation: str
    """Name of the activation, as the layout calls it."""
    sha256: str
    """Of the weights file."""
    policy: Policy | None = None
    """None where the layout does not say."""
    k: int | None = None
    """Active features per token (on average for BatchTopK); None where the SAE has no such number."""
    metadata: Mapping[str, Any] = field(default_factory=dict)
    """What else the layout says, unchecked: `residual_norm`, `model_sha256`, ..."""
    remarks: tuple[str, ...] = ()
    """What whoever uses it should know of its files, a sentence each: an unfinished training, another reader's sums."""

    def check_model(self, hidden_size: int, num_layers: int, model_sha256: str | None = None) -> None:
        """Raise an ArtifactError unless this SAE reads a layer of the model given; hashes are compared where known."""
        if self.hidden_size != hidden_size:
            raise ArtifactError(f"SAE {self.id}: hidden size {self.hidden_size}, but the model's is {hidden_size}")
        if not 0 <= self.layer < num_layers:
            raise ArtifactError(f"SAE {self.id}: layer {self.layer}, but the model has layers 0 to {num_layers - 1}")
        trained_on = self.metadata.get("model_sha256")
        if model_sha256 is not None and trained_on is not None and trained_on != model_sha256:
            raise ArtifactError(
                f"SAE {self.id}: trained on the model {trained_on}, but the model loaded is {model_sha256}"
            )


@dataclass(frozen=True)
class FeatureStats:
    """Per feature [features], over held-out text at the positions of the SAE's policy."""

    max_act: Tensor
    """Largest activation; the unit `max_act`."""
    mean_act: Tensor
    """Mean activation over the tokens on which the feature is active; 0 where it never is."""
    density: Tensor
    """Share of tokens on which it is active."""


class SparseAutoencoder(nn.Module):
    """`pre = (h - b_dec) W_enc + b_enc`, `a = activation(pre)`, `h_hat = a W_dec + b_dec` (arXiv 2406.04093).

    W_enc [hidden_size, features], W_dec [features, hidden_size], b_enc [features], b_dec [hidden_size].
    Hidden states are raw ones of any float type; everything is computed and returned in the type of the weights.
    """

    W_enc: Tensor
    b_enc: Tensor
    W_dec: Tensor
    b_dec: Tensor
    decoder_norm: Tensor
    """Norm of each row of W_dec [features]."""

    def __init__(
        self,
        facts: SaeFacts,
        tensors: Mapping[str, Tensor],
        activation: Activation,
        stats: FeatureStats | None = None,
    ) -> None:
        super().__init__()
        self.facts, self.stats = facts, stats
        for name in ("W_enc", "b_enc", "W_dec", "b_dec"):
            self.register_buffer(name, tensors[name])
        self.register_buffer("decoder_norm", tensors["W_dec"].norm(dim=1))
        self.activation = activation

    def pre(self, hidden: Tensor) -> Tensor:
        """Pre-activations [..., features] of hidden states [..., hidden_size]."""
        return (hidden.to(self.W_enc.dtype) - self.b_dec) @ self.W_enc + self.b_enc

    def encode(self, hidden: Tensor) -> Tensor:
        """Activations [..., features] of hidden states [..., hidden_size], under the SAE's own activation."""
        out: Tensor = self.activation(self.pre(hidden))
        return out

    def relu(self, hidden: Tensor) -> Tensor:
        """The full ReLU encoding [..., features], whatever the activation (arXiv 2605.10971, equation 15).

        Of a gated SAE, the rectified magnitudes without their gate; of a signed one, the positive side.
        """
        return torch.relu(self.pre(hidden))

    def decode(self, activations: Tensor) -> Tensor:
        """Reconstructed hidden states [..., hidden_size] of activations [..., features]."""
        return activations @ self.W_dec + self.b_dec

    def forward(self, hidden: Tensor) -> Tensor:
        """The reconstruction `h_hat` [..., hidden_size] of hidden states [..., hidden_size]."""
        return self.decode(self.encode(hidden))

    def direction(self, feature: int) -> Tensor:
        """Unit decoder row of a feature [hidden_size]; a NotFoundError where there is no such feature or row."""
        if not 0 <= feature < self.facts.features:
            raise NotFoundError(
                f"SAE {self.facts.id} has features 0 to {self.facts.features - 1}, got {feature}", "feature"
            )
        if not self.decoder_norm[feature] > 0:
            raise NotFoundError(f"SAE {self.facts.id}: feature {feature} has a decoder row of zeros", "feature")
        return self.W_dec[feature] / self.decoder_norm[feature]

    def rank(self, hidden: Tensor) -> Tensor:
        """Scores [..., features] of hidden states [..., hidden_size]: the order of the activations (by magnitude where
        they have signs) among active features, and below them the order in which the others fall short."""
        return self.activation.rank(self.pre(hidden))

    def top_ids(self, hidden: Tensor, k: int) -> Tensor:
        """Ids of the k most active features of each token [N, k], largest first, of hidden states [N, hidden_size].

        By `rank`, so that there are always k, whether or not as many are active.
        """
        if not 1 <= k <= self.facts.features:
            raise ValueError(f"k must be 1 to {self.facts.features}, got {k}")
        return self.rank(hidden).topk(k, dim=-1).indices
