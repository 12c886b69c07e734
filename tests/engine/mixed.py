"""Rows of every kind that may share a step: orders, transfers, scopes, operators, lengths, temperatures."""

from dataclasses import replace
from typing import Any

from steerserve.engine.api.params import FeatureRef, GenerationParams, Intervention, Limits, TraceParams, VectorRef


def row(**changes: Any) -> GenerationParams:
    """A plain row at temperature 0."""
    plain = GenerationParams(prompt="the king", max_tokens=16, steps=8, temperature=0.0, seed=1)
    return replace(plain, **changes)


def mixed(hidden: int, strength: float = 4.0) -> list[GenerationParams]:
    """Sixteen rows for the names of `tiny.catalogue`, over a model of so wide states."""
    vector = VectorRef(1, tuple(float(i % 7 - 3) for i in range(hidden)))
    sports = Intervention(attribute="topic/sports", strength=strength, schedule="uniform")

    def feature(sae: str, index: int, **how: Any) -> Intervention:
        return Intervention(feature=FeatureRef(sae, index), **how)

    def along(**how: Any) -> Intervention:
        return Intervention(vector=vector, **how)

    def old(**how: Any) -> Intervention:
        return Intervention(attribute="register/archaic", strength=strength, **how)

    window: dict[str, Any] = {"type": "window", "start": 0.2, "stop": 0.6}
    return [
        row(),
        row(interventions=(sports,)),
        row(interventions=(old(scope="all"),), order="entropy", steps=16),
        row(interventions=(feature("layer-1-mask", 5, op="clamp", strength=9.0, unit="raw"),), order="margin"),
        row(interventions=(feature("layer-2-mask", 5, op="boost", strength=2.0),), order="random", steps=5),
        row(
            interventions=(feature("layer-2-mask", 7, op="multiply", strength=5.0),),
            prompt="the team won",
            max_tokens=24,
            steps=12,
            block_length=8,
        ),
        row(interventions=(along(op="project_out", strength=1.0, scope="prompt"),), transfer="cosine"),
        row(
            interventions=(
                along(op="cap", strength=0.5, unit="raw", scope=(2, 9)),
                feature("layer-2-mask", 3, op="cap", strength=0.2, unit="raw"),
            ),
            transfer={"type": "threshold", "value": 0.3},
        ),
        row(order="sae_stability", interventions=(sports,)),
        row(order={"type": "sae_attribute", "attribute": "topic/sports"}, interventions=(sports,)),
        row(transfer={"type": "entropy_bound", "value": 1.0}, order="entropy"),
        row(transfer="origin", order="random", steps=6, interventions=(old(scope="response"),)),
        row(transfer={"type": "remdm", "eta": 0.02, "schedule": "cap"}, order="random", steps=10),
        row(temperature=0.7, top_p=0.9, seed=5, order="confidence", ends_last=True),
        row(temperature=1.0, top_k=5, seed=6, logprobs=True, top_logprobs=3, suffix="and then", ignore_eos=True),
        row(
            trace=TraceParams(("topic/sports", "register/archaic"), 2, features=(FeatureRef("layer-2-mask", 7),)),
            interventions=(Intervention(attribute="topic/sports", strength=strength, schedule=window),),
        ),
    ]


def watching(strength: float = 4.0) -> list[GenerationParams]:
    """Rows that decide by what each forward reads, or tell it position by position, and one that does neither."""
    sports = Intervention(attribute="topic/sports", strength=strength, schedule="uniform")
    above: dict[str, Any] = {"attribute": "register/archaic", "above": 0.0}
    active: dict[str, Any] = {"feature": {"sae": "layer-2-mask", "index": 7}, "above": 0.05}
    late: dict[str, Any] = {"progress": {"at_least": 0.5}}
    return [
        row(interventions=(replace(sports, when=above),)),
        row(interventions=(replace(sports, when={"not": active}),), block_length=8),
        row(abort_when={"all": [late, {"any": [above, {"not": above}]}]}, interventions=(sports,)),
        row(remask_when={"condition": {"progress": {"at_least": 1.0}}, "span": "response"}, seed=3),
        row(trace=TraceParams(("topic/sports", "register/archaic"), 3, positions=True), interventions=(sports,)),
        row(interventions=(sports,), prompt="the team won"),
        row(interventions=(sports,), limits=Limits(max_delta=0.02)),
    ]
