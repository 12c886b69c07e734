"""What a loaded engine has: everything that a request may name."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from schedulers import JointProfile
from steerserve.engine.compiled import CompiledSchedules
from steerserve.errors import NotFoundError
from steerserve.models import ModelFacts, SamplerDefaults
from steerserve.saes import SparseAutoencoder
from steerserve.saes.pair import SaePair, pairs
from steerserve.steering.attribute import Attribute
from steerserve.steering.vectors import NamedVector


@dataclass(frozen=True)
class Catalogue:
    """Everything that a request may name; immutable after start."""

    facts: ModelFacts
    attributes: Mapping[str, Attribute]
    saes: Mapping[str, SparseAutoencoder]
    residual_norms: Mapping[int, float]
    """Mean norm of the hidden state at masked positions by layer, where it is known."""
    defaults: SamplerDefaults = SamplerDefaults()
    vectors: Mapping[str, NamedVector] = field(default_factory=dict)
    joint: JointProfile | None = None
    """Of attributes pushed together; None where it was not measured."""
    compiled: CompiledSchedules = field(default_factory=CompiledSchedules, compare=False, repr=False)

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

    def pair(self, sae: SparseAutoencoder) -> SaePair | None:
        """The SAEs for masked and for visible tokens of a layer, where `sae` is one of exactly two; raises
        ArtifactError where the two do not belong together."""
        if sae.facts.policy is None:
            return None
        found = pairs(other for other in self.saes.values() if other.facts.layer == sae.facts.layer)
        return found.get(sae.facts.layer)

    def vector(self, name: str, param: str) -> NamedVector:
        """The loaded vector of that name; raises NotFoundError listing the known ones."""
        if name not in self.vectors:
            raise NotFoundError(f"unknown vector {name!r}; known: {', '.join(self.vectors) or 'none'}", param)
        return self.vectors[name]
