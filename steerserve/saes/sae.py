"""The sparse autoencoder: definition in design words, whatever the layout it was read from."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final, Literal

import torch
from torch import Tensor, nn

from steerserve.errors import ArtifactError, NotFoundError
from steerserve.saes.activation import Activation

Policy = Literal["mask", "visible"]
"""Which positions an SAE was trained on: the masked ones of noised canvases, or the visible ones."""


LEAST_OWN: Final = 0.05
"""Least that an encoder reads of a feature's own decoder row for a push along that row to set what it reads. 98 % or
more of the features of each bundled SAE that are ever active are above it; below it, an activation of 1 would take a
push of more than 20 rows."""


FAR: Final = 1e4
"""Hidden units that are many times any state."""


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
    """SHA-256 of the weights file."""
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
        self._own: dict[int, float] = {}
        self._reached: dict[int, bool] = {}

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

    def row_norm(self, feature: int) -> float:
        """Norm of a feature's decoder row: hidden units of an activation of 1."""
        return float(self.decoder_norm[feature])

    def own(self, feature: int) -> float:
        """How much the pre-activation of a feature rises when its decoder row is added to the state: w_f . d_f, the
        product of its encoder column and that row."""
        if feature not in self._own:
            self._own[feature] = float((self.W_enc[:, feature].float() * self.W_dec[feature].float()).sum())
        return self._own[feature]

    def reads_back(self, feature: int) -> bool:
        """Tell if the encoder reads a feature's own decoder row, so that a push along it sets what is read."""
        return self.own(feature) >= LEAST_OWN

    def reached(self, feature: int) -> bool:
        """Tell if the activation lets a feature through once its own decoder row is pushed far enough: a TopK does not
        where k others read more of that row than it does."""
        if feature not in self._reached:
            # So far that nothing but the row counts.
            pushed = self.b_dec + self.W_dec[feature] * (FAR / self.decoder_norm[feature])
            self._reached[feature] = bool(self.encode(pushed[None])[0, feature] != 0)
        return self._reached[feature]

    def per_latent(self, feature: int) -> float:
        """Hidden units along a feature's direction that change what the encoder reads of it by 1; where it does not
        read it back, those that change its part of the reconstruction by that of an activation of 1."""
        return self.row_norm(feature) / (self.own(feature) if self.reads_back(feature) else 1.0)

    def lets_through(self, target: float) -> bool:
        """Tell if a latent set to target is one that an active feature may have."""
        return target != 0 if self.activation.signed else target > 0

    def latent(self, hidden: Tensor, feature: int, target: float) -> Tensor:
        """The value [...] from which a feature's latent is set to target, of hidden states [..., hidden_size].

        Towards 0, and below it where activations have no sign: the activation, so that a feature which is not active
        stays as it is. Towards any other value: the pre-activation, which is the activation where the feature is
        active and says elsewhere how far it is from being so. Set to target, the activation lets it through or reads
        0: under TopK where k others are larger, under JumpReLU where the threshold is.
        """
        if not self.lets_through(target) or not self.reads_back(feature):
            return self.encode(hidden)[..., feature].float()
        # Multiplied and summed, not contracted: a row is read alike beside any others.
        column = self.W_enc[:, feature].float()
        product = ((hidden.float() - self.b_dec.float()) * column).sum(-1)
        return product + self.b_enc[feature].float()

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
