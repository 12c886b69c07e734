"""Two SAEs of one layer, one for masked positions and one for visible ones."""

from collections.abc import Iterable
from dataclasses import dataclass

from torch import Tensor

from steerserve.errors import ArtifactError
from steerserve.saes.sae import Policy, SparseAutoencoder


@dataclass(frozen=True)
class SaePair:
    """Encodes each token by the SAE that was trained on its state (DLM-Scope, arXiv 2602.05859).

    Feature f of the one is not feature f of the other: an id has a meaning only with the token's state.
    """

    mask: SparseAutoencoder
    visible: SparseAutoencoder

    def __post_init__(self) -> None:
        for name in ("layer", "hidden_size", "features"):
            pair = getattr(self.mask.facts, name), getattr(self.visible.facts, name)
            if pair[0] != pair[1]:
                raise ArtifactError(
                    f"SAEs {self.mask.facts.id} and {self.visible.facts.id} are no pair: {name} {pair[0]} and {pair[1]}"
                )
        for name, sae in (("mask", self.mask), ("visible", self.visible)):
            if sae.facts.policy not in (name, None):
                raise ArtifactError(f"SAE {sae.facts.id}: policy {sae.facts.policy!r}, but {name!r} is needed here")

    @property
    def layer(self) -> int:
        """The layer both read."""
        return self.mask.facts.layer

    def encode(self, hidden: Tensor, masked: Tensor) -> Tensor:
        """Activations [..., features] of hidden states [..., hidden_size], by the state masked [...] (bool)."""
        out = self.mask.W_dec.new_empty((*masked.shape, self.mask.facts.features))
        out[masked] = self.mask.encode(hidden[masked])
        out[~masked] = self.visible.encode(hidden[~masked])
        return out

    def decode(self, activations: Tensor, masked: Tensor) -> Tensor:
        """Reconstructed hidden states [..., hidden_size] of activations [..., features], by the state masked [...]."""
        out = activations.new_empty((*masked.shape, self.mask.facts.hidden_size))
        out[masked] = self.mask.decode(activations[masked])
        out[~masked] = self.visible.decode(activations[~masked])
        return out


def pairs(saes: Iterable[SparseAutoencoder]) -> dict[int, SaePair]:
    """Pairs by layer: of every layer that has exactly one SAE of each policy."""
    by_layer: dict[int, dict[Policy, list[SparseAutoencoder]]] = {}
    for sae in saes:
        if sae.facts.policy is not None:
            of_layer = by_layer.setdefault(sae.facts.layer, {"mask": [], "visible": []})
            of_layer[sae.facts.policy].append(sae)
    return {
        layer: SaePair(found["mask"][0], found["visible"][0])
        for layer, found in sorted(by_layer.items())
        if len(found["mask"]) == len(found["visible"]) == 1
    }
