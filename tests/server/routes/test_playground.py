"""The playground's files: served with a strict policy, whole, and in step with the routes that they ask."""

import re
from importlib.resources import files
from typing import Any

import pytest
from starlette.testclient import TestClient

from steerserve.config import ServerConfig
from steerserve.server.app import create_app
from steerserve.server.http.pages import MODULES, PAGES
from tests.server.text_engine import TextEngine, service_of

BODY: dict[str, Any] = {"model": "text", "max_tokens": 4}
SHELLS = {"/playground": "", "/playground/feature": "playground/"}
"""The pages, and the folder that addresses in them begin from."""


@pytest.fixture(scope="module")
def client() -> TestClient:
    return TestClient(create_app(service_of(TextEngine()), ServerConfig()))


@pytest.fixture(scope="module")
def texts(client: TestClient) -> dict[str, str]:
    return {path: client.get(path).text for path in PAGES}


@pytest.mark.parametrize("path", PAGES)
def test_a_page_is_served_with_a_policy_that_runs_nothing_else(client: TestClient, path: str) -> None:
    answer = client.get(path)
    assert answer.status_code == 200 and answer.text
    assert answer.headers["content-type"] == PAGES[path][1]
    assert answer.headers["x-content-type-options"] == "nosniff"
    policy = answer.headers["content-security-policy"]
    assert "default-src 'self'" in policy and "frame-ancestors 'none'" in policy and "unsafe" not in policy


def test_every_file_of_the_folder_is_a_page() -> None:
    folder = files("steerserve.server") / "page"
    assert {one.name for one in folder.iterdir()} == {name for name, _ in PAGES.values()}


@pytest.mark.parametrize("path", SHELLS)
def test_a_page_has_no_script_or_style_of_its_own_and_loads_what_is_served(texts: dict[str, str], path: str) -> None:
    page = texts[path]
    assert "<script>" not in page and "style=" not in page and not re.search(r"\son\w+=", page)
    loaded = {f"/{SHELLS[path]}{name}" for name in re.findall(r'<(?:link|script)[^>]*(?:href|src)="([^"]+)"', page)}
    assert loaded <= set(PAGES)


def test_no_file_names_another_host(texts: dict[str, str]) -> None:
    for path, text in texts.items():
        hosts = set(re.findall(r"\w+://[^\s\"'`)]+", text)) - {"http://www.w3.org/2000/svg"}
        assert not hosts, (path, hosts)
        assert "innerHTML" not in text and "eval(" not in text


def test_what_the_modules_import_is_exported(texts: dict[str, str]) -> None:
    used = set()
    for name in MODULES:
        for names, module in re.findall(r'import \{([^}]*)\} from "\./(\w+)\.js"', texts[f"/playground/{name}.js"]):
            used.add(module)
            exported = re.findall(
                r"export (?:async )?(?:const|class|function\*?) (\w+)", texts[f"/playground/{module}.js"]
            )
            exported += re.findall(r"export async function\* (\w+)", texts[f"/playground/{module}.js"])
            assert {one.strip() for one in names.split(",")} <= set(exported), (name, module)
    assert used | {"page", "feature"} == set(MODULES)


@pytest.mark.parametrize(
    ("path", "modules"), [("/playground", set(MODULES) - {"feature"}), ("/playground/feature", {"feature"})]
)
def test_the_scripts_name_elements_that_exist(texts: dict[str, str], path: str, modules: set[str]) -> None:
    named = {
        name for module in modules for name in re.findall(r'\bat\("([\w-]+)"\)', texts[f"/playground/{module}.js"])
    }
    assert named <= set(re.findall(r'id="([\w-]+)"', texts[path]))


def test_the_scripts_ask_routes_that_exist(client: TestClient, texts: dict[str, str]) -> None:
    routes = client.get("/openapi.json").json()["paths"]
    asked = {path for text in texts.values() for path in re.findall(r'["`](v1/[\w/]+|capabilities)', text)}
    assert {"v1/completions", "v1/steering/preview", "v1/features", "v1/generations/"} <= asked
    for path in asked:
        assert any(route.startswith(f"/{path}") for route in routes), path


def test_the_page_asks_for_no_temperature_that_is_refused(client: TestClient) -> None:
    [found] = re.findall(r'id="temperature" type="number" min="(\S+)" max="(\S+)"', client.get("/playground").text)
    least, most = map(float, found)
    codes = [
        client.post("/v1/steering/preview", json=BODY | {"temperature": value}).status_code
        for value in (least, most, least - 0.1, most + 0.1)
    ]
    assert codes == [200, 200, 400, 400]


def test_the_page_names_a_field_once_since_the_message_of_a_body_begins_with_it(client: TestClient) -> None:
    error = client.post("/v1/steering/preview", json=BODY | {"n": 0}).json()["error"]
    assert error["message"].startswith(error["param"])
    assert "error.message.startsWith(error.param)" in client.get("/playground/api.js").text
