"""An attribute: a named bundle on disk that says what to push, where, how hard and when."""

import hashlib
import json
import math
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from steerserve.errors import ArtifactError
from steerserve.pointers import refuse_pointer
from steerserve.steering.mounted import files_below
from steerserve.steering.probe import FILE, Probe, load_probe
from steerserve.steering.push import SCOPES

FORMAT = 1
UNITS = ("residual", "raw")
"""Units of an attribute's default strength."""


@dataclass(frozen=True)
class FeatureWeight:
    """One SAE feature of an attribute at one layer, with its contrast statistics (arXiv 2605.10971, C.5.2)."""

    index: int
    d: float
    """Cohen's d of its activation, target against contrast."""
    p_value: float
    """Mann-Whitney U, Bonferroni-corrected over the candidates."""
    weight: float
    """Its share of the direction."""


@dataclass(frozen=True)
class AttributeSite:
    """One layer of an attribute."""

    residual_norm: float
    """Mean norm of the hidden state at masked positions of held-out text: strength 1 in unit `residual`."""
    sae: str
    sae_sha256: str
    features: tuple[FeatureWeight, ...]


@dataclass(frozen=True)
class Attribute:
    """What calibration writes."""

    name: str
    model_sha256: str
    layers: tuple[int, ...]
    """Layers that are steered unless a request says otherwise."""
    strength: float
    """Default strength in unit `unit`."""
    unit: str
    scope: str
    schedule: Mapping[str, Any]
    sites: Mapping[int, AttributeSite]
    directions: Mapping[tuple[int, str], Tensor] = field(repr=False)
    """Unit directions [hidden_size] by (layer, "sae" | "diff_means")."""
    profile: Mapping[str, Any] | None = None
    """A `schedulers.CommitmentProfile` as JSON."""
    provenance: Mapping[str, Any] = field(default_factory=dict)
    sha256: str = ""
    """SHA-256 of the card and the directions; empty before it is on disk."""
    directions_sha256: str = ""
    """SHA-256 of the directions alone, which stay as they are when a profile is measured anew."""
    probe: Probe | None = field(default=None, repr=False)
    """What says of a finished text whether it has the attribute; None where it was not trained."""

    def card(self) -> dict[str, Any]:
        """Everything but the tensors, as JSON."""
        raw = asdict(
            AttributeCard(
                FORMAT,
                self.name,
                self.model_sha256,
                self.layers,
                self.strength,
                self.unit,
                self.scope,
                dict(self.schedule),
            )
        )
        raw["sites"] = {str(layer): asdict(site) for layer, site in self.sites.items()}
        return raw | {"profile": self.profile, "provenance": dict(self.provenance)}

    def save(self, folder: Path) -> None:
        """Write `attribute.json`, `directions.safetensors` and, where there is one, the probe into `folder`."""
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {f"{layer}.{kind}": tensor.contiguous() for (layer, kind), tensor in self.directions.items()}
        save_file(tensors, folder / "directions.safetensors")
        # One that is there already may be of another attribute, or of another model.
        (folder / FILE).unlink(missing_ok=True)
        if self.probe is not None:
            self.probe.save(folder)
        card = self.card() | {"directions_sha256": _sha256(folder / "directions.safetensors")}
        (folder / "attribute.json").write_text(json.dumps(card, indent=1), encoding="utf-8")


@dataclass(frozen=True)
class AttributeCard:
    """The plain fields of `attribute.json`, under their names there."""

    format: int
    name: str
    model_sha256: str
    layers: tuple[int, ...]
    strength: float
    unit: str
    scope: str
    schedule: dict[str, Any]


