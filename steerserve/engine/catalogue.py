"""What a loaded engine has: everything that a request may name."""

from collections.abc import Mapping
from dataclasses import dataclass

from steerserve.errors import NotFoundError
from steerserve.models import ModelFacts, SamplerDefaults
from steerserve.saes import SparseAutoencoder
from steerserve.steering.attribute import Attribute


@dataclass(frozen=True)
class Catalogue:
    """Everything that a request may name; immutable after start."""

    facts: ModelFacts
    attributes: Mapping[str, Attribute]
    saes: Mapping[str, SparseAutoencoder]
    residual_norms: Mapping[int, float]
    """Mean norm of the hidden state at masked positions by layer, where it is known."""
    defaults: SamplerDefaults = SamplerDefaults()

    def attribute(self, name: str, param: str) -> Attribute:
        """The attribute of that name; raises NotFoundError listing the known ones."""
        if name not in self.attributes:
            raise NotFoundError(f"unknown attribute {name!r}; known: {', '.join(self.attributes) or 'none'}", param)
        return self.attributes[name]

    def sae(self, name: str, param: str) -> SparseAutoencoder:
        """The SAE of that id; raises NotFoundError listing the known ones."""
        if name not in self.saes:
            raise NotFoundError(f"unknown sae {name!r}; known: {', '.join(self.saes) or 'none'}", param)
        return self.saes[name]
