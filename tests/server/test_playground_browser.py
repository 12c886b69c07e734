"""The playground in a real browser; SCREENSHOTS=DIR keeps pictures of it."""

import base64
import hashlib
import json
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import httpx2
import pytest
import uvicorn
from starlette.applications import Starlette

from steerserve.config import EngineConfig, ServerConfig
from steerserve.runtime.load import load_runtime
from steerserve.server.app import create_app
from tests.server.browser import Page, opened
from tests.server.sockets import PATIENCE
from tests.server.text_engine import TextEngine, service_of

FOLDER = os.environ.get("SCREENSHOTS")
TOKENS, STEPS, TEXTS = (12, 6, 2) if FOLDER is None else (48, 48, 6)
"""Of the text, and texts of the sweep; a picture shows more."""
WIDE = "Math.max(document.documentElement.scrollWidth, document.body.scrollWidth, window.innerWidth)"


@contextmanager
def served(app: Starlette) -> Iterator[str]:
    """The address at which an application listens meanwhile."""
    server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=0, log_level="error", ws="none"))
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        assert thread.is_alive()
        time.sleep(0.01)
    try:
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(PATIENCE)
    assert not thread.is_alive()


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    with served(create_app(load_runtime(None, None, None, EngineConfig()).service, ServerConfig())) as found:
        yield found


def keep_picture(page: Page, name: str) -> None:
    """Keep a picture of the page wide and light, and one narrow and dark."""
    if FOLDER is None:
        return
    for width, theme in ((1400, "light"), (420, "dark")):
        page.screen(width)
        page.do("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": theme}])
        page.value("new Promise(done => setTimeout(done, 300))")
        shot = page.do("Page.captureScreenshot", captureBeyondViewport=True, format="webp", quality=70)["data"]
        (Path(FOLDER) / f"{name}-{width}.webp").write_bytes(base64.b64decode(shot))


def fits(page: Page) -> None:
    """The page is no wider than the screens it may be shown on."""
    for width in (1280, 320, 420):
        page.screen(width)
        page.wait(f"{WIDE} === {width}")


def enter(page: Page, name: str, value: float) -> None:
    """Put a value into a field as a hand would."""
    event = f"(box => {{ box.value = {value}; box.dispatchEvent(new Event('input')) }})"
    page.value(f"{event}(document.getElementById('{name}'))")


def text_of(page: Page, name: str) -> str:
    found: str = page.value(f"document.getElementById('{name}').textContent")
    return found


