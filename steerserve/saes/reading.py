"""From a folder to an SAE, whatever layout it is in.

The file of weights tells the layout. Beside it there may be `feature_stats.safetensors` with `max_act`, `mean_act` and
`density`, each [features], and `steerserve.json`, which says what the layout does not: `layer`, `policy` ("mask" or
"visible"), `residual_norm`, `model_sha256`.
"""

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from steerserve.digests import files_sha256
from steerserve.errors import ArtifactError
from steerserve.saes.layouts import dictionary_learning, gemma_scope, sae_lens, sparsify
from steerserve.saes.layouts.files import read_json, read_tensors, whole
from steerserve.saes.layouts.fold import decoder_norms
from steerserve.saes.layouts.parts import Description, Parts
from steerserve.saes.matching_pursuit import MatchingPursuitAutoencoder, Pursuit
from steerserve.saes.sae import FeatureStats, SaeFacts, SparseAutoencoder

logger = logging.getLogger(__name__)
STATS, NOTES = "feature_stats.safetensors", "steerserve.json"

NOTED = ("layer", "policy", "residual_norm", "model_sha256")


@dataclass(frozen=True)
class Layout:
    """A layout on disk: the file that holds the weights, and what reads it."""

    weights: str
    describe: Callable[[Path], Description]
    read: Callable[[Path], Parts]


LAYOUTS: dict[str, Layout] = {
    "sae_lens": Layout(sae_lens.WEIGHTS, sae_lens.describe, sae_lens.read),
    "dictionary_learning": Layout(dictionary_learning.WEIGHTS, dictionary_learning.describe, dictionary_learning.read),
    "sparsify": Layout(sparsify.WEIGHTS, sparsify.describe, sparsify.read),
    "gemma_scope": Layout(gemma_scope.WEIGHTS, gemma_scope.describe, gemma_scope.read),
}


def layout_of(folder: Path) -> str | None:
    """Name of the layout a folder is in, None where it holds no SAE; an ArtifactError where it holds several."""
    found = [name for name, layout in LAYOUTS.items() if (folder / layout.weights).is_file()]
    if len(found) > 1:
        raise ArtifactError(f"SAE {folder}: weights of several layouts, {', '.join(found)}; one a folder is needed")
    if not found and (folder / sae_lens.CONFIG).is_file():
        return "sae_lens"
    return found[0] if found else None


def describe(folder: Path) -> Description:
    """What a folder says of its SAE, its weights unread."""
    try:
        description = _layout(folder).describe(folder)
        notes = read_notes(folder / NOTES)
        layer = _agreed("layer", description.layer, notes)
        description = replace(description, layer=layer, policy=_agreed("policy", description.policy, notes))
        if description.policy not in ("mask", "visible", None):
            raise ArtifactError(f"policy: {description.policy!r}, allowed are 'mask' and 'visible'")
        kept = {name: notes[name] for name in NOTED if name in notes and name not in ("layer", "policy")}
        return replace(description, metadata={**description.metadata, **kept})
    except ArtifactError as error:
        raise ArtifactError(f"SAE {folder}: {error}") from error


def load_sae(folder: Path, name: str | None = None) -> SparseAutoencoder:
    """One SAE of any layout, checked, in float32; its id is `name`, or the folder's name. Its tensors stay mapped where
    they are float32 on a 64-byte line of the file. An ArtifactError names field, value and what fits."""
    description = describe(folder)
    try:
        if description.layer is None:
            raise ArtifactError(
                f"neither the folder's name nor a config says which layer it reads; put {NOTES} beside the weights, "
                'with {"layer": 3} for the output of layer 3, counted from 0'
            )
        layout = _layout(folder)
        parts = layout.read(folder)
        decoder_norms(parts.tensors["W_dec"])
        features, hidden_size = parts.tensors["W_dec"].shape
        facts = SaeFacts(
            id=folder.resolve().name if name is None else name,
            layer=description.layer,
            hidden_size=hidden_size,
            features=features,
            activation=description.activation,
            sha256=files_sha256([folder / layout.weights]),
            policy=description.policy,
            k=description.k,
            metadata=description.metadata,
            remarks=parts.remarks,
        )
        for remark in parts.remarks:
            logger.warning("SAE %s: %s", facts.id, remark)
        stats = read_stats(folder / STATS, features)
        if isinstance(parts.activation, Pursuit):
            return MatchingPursuitAutoencoder(facts, parts.tensors, parts.activation, stats)
        return SparseAutoencoder(facts, parts.tensors, parts.activation, stats)
    except ArtifactError as error:
        raise ArtifactError(f"SAE {folder}: {error}") from error


def read_stats(path: Path, features: int) -> FeatureStats | None:
    """Feature statistics, None where the file is not there."""
    if not path.exists():
        return None
    return FeatureStats(**read_tensors(path, dict.fromkeys(FeatureStats.__dataclass_fields__, (features,))))


def read_notes(path: Path) -> Mapping[str, Any]:
    """What the user noted beside an SAE, nothing where the file is not there."""
    if not path.exists():
        return {}
    notes = read_json(path)
    if unknown := sorted(notes.keys() - set(NOTED)):
        raise ArtifactError(f"{NOTES}: unknown fields {unknown}, allowed are {list(NOTED)}")
    if "layer" in notes:
        whole(notes, "layer", least=0)
    return notes


def _agreed(name: str, stated: Any, notes: Mapping[str, Any]) -> Any:
    """What an SAE's own files and the notes say of it; None where neither does."""
    noted = notes.get(name)
    if None not in (stated, noted) and stated != noted:
        raise ArtifactError(f"{NOTES}: {name} {noted!r} contradicts {stated!r}, which the SAE's own files say")
    return noted if stated is None else stated


def _layout(folder: Path) -> Layout:
    name = layout_of(folder)
    if name is None:
        raise ArtifactError(f"no weights in it; one of {[one.weights for one in LAYOUTS.values()]} is needed")
    return LAYOUTS[name]
