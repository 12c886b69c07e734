"""The routes of SAE features, over an engine that has some."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from steerserve.engine.features import LoadedFeatures
from tests import tiny
from tests.server.text_engine import TextEngine, service_of, serving

LABELS = {"layer-1-mask": {3: "sports scores"}}


@pytest.fixture(scope="module")
def features(tmp_path_factory: pytest.TempPathFactory) -> LoadedFeatures:
    folder: Path = tmp_path_factory.mktemp("attributes")
    return LoadedFeatures(tiny.engine(tiny.bert(), folder), LABELS)


@pytest.fixture(scope="module")
def reading(features: LoadedFeatures) -> Iterator[TestClient]:
    engine = TextEngine()
    with serving(engine, service=dataclasses.replace(service_of(engine), features=features)) as client:
        yield client


def test_features_come_in_pages(reading: TestClient) -> None:
    first = reading.get("/v1/features", params={"sae": "layer-2-mask", "limit": 30}).json()
    assert (first["object"], len(first["data"]), first["total"], first["has_more"]) == ("list", 30, 48, True)
    rest = reading.get("/v1/features", params={"sae": "layer-2-mask", "limit": 30, "offset": 30}).json()
    assert [one["index"] for one in (*first["data"], *rest["data"])] == list(range(48))
    assert rest["has_more"] is False
    assert reading.get("/v1/features").json()["total"] == 144


def test_features_are_searched(reading: TestClient) -> None:
    [one] = reading.get("/v1/features", params={"q": "Sports"}).json()["data"]
    assert (one["sae"], one["index"], one["label"]) == ("layer-1-mask", 3, "sports scores")
    assert reading.get("/v1/features", params={"q": "chess"}).json()["data"] == []


def test_one_feature_is_described(reading: TestClient) -> None:
    told = reading.get("/v1/features/layer-1-mask/3").json()
    assert (told["sae"], told["index"], told["label"]) == ("layer-1-mask", 3, "sports scores")
    # It is in the list of one attribute that was calibrated at this layer, with another SAE's sites left out.
    assert [one["name"] for one in told["attributes"]] == ["topic/sports"]
    assert told["attributes"][0]["d"] == 0.9 and -1 <= told["attributes"][0]["cosine"] <= 1
    for path, param in (
        ("nope/3", "sae"),
        ("layer-1-mask/48", "index"),
        ("layer-1-mask/x", "index"),
        ("layer-1-mask/-1", "index"),
    ):
        response = reading.get(f"/v1/features/{path}")
        assert (response.status_code, response.json()["error"]["param"]) == (404, param)


def test_two_sets_of_texts_are_compared(reading: TestClient) -> None:
    body = {"texts_a": ["the team won", "the match"], "texts_b": ["the king and the ship"], "layer": 2, "k": 5}
    answer = reading.post("/v1/features/compare", json=body).json()
    assert (answer["object"], answer["model"]) == ("feature_comparison", "text")
    swapped = reading.post("/v1/features/compare", json=body | {"texts_a": body["texts_b"], "texts_b": body["texts_a"]})
    for name, other, sign in (("more_in_a", "more_in_b", 1), ("more_in_b", "more_in_a", -1)):
        found = answer[name]
        assert 1 <= len(found) <= 5
        assert all(sign * one["d"] > 0 and sign * (one["mean_a"] - one["mean_b"]) > 0 for one in found)
        assert [abs(one["d"]) for one in found] == sorted((abs(one["d"]) for one in found), reverse=True)
        assert [one["index"] for one in swapped.json()[other]] == [one["index"] for one in found]


@pytest.mark.parametrize(
    ("change", "status", "param"),
    [
        ({"texts_a": []}, 400, "texts_a"),
        ({"texts_b": ["a"] * 65}, 400, "texts_b"),
        ({"texts_b": ["the", [1, 5000]]}, 400, "texts_b[1][1]"),
        ({"texts_a": ["the team won the match " * 40]}, 400, "texts_a[0]"),
        ({"layer": 1}, 404, "layer"),
        ({"layer": None}, 400, "sae"),
        ({"k": 0}, 400, "k"),
    ],
)
def test_a_bad_comparison_is_refused_by_name(
    reading: TestClient, change: dict[str, Any], status: int, param: str
) -> None:
    body = {"texts_a": ["the team"], "texts_b": ["the king"], "layer": 2} | change
    response = reading.post("/v1/features/compare", json=body)
    assert (response.status_code, response.json()["error"]["param"]) == (status, param), response.text


@pytest.mark.parametrize(
    ("query", "status", "param"),
    [
        ("sae=nope", 404, "sae"),
        ("limit=0", 400, "limit"),
        ("limit=x", 400, "limit"),
        ("limit=1e3", 400, "limit"),
        ("offset=-1", 400, "offset"),
        ("offset=" + "9" * 30, 400, "offset"),
        ("offset=1&offset=2", 400, "offset"),
        ("page=2", 400, "page"),
        ("q=" + "a" * 201, 400, "q"),
    ],
)
def test_a_bad_query_is_refused_by_name(reading: TestClient, query: str, status: int, param: str) -> None:
    response = reading.get(f"/v1/features?{query}")
    assert (response.status_code, response.json()["error"]["param"]) == (status, param)


def test_activations_of_each_token(reading: TestClient) -> None:
    body = {"text": "the team won", "layer": 2, "mask_ratio": 0.5, "seed": 1, "k": 2}
    answer = reading.post("/v1/features/activations", json=body).json()
    assert (answer["object"], answer["model"]) == ("list", "text")
    assert "".join(one["token"] for one in answer["data"]) == "the team won"
    for one in answer["data"]:
        assert one["sae"] == ("layer-2-mask" if one["masked"] else "layer-2-visible")
        assert len(one["features"]) == 2
    ids = [one["token_id"] for one in answer["data"]]
    assert reading.post("/v1/features/activations", json=body | {"text": ids}).json() == answer


@pytest.mark.parametrize(
    ("change", "status", "param"),
    [
        ({"text": ""}, 400, "text"),
        ({"text": None}, 400, "text"),
        ({"text": [1, -1]}, 400, "text[1]"),
        ({"text": [1, 5000]}, 400, "text[1]"),
        ({"text": ["a"]}, 400, "text[0]"),
        ({"sae": "nope", "layer": None}, 404, "sae"),
        ({"layer": 1}, 404, "layer"),
        ({"layer": None}, 400, "sae"),
        ({"sae": "layer-1-mask"}, 400, "sae"),
        ({"k": 0}, 400, "k"),
        ({"k": 100}, 400, "k"),
        ({"mask_ratio": 2}, 400, "mask_ratio"),
        ({"top": 3}, 400, "top"),
    ],
)
def test_a_bad_reading_is_refused_by_name(reading: TestClient, change: dict[str, Any], status: int, param: str) -> None:
    response = reading.post("/v1/features/activations", json={"text": "the team", "layer": 2} | change)
    assert (response.status_code, response.json()["error"]["param"]) == (status, param), response.text


def test_a_server_without_saes_says_so(client: TestClient) -> None:
    assert client.get("/v1/features").status_code == 404
    response = client.post("/v1/features/activations", json={"text": "a", "layer": 0})
    assert response.status_code == 404
    assert "no SAE is loaded" in response.json()["error"]["message"]


def test_a_reading_that_fails_is_one_requests_fault_alone(features: LoadedFeatures) -> None:
    class Broken(LoadedFeatures):
        def __init__(self) -> None:
            self.__dict__.update(vars(features))

        def read(self, prepared: Any) -> list[dict[str, Any]]:
            raise MemoryError(f"no room for {prepared}")

    engine = TextEngine()
    with serving(engine, service=dataclasses.replace(service_of(engine), features=Broken())) as client:
        response = client.post("/v1/features/activations", json={"text": "the", "layer": 2})
        assert response.status_code == 500
        assert "no room" not in response.text
        assert client.post("/v1/completions", json={"model": "text", "max_tokens": 4}).status_code == 200
