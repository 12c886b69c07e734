"""Labels, statistics and activations of SAE features, against straight-line readings of the model."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from steerserve.engine.api.base import FeatureQuery
from steerserve.engine.api.params import GenerationParams
from steerserve.engine.engine import DiffusionEngine
from steerserve.engine.features import LoadedFeatures
from steerserve.errors import NotFoundError, RequestError
from steerserve.models import DiffusionLM
from tests import tiny

LABELS = {"layer-1-mask": {3: "sports scores", 40: "the Sports desk"}, "layer-2-visible": {3: "kings"}}
WORDS = "the team won the match and the king lost"


@pytest.fixture
def served(tmp_path: Path) -> DiffusionEngine:
    return tiny.engine(tiny.bert(), tmp_path)


def read(served: DiffusionEngine, reading: FeatureQuery) -> list[dict[str, Any]]:
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


def test_pages_go_through_every_feature_once(served: DiffusionEngine) -> None:
    features = LoadedFeatures(served, LABELS)
    pages = [features.listed(None, "", offset, 50) for offset in range(0, 150, 50)]
    assert {total for _, total in pages} == {3 * tiny.FEATURES}
    assert [(one["sae"], one["index"]) for page, _ in pages for one in page] == [
        (name, index) for name in ("layer-1-mask", "layer-2-mask", "layer-2-visible") for index in range(tiny.FEATURES)
    ]
    assert features.listed(None, "", 200, 50) == ([], 144)


def test_a_feature_is_told_with_its_statistics(served: DiffusionEngine) -> None:
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
    served: DiffusionEngine, sae: str | None, query: str, expected: list[tuple[str, int]]
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
    told = read(served, FeatureQuery(WORDS, layer=2, mask_ratio=0.5, seed=4, k=3))
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


def test_one_sae_reads_every_token_and_labels_are_told(served: DiffusionEngine) -> None:
    told = read(served, FeatureQuery(WORDS, sae="layer-1-mask", mask_ratio=0.3, k=48))
    assert {one["sae"] for one in told} == {"layer-1-mask"}
    # TopK(8): no more than eight are active, and what is not is not told.
    assert {len(one["features"]) for one in told} == {8}
    for one in told:
        for feature in one["features"]:
            assert feature["activation"] > 0
            assert feature["label"] == LABELS["layer-1-mask"].get(feature["index"])


def test_masks_follow_the_seed_and_masks_of_the_text_stay(served: DiffusionEngine) -> None:
    masks = [
        [one["masked"] for one in read(served, FeatureQuery(WORDS, sae="layer-1-mask", mask_ratio=0.4, seed=seed))]
        for seed in (1, 1, 2)
    ]
    assert masks[0] == masks[1] != masks[2]
    ids = served.tokenizer.encode(WORDS, add_special_tokens=False).ids
    given = read(served, FeatureQuery((tiny.MASK, *ids[1:]), layer=2))
    assert [one["masked"] for one in given] == [True, *[False] * (len(ids) - 1)]


def test_a_contrast_is_cohens_d_over_the_tokens_of_both_sets(served: DiffusionEngine) -> None:
    features = LoadedFeatures(served, LABELS)
    sets = (("the team won the match", "then the team lost"), ("the king and the ship", "the city"))
    prepared = [[features.prepare(FeatureQuery(text, layer=2)) for text in texts] for texts in sets]
    a, b = ([features.moments(one) for one in several] for several in prepared)
    more_in_a, more_in_b = features.contrast(a, b, 4)
    sae, codes = served.catalogue.saes["layer-2-visible"], []
    for texts in sets:
        tokens = []
        for text in texts:
            ids = served.tokenizer.encode(text, add_special_tokens=False).ids
            hidden = states(served.model, [tiny.CLS, *ids], 2)[1:]
            tokens += [sae.encode(state) for state in hidden]
        codes.append(torch.stack(tokens).double())
    gap = codes[0].mean(0) - codes[1].mean(0)
    spread = ((codes[0].var(0) + codes[1].var(0)) / 2).sqrt()
    d = torch.where(spread > 0, gap / spread, 0.0)
    assert [one["index"] for one in more_in_a] == d.argsort(descending=True)[:4].tolist()
    assert [one["index"] for one in more_in_b] == d.argsort()[:4].tolist()
    for one in (*more_in_a, *more_in_b):
        assert one["sae"] == "layer-2-visible"
        assert one["d"] == pytest.approx(float(d[one["index"]]), abs=1e-3)
        assert one["mean_a"] == pytest.approx(float(codes[0].mean(0)[one["index"]]), abs=1e-4)


@pytest.mark.parametrize(
    ("reading", "error", "param"),
    [
        (FeatureQuery("the", sae="nope"), NotFoundError, "sae"),
        (FeatureQuery("the", layer=1), NotFoundError, "layer"),
        (FeatureQuery("the"), RequestError, "sae"),
        (FeatureQuery("the", sae="layer-1-mask", layer=1), RequestError, "sae"),
        (FeatureQuery((5, 10**6), sae="layer-1-mask"), RequestError, "text[1]"),
        (FeatureQuery((), sae="layer-1-mask"), RequestError, "text"),
        (FeatureQuery((5,) * 200, sae="layer-1-mask"), RequestError, "text"),
        (FeatureQuery("the", sae="layer-1-mask", k=49), RequestError, "k"),
        (FeatureQuery("the", sae="layer-1-mask", mask_ratio=1.5), RequestError, "mask_ratio"),
    ],
)
def test_what_cannot_be_read_is_refused(
    served: DiffusionEngine, reading: FeatureQuery, error: type[RequestError], param: str
) -> None:
    with pytest.raises(error) as caught:
        LoadedFeatures(served).prepare(reading)
    assert caught.value.param == param


def test_reading_leaves_running_rows_as_they_are(served: DiffusionEngine) -> None:
    params = GenerationParams(prompt="the king", max_tokens=12, seed=3)
    alone = tiny.tokens_of(served, params)
    request = served.admit(params)
    served.add([request])
    served.step()
    read(served, FeatureQuery(WORDS, layer=2, mask_ratio=0.5))
    tiny.drain(served)
    assert request.response == alone
