"""Where an intervention pushes: from the name of an attribute, a feature or a vector to a direction at each layer."""

import math
from collections.abc import Sequence
from dataclasses import replace

import torch

from steerserve.engine.admission.catalogue import Catalogue
from steerserve.engine.api.params import Intervention
from steerserve.errors import ArtifactError, NotFoundError, RequestError
from steerserve.steering.attribute import Attribute
from steerserve.steering.operators import NEEDS_SAE, READS_PAIR
from steerserve.steering.push import Push


def attribute_sites(attribute: Attribute, one: Intervention, param: str) -> list[Push]:
    """A push at each layer of an attribute, or at those the intervention names."""
    known = sorted(layer for layer, kind in attribute.directions if kind == one.direction)
    layers = _among(
        known, attribute.layers if one.layers is None else one.layers, f"attribute {attribute.name!r}", param
    )
    if one.op in NEEDS_SAE:
        raise RequestError(f"op {one.op!r} takes a feature, not an attribute", f"{param}.op")
    return [_push(layer, attribute.directions[layer, one.direction]) for layer in layers]


def feature_site(catalogue: Catalogue, one: Intervention, param: str) -> Push:
    """The push of a feature, at its SAE's layer."""
    assert one.feature is not None
    sae = catalogue.sae(one.feature.sae, f"{param}.feature.sae")
    if one.layers is not None:
        raise RequestError("a feature belongs to the layer of its SAE; leave layers out", f"{param}.layers")
    try:
        push = _push(sae.facts.layer, sae.direction(one.feature.index).cpu())
    except NotFoundError as error:
        raise NotFoundError(str(error), f"{param}.feature.index") from error
    pair = None
    if one.op in READS_PAIR:
        try:
            pair = catalogue.pair(sae)
        except ArtifactError as error:
            raise RequestError(
                f"op {one.op!r} reads each token by the SAE of its state, masked or visible: {error}", f"{param}.op"
            ) from error
    return replace(push, sae=sae, feature=one.feature.index, pair=pair)


def vector_sites(catalogue: Catalogue, one: Intervention, param: str) -> list[Push]:
    """The push of a vector that the request holds, or a push at each layer of a vector that it names."""
    assert one.vector is not None
    facts, vector = catalogue.facts, one.vector
    if one.op in NEEDS_SAE:
        raise RequestError(f"op {one.op!r} takes a feature, not a vector", f"{param}.op")
    if vector.name is not None:
        if vector.layer is not None or vector.values is not None:
            raise RequestError("a vector has a name, or a layer and values; this one has both", f"{param}.vector.name")
        named = catalogue.vector(vector.name, f"{param}.vector.name")
        known = sorted(named.layers)
        layers = _among(known, known if one.layers is None else one.layers, f"vector {named.name!r}", param)
        return [_push(layer, named.layers[layer]) for layer in layers]
    if vector.layer is None or vector.values is None:
        raise RequestError("a vector has a name, or a layer and values; this one has neither", f"{param}.vector")
    if not 0 <= vector.layer < facts.num_layers:
        raise RequestError(f"layer must be 0 to {facts.num_layers - 1}, got {vector.layer}", f"{param}.vector.layer")
    if len(vector.values) != facts.hidden_size:
        raise RequestError(
            f"values must hold {facts.hidden_size} numbers, got {len(vector.values)}", f"{param}.vector.values"
        )
    if one.layers is not None:
        raise RequestError("a vector with values names its own layer; leave layers out", f"{param}.layers")
    values = torch.tensor(vector.values, dtype=torch.float64)
    norm = float(values.norm())
    if not math.isfinite(norm) or norm == 0.0:
        raise RequestError(f"values must be finite and not all zero, their norm is {norm}", f"{param}.vector.values")
    return [_push(vector.layer, (values / norm).float())]


def _among(known: Sequence[int], asked: Sequence[int], what: str, param: str) -> list[int]:
    """The layers asked for, each once; raises RequestError for none, and for one that is not known."""
    if not asked:
        raise RequestError(f"layers is empty; {what} has {list(known)}", f"{param}.layers")
    for layer in asked:
        if layer not in known:
            raise RequestError(f"layer {layer} is not among those of {what}: {list(known)}", f"{param}.layers")
    return list(dict.fromkeys(asked))


def _push(layer: int, direction: torch.Tensor) -> Push:
    return Push(layer, direction, "add", 0.0, torch.zeros(1))
