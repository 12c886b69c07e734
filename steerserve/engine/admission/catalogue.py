"""The catalogue of a loaded engine: everything that a request may name."""

import hashlib
import json
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Final, TypeVar

from schedulers import CommitmentProfile, GainTable, JointProfile, build_strength, compile_gains
from steerserve.engine.api.params import SLICES
from steerserve.errors import NotFoundError
from steerserve.models import ModelFacts, SamplerDefaults
from steerserve.saes import SparseAutoencoder
from steerserve.saes.pair import SaePair, pairs
from steerserve.steering.attribute import Attribute
from steerserve.steering.operators import SETS_VALUE
from steerserve.steering.vectors import NamedVector

MOST: Final = 512
"""Results that are kept, those used last."""


T = TypeVar("T")


@dataclass(frozen=True, eq=False)
class CompiledSchedule:
    """A compiled schedule with its gains as numbers, which plans and receipts tell."""

    table: GainTable
    """Shared by every push that has it; nobody may write to it."""
    gains: tuple[float, ...]
    """[SLICES]"""


class CompiledSchedules:
    """Bounded, and safe from any thread. What is kept is immutable, and is of the very attribute that was asked for:
    another one of the same name has entries of its own."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._kept: OrderedDict[Hashable, tuple[object, Any]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._kept)

    def profile(self, attribute: Attribute) -> CommitmentProfile | None:
        """The profile of an attribute; None where it has none; raises ValueError for a broken one."""
        raw = attribute.profile
        return self.kept(attribute, "profile", lambda: CommitmentProfile.from_json(raw)) if raw else None

    def schedule(self, choice: str | Mapping[str, Any], attribute: Attribute | None, op: str) -> CompiledSchedule:
        """A choice of schedule, compiled for a push with op of the attribute, None for one of none; raises ValueError.

        Where op sets a projection and no norm is named, it is `peak`: the gain is the share of the way there.
        """
        sets = op in SETS_VALUE
        try:
            said = json.dumps(choice if isinstance(choice, str) else dict(choice), sort_keys=True)
        except (TypeError, ValueError):
            return self._compile(choice, attribute, sets)
        key = ("schedule", hashlib.sha256(said.encode()).digest(), sets)
        return self.kept(attribute, key, lambda: self._compile(choice, attribute, sets))

    def kept(self, owner: object, key: Hashable, make: Callable[[], T]) -> T:
        """What `make` has made for this owner and key, now or before; what it raises is raised and not kept."""
        # The owner is held beside what was made of it, so that no other object can come to its id.
        whole = (id(owner), key)
        with self._lock:
            if whole in self._kept:
                self._kept.move_to_end(whole)
                found: T = self._kept[whole][1]
                return found
        made = make()
        with self._lock:
            self._kept[whole] = (owner, made)
            while len(self._kept) > MOST:
                self._kept.popitem(last=False)
        return made

    def _compile(self, choice: str | Mapping[str, Any], attribute: Attribute | None, sets: bool) -> CompiledSchedule:
        schedule, norm = build_strength(choice)
        profile = None if attribute is None else self.profile(attribute)
        table = compile_gains(schedule, (norm or "peak") if sets else norm, profile, SLICES)
        return CompiledSchedule(table, tuple(table.gains.tolist()))


@dataclass(frozen=True)
class Catalogue:
    """Everything that a request may name. Immutable: what is loaded later is another catalogue, and a row keeps the one
    that it was admitted with."""

    facts: ModelFacts
    attributes: Mapping[str, Attribute]
    saes: Mapping[str, SparseAutoencoder]
    residual_norms: Mapping[int, float]
    """Mean norm of the hidden state at masked positions by layer, where it is known."""
    defaults: SamplerDefaults = SamplerDefaults()
    vectors: Mapping[str, NamedVector] = field(default_factory=dict)
    joint: JointProfile | None = None
    """The measured cost of pushing several attributes together; None where it was not measured."""
    compiled: CompiledSchedules = field(default_factory=CompiledSchedules, compare=False, repr=False)

    @cached_property
    def revision(self) -> str:
        """What attributes, vectors and joint profile are, in 12 hexadecimal digits: the same wherever the same are
        loaded, in whatever order."""
        attributes = sorted((one.name, one.sha256) for one in self.attributes.values())
        vectors = sorted((one.name, one.sha256) for one in self.vectors.values())
        joint = None if self.joint is None else self.joint.to_json()
        said = json.dumps([attributes, vectors, joint], sort_keys=True)
        return hashlib.sha256(said.encode()).hexdigest()[:12]

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
