"""The OpenAPI document tells what the server does."""

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fastapi import APIRouter, FastAPI
from fastapi.openapi.models import OpenAPI
from fastapi.routing import APIRoute
from starlette.testclient import TestClient

from steerserve.config import ServerConfig
from steerserve.server.app import create_app
from steerserve.server.http.pages import PAGES
from tests.server.protocol.test_protocol import DESIGN_EXAMPLE
from tests.server.text_engine import ATTRIBUTES, TextEngine, service_of


def app_of(config: ServerConfig) -> FastAPI:
    return create_app(service_of(TextEngine()), config)


def routes(router: APIRouter) -> Iterator[APIRoute]:
    """The routes of a router and of those it includes."""
    for route in router.routes:
        if isinstance(route, APIRoute):
            yield route
        else:
            yield from routes(vars(route)["original_router"])


def document(config: ServerConfig | None = None) -> dict[str, Any]:
    answer = TestClient(app_of(config or ServerConfig())).get("/openapi.json")
    assert answer.status_code == 200
    found: dict[str, Any] = answer.json()
    return found


@pytest.mark.parametrize("config", [ServerConfig(), ServerConfig(metrics_port=0)])
def test_every_route_is_told_and_no_other(config: ServerConfig) -> None:
    served = {
        (route.path.replace(":path", ""), method.lower())
        for route in routes(app_of(config).router)
        for method in route.methods or ()
        if route.path not in PAGES
    }
    told = {
        (path, method)
        for path, methods in document(config)["paths"].items()
        for method in methods
        if method != "parameters"
    }
    assert told == served
    assert len(told) >= 16


@pytest.mark.parametrize("config", [ServerConfig(), ServerConfig(metrics_port=0)])
def test_the_document_is_openapi(config: ServerConfig) -> None:
    read = OpenAPI.model_validate(document(config)).model_dump(by_alias=True, exclude_none=True, mode="json")
    told = document(config)
    assert (read["openapi"], read["info"]) == (told["openapi"], told["info"])
    assert read["paths"].keys() == told["paths"].keys()


def test_every_reference_leads_somewhere_and_every_schema_is_used() -> None:
    found = document()
    text = json.dumps(found)
    schemas = found["components"]["schemas"]
    for name in schemas:
        assert f'"#/components/schemas/{name}"' in text
    assert text.count("$ref") == sum(text.count(f'"#/components/schemas/{name}"') for name in schemas)
    assert "$defs" not in text


def test_every_field_of_a_request_is_told_and_null_is_the_same_as_leaving_it_out() -> None:
    schemas = document()["components"]["schemas"]
    request = schemas["CompletionRequest"]
    assert set(DESIGN_EXAMPLE) <= set(request["properties"])
    assert (request["additionalProperties"], request["required"]) == (False, ["model"])
    assert request["properties"]["model"] == {
        "anyOf": [{"const": "text"}, {"type": "string", "pattern": "^(text)@[0-9a-f]{8,64}$"}]
    }
    for schema in schemas.values():
        for name, field in schema.get("properties", {}).items():
            assert schema.get("additionalProperties") is not False or (
                ({"type": "null"} in field.get("anyOf", [])) == (name not in schema.get("required", []))
            )
    named, null = schemas["Intervention"]["properties"]["attribute"]["anyOf"]
    assert {"enum": sorted(ATTRIBUTES)} in named["anyOf"] and null == {"type": "null"}
    assert schemas["CompletionRequest"]["properties"]["use_beam_search"]["anyOf"][0]["enum"] == [False]
    assert schemas["Message"]["properties"]["tool_calls"]["anyOf"][0]["enum"] == [[]]


def test_keys_are_told_where_they_are_needed(tmp_path: Path) -> None:
    keys = tmp_path / "keys.json"
    entry = {"name": "one", "sha256": hashlib.sha256(b"one").hexdigest()}
    keys.write_text(json.dumps({"keys": [entry]}))
    answer = TestClient(app_of(ServerConfig(keys=keys))).get("/openapi.json", headers={"authorization": "Bearer one"})
    found = answer.json()
    assert found["security"] == [{"key": []}]
    for path in ("/health", "/ready"):
        assert found["paths"][path]["get"]["security"] == []
    assert "security" not in found["paths"]["/v1/completions"]["post"]
    assert "security" not in document()
