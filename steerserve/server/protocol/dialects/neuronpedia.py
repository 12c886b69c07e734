"""The steering part of Neuronpedia's requests, translated into interventions.

Both of its spellings are taken: its public API says `modelId`, `layer`, `strength_multiplier` and `steer_method`, its
inference server `model`, `source`, `strengthMultiplier` and `steerMethod`. A source is the id of an SAE that is loaded
here. With c = strength x multiplier and v the decoder row as it is stored, its methods are h + c v, h - (1 - c) P h
(P projects on v) and a cap at c. That cap is of the feature's activation here, as every cap of a feature is, where
theirs is of the projection on its row, which stands for it.
"""

from typing import Annotated, Any, Final, Literal, Self

from pydantic import Field, model_validator

from steerserve.engine.api.params import FeatureRef, Intervention
from steerserve.errors import RequestError
from steerserve.server.protocol import fields
from steerserve.server.protocol.fields import Name, Strength, Strict
from steerserve.steering.names import Operator, Unit

Method = Literal["SIMPLE_ADDITIVE", "ORTHOGONAL_DECOMP", "PROJECTION_CAP"]

OPERATORS: Final[dict[Method, tuple[Operator, Unit | None]]] = {
    "SIMPLE_ADDITIVE": ("add", "stored"),
    "ORTHOGONAL_DECOMP": ("project_out", None),
    "PROJECTION_CAP": ("cap", "raw"),
}


class NeuronpediaFeature(Strict):
    """A feature and how hard to push it."""

    model: Name | None = None
    modelId: Name | None = None
    source: Name | None = None
    layer: Name | None = None
    index: int = Field(ge=0, le=fields.MAX_TOKEN_ID)
    strength: Strength

    @model_validator(mode="after")
    def _one_spelling(self) -> Self:
        _one_of(self, "model", "modelId", needed=False)
        _one_of(self, "source", "layer", needed=True)
        return self

    @property
    def sae(self) -> str:
        """Id of the SAE."""
        return self.source or self.layer or ""

    @property
    def of_model(self) -> str | None:
        """Name of the model it is a feature of, where it says so."""
        return self.model or self.modelId


class Neuronpedia(Strict):
    """The features of a request, and what is done with them."""

    features: list[NeuronpediaFeature] = Field(min_length=1, max_length=256)
    strength_multiplier: Strength | None = None
    strengthMultiplier: Strength | None = None
    steer_method: Method | None = None
    steerMethod: Method | None = None
    normalizeSteering: Annotated[Any, fields.neutral(False)] = None

    @model_validator(mode="after")
    def _one_spelling(self) -> Self:
        _one_of(self, "strength_multiplier", "strengthMultiplier", needed=True)
        _one_of(self, "steer_method", "steerMethod", needed=False)
        return self

    def check_model(self, model: str) -> None:
        """Raise RequestError for a feature of another model than the one that is served."""
        for i, feature in enumerate(self.features):
            if feature.of_model not in (None, model):
                name = "model" if feature.model is not None else "modelId"
                raise RequestError(
                    f"the model served is {model!r}, this is a feature of {feature.of_model!r}", f"features[{i}].{name}"
                )

    def translate(self) -> list[tuple[Intervention, str]]:
        """Our interventions, each with the field it comes from."""
        op, unit = OPERATORS[self.steer_method or self.steerMethod or "SIMPLE_ADDITIVE"]
        multiplier = self.strength_multiplier if self.strength_multiplier is not None else self.strengthMultiplier
        assert multiplier is not None
        found = []
        for i, feature in enumerate(self.features):
            c = multiplier * feature.strength
            one = Intervention(
                feature=FeatureRef(feature.sae, feature.index),
                strength=1.0 - c if op == "project_out" else c,
                op=op,
                unit=unit,
                scope="all",
                schedule="uniform",
            )
            found.append((one, f"features[{i}]"))
        return found


def _one_of(body: Strict, first: str, second: str, needed: bool) -> None:
    """Raise where both spellings of a field are given, or neither of one that is needed."""
    given = [name for name in (first, second) if getattr(body, name) is not None]
    if len(given) > 1:
        raise fields.blame(second, f"is {first} in another spelling; leave one of them out")
    if needed and not given:
        raise fields.blame(first, "is required")