def load_attribute(folder: Path, model_sha256: str, num_layers: int, hidden_size: int) -> Attribute:
    """Read one attribute; raises ArtifactError where it is broken or was made for another model."""
    for name in ("attribute.json", "directions.safetensors"):
        refuse_pointer(folder / name)
    try:
        text = (folder / "attribute.json").read_text(encoding="utf-8")
        raw = json.loads(text)
        tensors = load_file(folder / "directions.safetensors")
        sites = {
            int(layer): AttributeSite(
                site["residual_norm"],
                site["sae"],
                site["sae_sha256"],
                tuple(FeatureWeight(**feature) for feature in site["features"]),
            )
            for layer, site in raw["sites"].items()
        }
        if (digest := _sha256(folder / "directions.safetensors")) != raw["directions_sha256"]:
            raise ArtifactError(
                f"{folder}: directions.safetensors is {digest[:12]}, not the file the attribute was saved with"
            )
        stored = {_place(name): tensor for name, tensor in tensors.items()}
        fields = {name: raw[name] for name in AttributeCard.__dataclass_fields__}
        card = AttributeCard(**fields | {"layers": tuple(raw["layers"])})
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError, SafetensorError) as error:
        raise ArtifactError(f"{folder} is no attribute: {type(error).__name__}: {error}") from error
    if card.format != FORMAT:
        raise ArtifactError(f"{folder}: format is {card.format!r}, this version reads {FORMAT}")
    if not isinstance(card.name, str) or not card.name:
        raise ArtifactError(f"{folder}: name must be text, got {card.name!r}")
    if re.search("@[0-9a-f]{8,64}$", card.name):
        raise ArtifactError(f"{folder}: name must not end like one with a revision, got {card.name!r}")
    if card.model_sha256 != model_sha256:
        raise ArtifactError(
            f"{folder}: attribute {card.name!r} was calibrated for the model {card.model_sha256[:12]}, "
            f"this one is {model_sha256[:12]}"
        )
    directions: dict[tuple[int, str], Tensor] = {}
    for (layer, kind), tensor in stored.items():
        norm = float(tensor.float().norm())
        if not 0 <= layer < num_layers or tensor.shape != (hidden_size,) or not 0 < norm < math.inf:
            raise ArtifactError(
                f"{folder}: direction {layer}.{kind} {list(tensor.shape)} of norm {norm:g} does not fit a model of "
                f"{num_layers} layers of size {hidden_size}"
            )
        directions[layer, kind] = tensor.float() / norm
    for layer, site in sites.items():
        if not _finite(site.residual_norm) or site.residual_norm <= 0:
            raise ArtifactError(f"{folder}: residual_norm of layer {layer} must be above 0, got {site.residual_norm!r}")
        if not 0 <= layer < num_layers:
            raise ArtifactError(f"{folder}: a site at layer {layer}, but the model has layers 0 to {num_layers - 1}")
        if not isinstance(site.sae, str) or not isinstance(site.sae_sha256, str) or not site.sae_sha256:
            raise ArtifactError(
                f"{folder}: the SAE of layer {layer} must have a name and a sha256, got {site.sae!r} and "
                f"{site.sae_sha256!r}"
            )
        if wrong := [f.index for f in site.features if type(f.index) is not int or f.index < 0]:
            raise ArtifactError(f"{folder}: features of layer {layer} must be whole numbers, 0 or more, got {wrong}")
    if not _finite(card.strength):
        raise ArtifactError(f"{folder}: strength must be a finite number, got {card.strength!r}")
    if not card.layers:
        raise ArtifactError(f"{folder}: layers is empty: it would steer nothing")
    if wrong_layers := [layer for layer in card.layers if type(layer) is not int]:
        raise ArtifactError(f"{folder}: layers must be whole numbers, got {wrong_layers}")
    digest = hashlib.sha256(text.encode() + (folder / "directions.safetensors").read_bytes()).hexdigest()
    if card.unit not in UNITS or not isinstance(card.scope, str) or card.scope not in SCOPES:
        raise ArtifactError(
            f"{folder}: unit {card.unit!r} and scope {card.scope!r}, allowed are {list(UNITS)} and {list(SCOPES)}"
        )
    if unplaced := sorted({layer for layer, _ in directions} - set(sites)):
        raise ArtifactError(f"{folder}: directions at layers {unplaced}, for which there is no site")
    for steered in card.layers:
        if steered not in sites or (steered, "sae") not in directions:
            raise ArtifactError(f"{folder}: steers layer {steered}, for which it has no site or no direction")
    return Attribute(
        name=card.name,
        model_sha256=card.model_sha256,
        layers=tuple(card.layers),
        strength=card.strength,
        unit=card.unit,
        scope=card.scope,
        schedule=card.schedule,
        sites=sites,
        directions=directions,
        profile=raw.get("profile"),
        provenance=raw.get("provenance", {}),
        sha256=digest,
        directions_sha256=raw["directions_sha256"],
        probe=load_probe(folder, num_layers, hidden_size),
    )


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _place(name: str) -> tuple[int, str]:
    """(layer, kind) of a tensor named "layer.kind"; raises ValueError."""
    layer, _, kind = name.partition(".")
    return int(layer), kind


def _finite(value: object) -> bool:
    return not isinstance(value, bool) and isinstance(value, int | float) and math.isfinite(value)


def load_attributes(root: Path, model_sha256: str, num_layers: int, hidden_size: int) -> dict[str, Attribute]:
    """Every attribute below `root` by its name; raises ArtifactError if there is no folder or two share a name."""
    if not root.is_dir():
        raise ArtifactError(f"{root} is no folder of attributes: it does not exist")
    found: dict[str, Attribute] = {}
    for path in (one for one in files_below(root) if one.name == "attribute.json"):
        attribute = load_attribute(path.parent, model_sha256, num_layers, hidden_size)
        if attribute.name in found:
            raise ArtifactError(f"{path.parent}: a second attribute named {attribute.name!r}")
        found[attribute.name] = attribute
    return found