def test_a_person_steers_a_text_looks_back_sweeps_and_shares(address: str, tmp_path: Path) -> None:
    with opened(f"{address}/playground", tmp_path, 420) as page:
        page.wait("document.querySelectorAll('.push').length === 1 && !document.getElementById('run').disabled")
        assert page.value(WIDE) == 420
        for name, value in {"tokens": TOKENS, "steps": STEPS}.items():
            enter(page, name, value)
        page.wait(f"document.getElementById('plan').textContent.startsWith('{STEPS} steps')")
        page.value("document.getElementById('run').click()")
        page.wait("!document.getElementById('receipt').hidden || document.getElementById('status').className")
        assert page.value("document.getElementById('status').className") == "", text_of(page, "status")
        # The texts are those of one request with its baseline.
        body = json.loads(page.value("document.getElementById('request').value"))
        body["steering"]["baseline"] = True
        choice = httpx2.post(f"{address}/v1/completions", json=body, timeout=PATIENCE).json()["choices"][0]
        page.wait("!document.querySelector('#steered .mask') && !document.querySelector('#unsteered .mask')")
        assert text_of(page, "steered") == choice["text"]
        assert text_of(page, "unsteered") == choice["baseline"]["text"]
        assert "topic/sports was added at masked positions of layers 2, 3 and 4" in text_of(page, "said")
        assert page.value("document.querySelectorAll('#steered .warm, #steered .cold').length") == TOKENS
        # Half the way back, half of the tokens are masked again.
        enter(page, "time", STEPS // 2)
        assert page.value("document.querySelectorAll('#steered .mask').length") == TOKENS // 2
        fits(page)
        enter(page, "time", STEPS)
        keep_picture(page, "playground")
        page.value(f"document.getElementById('sweep-count').value = {TEXTS}")
        page.value("document.getElementById('sweep-go').click()")
        page.wait("(said => /seed/.test(said.textContent) || said.className)(document.getElementById('sweep-said'))")
        assert page.value("document.querySelector('#sweep-cards p').textContent") == choice["baseline"]["text"].strip()
        assert page.value("document.querySelectorAll('#sweep-chart circle').length") == TEXTS
        fits(page)
        keep_picture(page, "sweep")
        page.value("document.getElementById('share').click()")
        page.wait("location.hash.startsWith('#r=')")
        link = page.value("location.href")
        page.do("Page.navigate", url="about:blank")
        page.do("Page.navigate", url=link)
        page.wait("document.querySelectorAll('.push').length === 1 && !document.getElementById('run').disabled")
        assert json.loads(page.value("document.getElementById('request').value"))["max_tokens"] == TOKENS


def test_a_feature_has_a_page_that_leads_to_a_push_of_it(address: str, tmp_path: Path) -> None:
    with opened(f"{address}/playground/feature?sae=layer-2-visible&index=219", tmp_path, 420) as page:
        page.wait("document.getElementById('facts').textContent || document.getElementById('status').textContent")
        assert text_of(page, "name") == "football, team, cup, coach"
        hidden = "[...document.querySelectorAll('section')].filter(one => one.hidden).map(one => one.id).join(' ')"
        assert page.value(hidden) == "pushed-up pushed-down"  # which the bundled SAEs have not measured
        fits(page)
        keep_picture(page, "feature")
        page.do("Page.navigate", url=page.value("document.getElementById('push').href"))
        page.wait("document.querySelectorAll('.push').length === 1 && !document.getElementById('run').disabled")
        pushed = json.loads(page.value("document.getElementById('request').value"))["steering"]["interventions"]
        assert pushed[0]["feature"] == {"sae": "layer-2-visible", "index": 219}


def test_a_strength_moved_while_a_text_is_written_goes_to_it(address: str, tmp_path: Path) -> None:
    with opened(f"{address}/playground", tmp_path, 420) as page:
        page.wait("document.querySelectorAll('.push').length === 1 && !document.getElementById('run').disabled")
        for name in ("tokens", "steps"):
            enter(page, name, 100)
        page.value("document.getElementById('run').click()")
        page.wait("document.querySelector('#steered .warm, #steered .cold')")
        page.value(
            "(box => { box.value = 0.3; box.dispatchEvent(new Event('input')) })(document.querySelector('.push input'))"
        )
        page.wait("/changed from step|both texts/.test(document.getElementById('status').textContent)")
        assert text_of(page, "status").startswith("changed from step")
        page.value("document.getElementById('stop').click()")
        page.wait("document.getElementById('stop').disabled")
        assert text_of(page, "status") == "stopped"


def test_a_key_is_asked_for_where_one_is_needed(tmp_path: Path) -> None:
    key = "a-key-of-the-test"
    entry = {"name": "a", "sha256": hashlib.sha256(key.encode()).hexdigest()}
    (tmp_path / "keys.json").write_text(json.dumps(entry), encoding="utf-8")
    config = ServerConfig(keys=tmp_path / "keys.json")
    lists = ("operators", "units", "controls", "scopes", "schedules", "orders", "transfers", "probes")
    service = replace(
        service_of(TextEngine()),
        attributes={},
        model_card={"sampler_defaults": {"temperature": 1.0, "order": "random", "transfer": "linear"}},
        capabilities={"device": "cpu"} | dict.fromkeys(lists, []),
    )
    with (
        served(create_app(service, config)) as found,
        opened(f"{found}/playground", tmp_path / "profile", 420) as page,
    ):
        page.wait("document.getElementById('access').open")
        assert "a key is needed" in text_of(page, "status")
        page.value(f"document.getElementById('key').value = {json.dumps(key)}")
        page.value("document.getElementById('key-form').requestSubmit()")
        page.wait("!/a key is needed/.test(document.getElementById('status').textContent)")
        page.wait("!document.getElementById('access').open || document.getElementById('status').textContent")
        assert not page.value("document.getElementById('run').disabled"), text_of(page, "status")
        assert page.value("document.cookie + Object.keys(localStorage)") == ""
