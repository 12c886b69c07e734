"""Rows that differ from another one in nothing but what is pushed."""

from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest

from steerserve.engine.api.params import GenerationParams, Intervention, Limits, TraceParams, VectorRef
from steerserve.engine.api.variants import unsteered, with_pushes, with_target
from tests import tiny

SPORTS, ARCHAIC = Intervention(attribute="topic/sports"), Intervention(attribute="register/archaic")
WARM = Intervention(vector=VectorRef(name="warm"), strength=0.5)
PLAIN = GenerationParams(prompt="the king", max_tokens=8, seed=3, row=2, temperature=1.0, transfer="linear")


@pytest.mark.parametrize(
    ("order", "interventions", "expected"),
    [
        ("sae_attribute", (WARM, SPORTS, ARCHAIC), {"type": "sae_attribute", "attribute": "topic/sports"}),
        (
            {"type": "sae_attribute", "weight": 0.7, "attribute": None},
            (ARCHAIC,),
            {"type": "sae_attribute", "weight": 0.7, "attribute": "register/archaic"},
        ),
        ({"type": "sae_attribute", "attribute": "a"}, (SPORTS,), {"type": "sae_attribute", "attribute": "a"}),
        ({"type": "sae_attribute", "attribute": ""}, (SPORTS,), {"type": "sae_attribute", "attribute": ""}),
        ("sae_attribute", (WARM,), "sae_attribute"),
        ("sae_stability", (SPORTS,), "sae_stability"),
        ({"weight": 0.7}, (SPORTS,), {"weight": 0.7}),
    ],
)
def test_an_order_names_the_first_attribute_that_is_pushed(
    order: Any, interventions: tuple[Intervention, ...], expected: Any
) -> None:
    assert with_target(order, interventions) == expected
    assert with_target(expected, ()) == expected


def test_a_twin_is_its_row_without_what_steers() -> None:
    steered = replace(
        PLAIN,
        order="sae_attribute",
        interventions=(SPORTS, ARCHAIC),
        trace=TraceParams(("topic/sports",)),
        abort_when={"progress": {"above": 0.5}},
        remask_when={"condition": {"progress": {"above": 0.5}}},
        combine="joint",
        limits=Limits(max_delta=1.0),
        control="random",
        measure_kl=True,
        verdicts=("topic/sports",),
    )
    twin = unsteered(steered)
    changed = {one.name for one in fields(steered) if getattr(steered, one.name) != getattr(twin, one.name)}
    steering = {"interventions", "trace", "abort_when", "remask_when", "combine", "limits", "control", "measure_kl"}
    assert changed == steering | {"order"}
    assert twin == unsteered(twin)
    assert replace(twin, order=None, verdicts=()) == PLAIN
    assert unsteered(replace(PLAIN, interventions=(SPORTS,))) == PLAIN


def test_other_pushes_leave_the_order_with_what_it_has_read() -> None:
    row = replace(PLAIN, order="sae_attribute", interventions=(SPORTS,))
    read = {"type": "sae_attribute", "attribute": "topic/sports"}
    assert with_pushes(row, [ARCHAIC]) == replace(PLAIN, order=read, interventions=(ARCHAIC,))
    assert with_pushes(with_pushes(row, []), [ARCHAIC]).order == read


def test_a_twin_commits_by_what_its_row_reads(tmp_path: Path) -> None:
    served = tiny.engine(tiny.bert(), tmp_path)
    row = replace(PLAIN, order={"type": "sae_attribute", "weight": 1.0}, interventions=(replace(SPORTS, strength=0.0),))
    steered, twin = served.admit(row), served.admit(unsteered(row))
    assert steered.uptake is not None and twin.uptake is not None
    assert twin.uptake.name == steered.uptake.name == "topic/sports"
    assert twin.plan["order"] == steered.plan["order"]
    assert tiny.tokens_of(served, row) == tiny.tokens_of(served, unsteered(row))
    other = replace(row, order={"type": "sae_attribute", "weight": 1.0, "attribute": "register/archaic"})
    assert tiny.tokens_of(served, unsteered(other)) != tiny.tokens_of(served, unsteered(row))
