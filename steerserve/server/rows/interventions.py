"""The interventions a request asks for, in whichever of the languages it speaks, and where in it each stands."""

import re
from typing import Any

from steerserve.engine.api.params import FeatureRef, Intervention, Scope, VectorRef
from steerserve.errors import RequestError
from steerserve.server.protocol import steering as asked
from steerserve.server.protocol.expression import at
from steerserve.server.rows.revisions import pinned

_ELEMENT = re.compile(r"interventions\[(\d+)\](.*)", re.DOTALL)


def pushes(steering: asked.Change) -> list[tuple[Intervention, str]]:
    """The interventions of a request, each with its path in the request."""
    for language in ("ember", "neuronpedia", "easysteer"):
        foreign = getattr(steering, language)
        if foreign is not None:
            return [(one, f"steering.{language}.{path}") for one, path in foreign.translate()]
    return [(_intervention(one), f"steering.interventions[{i}]") for i, one in enumerate(steering.interventions)]


def check_model(steering: asked.Change, model: str) -> None:
    """Raise RequestError where a foreign intervention is one of another model than `model`."""
    if steering.neuronpedia is not None:
        try:
            steering.neuronpedia.check_model(model)
        except RequestError as error:
            raise RequestError(str(error), f"steering.neuronpedia.{error.param}") from error


def place_of(param: str | None, steering: asked.Change) -> str | None:
    """Where in a steering that is a text the push stands which an engine's `interventions[...]` names; None where it
    is no text."""
    found = _ELEMENT.fullmatch(param or "")
    if found is None or int(found[1]) >= len(steering.places):
        return None
    return at(steering.places[int(found[1])])


def path_of(param: str, steering: asked.Change) -> str:
    """The path in the request of an engine's `interventions[...]`."""
    found = _ELEMENT.fullmatch(param)
    if steering.places:
        return "steering"
    paths = [path for _, path in pushes(steering)]
    if found is None or int(found[1]) >= len(paths):
        return f"steering.{param}"
    # A foreign intervention has other fields than ours: the whole of it is to blame.
    return paths[int(found[1])] + (found[2] if steering.interventions else "")


def _intervention(one: asked.Intervention) -> Intervention:
    attribute, digits = (None, None) if one.attribute is None else pinned(one.attribute)
    return Intervention(
        attribute=attribute,
        sha256=digits,
        feature=FeatureRef(one.feature.sae, one.feature.index) if one.feature is not None else None,
        vector=_vector(one.vector) if one.vector is not None else None,
        strength=one.strength,
        op=one.op,
        unit=one.unit,
        scope=_scope(one.scope),
        schedule=one.schedule,
        layers=tuple(one.layers) if one.layers is not None else None,
        direction=one.direction,
        when=one.when,
        negate=one.negate,
    )


def _vector(vector: asked.Vector) -> VectorRef:
    return VectorRef(vector.layer, None if vector.values is None else tuple(vector.values), vector.name)


def _scope(scope: Any) -> Scope | None:
    if isinstance(scope, asked.Span):
        return (scope.positions[0], scope.positions[1])
    named: Scope | None = scope
    return named
