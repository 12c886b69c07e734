import re
from typing import Any

import pytest
from starlette.testclient import TestClient

from steerserve.config import ServerConfig
from steerserve.server.app import create_app
from steerserve.server.http.pages import PAGES
from tests.server.text_engine import TextEngine, service_of

BODY: dict[str, Any] = {"model": "text", "max_tokens": 4}


@pytest.fixture
def client() -> TestClient:
    return TestClient(create_app(service_of(TextEngine()), ServerConfig()))


@pytest.mark.parametrize("path", PAGES)
def test_a_page_is_served_with_a_policy_that_runs_nothing_else(client: TestClient, path: str) -> None:
    answer = client.get(path)
    assert answer.status_code == 200 and answer.text
    assert answer.headers["content-type"] == PAGES[path][1]
    assert "default-src 'self'" in answer.headers["content-security-policy"]
    assert "frame-ancestors 'none'" in answer.headers["content-security-policy"]


def test_the_page_loads_only_what_is_served_beside_it(client: TestClient) -> None:
    page = client.get("/playground").text
    assert {f"/{path}" for path in re.findall(r'(?:src|href)="([^"]+)"', page)} == set(PAGES) - {"/playground"}
    assert "<script>" not in page and "style=" not in page and "onclick=" not in page


def test_the_script_names_elements_and_routes_that_exist(client: TestClient) -> None:
    page, script = client.get("/playground").text, client.get("/playground/page.js").text
    assert set(re.findall(r'at\("(\w+)"\)', script)) <= set(re.findall(r'id="(\w+)"', page))
    for path in re.findall(r'"(v1/\w+|capabilities)"', script):
        assert client.request("OPTIONS", f"/{path}").status_code == 405, path


def test_the_page_asks_for_no_temperature_that_is_refused(client: TestClient) -> None:
    [found] = re.findall(r'id="temperature" type="number" min="(\S+)" max="(\S+)"', client.get("/playground").text)
    least, most = map(float, found)
    codes = [
        client.post("/v1/steering/preview", json=BODY | {"temperature": value}).status_code
        for value in (least, most, least - 0.1, most + 0.1)
    ]
    assert codes == [200, 200, 400, 400]


def test_an_empty_prompt_is_refused_and_the_page_leaves_it_out(client: TestClient) -> None:
    assert client.post("/v1/steering/preview", json=BODY | {"prompt": ""}).status_code == 400
    assert client.post("/v1/steering/preview", json=BODY).status_code == 200
    assert 'prompt: at("prompt").value || undefined' in client.get("/playground/page.js").text


def test_the_page_names_a_field_once_since_the_message_of_a_body_begins_with_it(client: TestClient) -> None:
    error = client.post("/v1/steering/preview", json=BODY | {"n": 0}).json()["error"]
    assert error["message"].startswith(error["param"])
    assert "error.message.startsWith(error.param)" in client.get("/playground/page.js").text


def test_what_is_not_chosen_is_the_models_own_and_left_out(client: TestClient) -> None:
    script = client.get("/playground/page.js").text
    # What is selected first is the option that says nothing: a default that is no name is in no list of names.
    assert 'fill(at("order"), told.orders, `model\'s own: ${named(own.order)}`)' in script
    assert 'const first = own === undefined ? [] : [element("option", { value: "", textContent: own })];' in script
    assert 'order: at("order").value || undefined' in script
    assert 'schedule.value !== ""' in script
    for name in ("order", "temperature"):
        assert not re.search(rf'at\("{name}"\)\.value = ', script)
    page = client.get("/playground").text
    # A model's own temperature need not be a multiple of a step.
    assert re.search(r'id="temperature" type="number" min="0" max="2" step="any"', page)
