"""Labels, statistics and activations of SAE features, against straight-line readings of the model."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from steerserve.engine.api.base import Reading
from steerserve.engine.api.params import GenerationParams
from steerserve.engine.engine import TorchEngine
from steerserve.engine.features import LoadedFeatures
from steerserve.errors import NotFoundError, RequestError
from steerserve.models import DiffusionLM
from tests import tiny

LABELS = {"layer-1-mask": {3: "sports scores", 40: "the Sports desk"}, "layer-2-visible": {3: "kings"}}
WORDS = "the team won the match and the king lost"


@pytest.fixture
def served(tmp_path: Path) -> TorchEngine:
    return tiny.engine(tiny.bert(), tmp_path)


def read(served: TorchEngine, reading: Reading) -> list[dict[str, Any]]:
    features = LoadedFeatures(served, LABELS)
    return features.read(features.prepare(reading))


def states(model: DiffusionLM, canvas: list[int], layer: int) -> torch.Tensor:
    kept: list[torch.Tensor] = []

    def site(at: int, hidden: torch.Tensor) -> torch.Tensor:
        if at == layer:
            kept.append(hidden[0])
        return hidden

    model(torch.tensor([canvas]), sites=site)
    return kept[0]


def test_pages_go_through_every_feature_once(served: TorchEngine) -> None:
    features = LoadedFeatures(served, LABELS)
    pages = [features.listed(None, "", offset, 50) for offset in range(0, 150, 50)]
    assert {total for _, total in pages} == {3 * tiny.FEATURES}
    assert [(one["sae"], one["index"]) for page, _ in pages for one in page] == [
        (name, index) for name in ("layer-1-mask", "layer-2-mask", "layer-2-visible") for index in range(tiny.FEATURES)
    ]
    assert features.listed(None, "", 200, 50) == ([], 144)


def test_a_feature_is_told_with_its_statistics(served: TorchEngine) -> None:
    [one], total = LoadedFeatures(served, LABELS).listed("layer-1-mask", "3", 0, 9)
    sae = served.catalogue.saes["layer-1-mask"]
    assert sae.stats is not None
    assert total == 1
    assert one == {
        "sae": "layer-1-mask",
        "index": 3,
        "label": "sports scores",
        "layer": 1,
        "policy": "mask",
        "decoder_norm": pytest.approx(float(sae.W_dec[3].norm())),
        "max_act": pytest.approx(float(sae.stats.max_act[3])),
        "mean_act": pytest.approx(float(sae.stats.mean_act[3])),
        "density": pytest.approx(0.1),
    }


@pytest.mark.parametrize(
    ("sae", "query", "expected"),
    [
        (None, "SPORTS", [("layer-1-mask", 3), ("layer-1-mask", 40)]),
        (None, "kings", [("layer-2-visible", 3)]),
        ("layer-1-mask", "kings", []),
        ("layer-2-mask", "40", [("layer-2-mask", 40)]),
        ("layer-2-mask", "48", []),
        (None, "9" * 200, []),
    ],
)
def test_search_by_label_and_by_index(
    served: TorchEngine, sae: str | None, query: str, expected: list[tuple[str, int]]
) -> None:
    found, total = LoadedFeatures(served, LABELS).listed(sae, query, 0, 100)
    assert [(one["sae"], one["index"]) for one in found] == expected
    assert total == len(expected)


@pytest.mark.parametrize("family", ["bert", "llada", "shifted"])
def test_activations_are_those_of_the_state_that_decides_each_token(tmp_path: Path, family: str) -> None:
    model: DiffusionLM = tiny.llada() if family == "llada" else tiny.bert()
    if family == "shifted":
        model.facts = replace(model.facts, shift=1)
    served = tiny.engine(model, tmp_path)
    told = read(served, Reading(WORDS, layer=2, mask_ratio=0.5, seed=4, k=3))
    ids = served.tokenizer.encode(WORDS, add_special_tokens=False).ids
    start = [] if model.facts.bos_id is None else [model.facts.bos_id]
    masked = [one["masked"] for one in told]
    assert sum(masked) == round(len(ids) / 2)
    canvas = [*start, *(model.facts.mask_id if m else i for i, m in zip(ids, masked, strict=True))]
    hidden = states(model, canvas, 2)
    for place, one in enumerate(told):
        sae = served.catalogue.saes["layer-2-mask" if masked[place] else "layer-2-visible"]
        code = sae.encode(hidden[max(0, len(start) + place - model.facts.shift)])
        values, indices = code.topk(3)
        assert one["sae"] == sae.facts.id
        assert (one["position"], one["token_id"]) == (place, ids[place])
        assert [feature["index"] for feature in one["features"]] == indices.tolist()
        assert [feature["activation"] for feature in one["features"]] == pytest.approx(values.tolist(), rel=1e-4)
    assert "".join(one["token"] for one in told) == WORDS


def test_one_sae_reads_every_token_and_labels_are_told(served: TorchEngine) -> None:
    told = read(served, Reading(WORDS, sae="layer-1-mask", mask_ratio=0.3, k=48))
    assert {one["sae"] for one in told} == {"layer-1-mask"}
    # TopK(8): no more than eight are active, and what is not is not told.
    assert {len(one["features"]) for one in told} == {8}
    for one in told:
        for feature in one["features"]:
            assert feature["activation"] > 0
            assert feature["label"] == LABELS["layer-1-mask"].get(feature["index"])


def test_masks_follow_the_seed_and_masks_of_the_text_stay(served: TorchEngine) -> None:
    masks = [
        [one["masked"] for one in read(served, Reading(WORDS, sae="layer-1-mask", mask_ratio=0.4, seed=seed))]
        for seed in (1, 1, 2)
    ]
    assert masks[0] == masks[1] != masks[2]
    ids = served.tokenizer.encode(WORDS, add_special_tokens=False).ids
    given = read(served, Reading((tiny.MASK, *ids[1:]), layer=2))
    assert [one["masked"] for one in given] == [True, *[False] * (len(ids) - 1)]


@pytest.mark.parametrize(
    ("reading", "error", "param"),
    [
        (Reading("the", sae="nope"), NotFoundError, "sae"),
        (Reading("the", layer=1), NotFoundError, "layer"),
        (Reading("the"), RequestError, "sae"),
        (Reading("the", sae="layer-1-mask", layer=1), RequestError, "sae"),
        (Reading((5, 10**6), sae="layer-1-mask"), RequestError, "text[1]"),
        (Reading((), sae="layer-1-mask"), RequestError, "text"),
        (Reading((5,) * 200, sae="layer-1-mask"), RequestError, "text"),
        (Reading("the", sae="layer-1-mask", k=49), RequestError, "k"),
        (Reading("the", sae="layer-1-mask", mask_ratio=1.5), RequestError, "mask_ratio"),
    ],
)
def test_what_cannot_be_read_is_refused(
    served: TorchEngine, reading: Reading, error: type[RequestError], param: str
) -> None:
    with pytest.raises(error) as caught:
        LoadedFeatures(served).prepare(reading)
    assert caught.value.param == param


def test_reading_leaves_running_rows_as_they_are(served: TorchEngine) -> None:
    params = GenerationParams(prompt="the king", max_tokens=12, seed=3)
    alone = tiny.tokens_of(served, params)
    request = served.admit(params)
    served.add([request])
    served.step()
    read(served, Reading(WORDS, layer=2, mask_ratio=0.5))
    tiny.drain(served)
    assert request.response == alone
