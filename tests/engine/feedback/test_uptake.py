"""Order `sae_attribute` in the engine: positions commit by how far they have taken an attribute up."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from steerserve.engine.api.params import GenerationParams, Intervention
from steerserve.errors import RequestError
from steerserve.models import DiffusionLM
from tests import tiny

PLAIN = GenerationParams(prompt="the king", max_tokens=6, temperature=0.0, transfer="linear", ignore_eos=True)
FULL = {"type": "sae_attribute", "weight": 1.0, "attribute": "register/archaic"}


def projections(model: DiffusionLM, canvas: list[int], layer: int, direction: Tensor) -> list[float]:
    kept: list[Tensor] = []

    def site(index: int, hidden: Tensor) -> Tensor:
        if index == layer:
            kept.append(hidden[0])
        return hidden

    model(torch.tensor([canvas]), sites=site)
    return [float(state @ direction) for state in kept[0]]


@pytest.mark.parametrize("make", [tiny.bert, tiny.dream])
def test_the_position_that_carries_most_of_the_attribute_commits_first(make: type[DiffusionLM], tmp_path: Path) -> None:
    model = make()
    served = tiny.engine(model, tmp_path)
    attribute = served.catalogue.attributes["register/archaic"]
    layer = attribute.layers[0]
    request, events = tiny.solo(served, replace(PLAIN, order=FULL))
    _, when = tiny.replayed(events, request)
    shift = model.facts.shift
    for step in range(6):
        response = [request.response[p] if when[p] < step else tiny.MASK for p in range(6)]
        read = projections(model, [*request.prompt_ids, *response], layer, attribute.directions[layer, "sae"])
        masked = [p for p in range(6) if when[p] >= step]
        best = max(masked, key=lambda p: read[request.start + p - shift])
        assert when[best] == step


def test_the_attribute_read_is_the_one_named_else_the_one_pushed(tmp_path: Path) -> None:
    served = tiny.engine(tiny.llada(), tmp_path)
    push = Intervention(attribute="topic/sports")
    unnamed = served.admit(replace(PLAIN, order="sae_attribute", interventions=(push,)))
    named = served.admit(replace(PLAIN, order=FULL, interventions=(push,)))
    assert unnamed.uptake is not None and unnamed.uptake.name == "topic/sports"
    assert unnamed.plan["order"] == {"type": "sae_attribute", "attribute": "topic/sports"}
    assert named.plan["order"] == FULL
    assert named.uptake is not None and named.uptake.name == "register/archaic"
    with pytest.raises(RequestError, match="needs an attribute to read"):
        served.admit(replace(PLAIN, order="sae_attribute"))


def test_rows_that_read_different_attributes_choose_as_they_do_alone(tmp_path: Path) -> None:
    served = tiny.engine(tiny.bert(), tmp_path)
    rows = [
        replace(PLAIN, order=FULL),
        replace(PLAIN, order="confidence", prompt="the old man"),
        replace(PLAIN, order=FULL | {"attribute": "topic/sports", "weight": 0.7}, max_tokens=9),
    ]
    alone = [tiny.tokens_of(served, params) for params in rows]
    assert [request.response for request, _ in tiny.run(served, *rows)] == alone
