"""What requests can push: read from folders of attributes and vectors, at the start and again while requests run."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from tokenizers import Tokenizer

import schedulers
from schedulers import JointProfile
from steerserve.config import BackendConfig
from steerserve.engine.admission.admit import admit
from steerserve.engine.admission.catalogue import Catalogue
from steerserve.engine.admission.joint_file import load_joint
from steerserve.engine.engine import DiffusionEngine
from steerserve.errors import ArtifactError
from steerserve.models import ModelFacts, SamplerDefaults
from steerserve.runtime.backends import backend_facts
from steerserve.runtime.cards import attribute_card, capabilities, sae_card, vector_card
from steerserve.saes import SparseAutoencoder
from steerserve.server.service import CheckAdmission, Current
from steerserve.steering.attribute import Attribute, load_attributes
from steerserve.steering.vectors import NamedVector, load_vectors


@dataclass(frozen=True)
class SteeringSources:
    """Where attributes and vectors are, and the model and SAEs that they must belong to."""

    attributes: tuple[Path, ...]
    vectors: tuple[Path, ...]
    facts: ModelFacts
    model_sha256: str
    saes: Mapping[str, SparseAutoencoder]

    def catalogue(self, defaults: SamplerDefaults, say: Callable[[str], None] | None = None) -> Catalogue:
        """All of it as a catalogue; raises ArtifactError for whatever is broken or of another model.

        say: told which of several joint profiles counts.
        """
        loaded, joint = all_attributes(self.attributes, self.model_sha256, self.facts, say)
        named: dict[str, NamedVector] = {}
        for place in self.vectors:
            more = load_vectors(place, self.facts.num_layers, self.facts.hidden_size)
            if twice := sorted(named.keys() & more.keys()):
                raise ArtifactError(f"{place}: vectors named {twice} have been loaded from another place already")
            named |= more
        check_attributes(loaded, self.saes)
        return Catalogue(self.facts, loaded, self.saes, residual_norms(loaded, self.saes), defaults, named, joint)


@dataclass(frozen=True)
class Cards:
    """What the catalogue routes say: each mapping is replaced as a whole when something else is loaded."""

    attributes: Current
    saes: Current
    vectors: Current
    capabilities: Current

    @classmethod
    def of(cls, engine: DiffusionEngine, backend: BackendConfig) -> "Cards":
        """The cards of what an engine has."""
        cards = cls(Current(), Current(), Current(), Current())
        cards.replace(engine, backend)
        return cards

    def replace(self, engine: DiffusionEngine, backend: BackendConfig) -> None:
        """Tell of what an engine has now."""
        catalogue = engine.catalogue
        norms = catalogue.residual_norms
        self.attributes.replace({one.name: attribute_card(one) for one in catalogue.attributes.values()})
        self.saes.replace({name: sae_card(sae, norms) for name, sae in catalogue.saes.items()})
        self.vectors.replace({one.name: vector_card(one, norms) for one in catalogue.vectors.values()})
        self.capabilities.replace(capabilities(engine) | backend_facts(backend))


@dataclass(frozen=True)
class SteeringReload:
    """Reads attributes and vectors again, and has an engine admit by them; SAEs and the model stay."""

    engine: DiffusionEngine
    tokenizer: Tokenizer
    sources: SteeringSources
    cards: Cards
    backend: BackendConfig
    max_length: int

    def __call__(self, check: CheckAdmission) -> None:
        """Read attributes and vectors again, check them, and admit by them from now on."""
        before = self.engine.catalogue
        catalogue = self.sources.catalogue(before.defaults)
        check(partial(admit, catalogue=catalogue, tokenizer=self.tokenizer, config=self.engine.config), self.max_length)
        if catalogue.revision != before.revision:
            self.engine.replace_catalogue(catalogue)
            self.cards.replace(self.engine, self.backend)


def all_attributes(
    folders: Sequence[Path], model_sha256: str, facts: ModelFacts, say: Callable[[str], None] | None
) -> tuple[dict[str, Attribute], JointProfile | None]:
    """The attributes of every folder by name, and the joint profile of the last folder that has one.

    Raises ArtifactError for a folder without attributes, and for two attributes of one name.
    """
    loaded: dict[str, Attribute] = {}
    profiles: dict[Path, JointProfile] = {}
    for folder in folders:
        mine = load_attributes(folder, model_sha256, facts.num_layers, facts.hidden_size)
        if not mine:
            raise ArtifactError(f"{folder} holds no attribute")
        if twice := sorted(loaded.keys() & mine.keys()):
            raise ArtifactError(f"{folder}: attributes named {twice} have been loaded from another folder already")
        loaded |= mine
        profile = load_joint(folder, model_sha256, mine)
        if profile is not None:
            profiles[folder] = profile
    *others, last = profiles or (None,)
    if others and say is not None:
        say(f"joint allocation is by {last}/joint.json, not by that of {', '.join(map(str, others))}")
    return loaded, None if last is None else profiles[last]


def check_attributes(attributes: Mapping[str, Attribute], saes: Mapping[str, SparseAutoencoder]) -> None:
    """Raise ArtifactError for a schedule or profile that cannot be compiled, or a feature list of another SAE."""
    for one in attributes.values():
        try:
            profile = schedulers.CommitmentProfile.from_json(one.profile) if one.profile else None
            schedulers.compile_gains(*schedulers.build_strength(one.schedule), profile)
        except (ValueError, TypeError) as error:
            raise ArtifactError(f"attribute {one.name!r}: {error}") from error
        for layer, site in one.sites.items():
            if site.sae in saes and saes[site.sae].facts.sha256 != site.sae_sha256:
                raise ArtifactError(
                    f"attribute {one.name!r}: its features at layer {layer} are not of the {site.sae} loaded"
                )


def residual_norms(attributes: Mapping[str, Attribute], saes: Mapping[str, SparseAutoencoder]) -> dict[int, float]:
    """Mean norm of the hidden state at masked positions by layer: what attributes say, else the SAEs' own measure."""
    # An SAE of masked positions has the last word, and one of visible ones none: their states differ in norm.
    usable = sorted((sae.facts for sae in saes.values() if sae.facts.policy != "visible"), key=lambda f: f.policy or "")
    stated = {facts.layer: facts.metadata.get("residual_norm") for facts in usable}
    norms = {layer: float(norm) for layer, norm in stated.items() if isinstance(norm, int | float) and norm > 0}
    return norms | {layer: site.residual_norm for one in attributes.values() for layer, site in one.sites.items()}
