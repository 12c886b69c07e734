"""The playground in a real browser, on a screen as narrow as a phone's; SCREENSHOTS=DIR keeps pictures of it."""

import base64
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import uvicorn

from steerserve.config import EngineConfig, ServerConfig
from steerserve.runtime.load import load_runtime
from steerserve.server.app import create_app
from tests.server.browser import opened
from tests.server.sockets import PATIENCE

WIDE = "Math.max(document.documentElement.scrollWidth, document.body.scrollWidth, window.innerWidth)"


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    app = create_app(load_runtime(None, None, None, EngineConfig()).service, ServerConfig())
    server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=0, log_level="error", ws="none"))
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        assert thread.is_alive()
        time.sleep(0.01)
    yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    server.should_exit = True
    thread.join(PATIENCE)
    assert not thread.is_alive()


def test_the_page_is_no_wider_than_the_screen_before_and_after_a_run(address: str, tmp_path: Path) -> None:
    with opened(f"{address}/playground", tmp_path, 420) as page:
        page.wait("document.querySelectorAll('.push').length === 1")
        assert page.value(WIDE) == 420
        page.value("document.getElementById('add').click()")
        page.value("document.getElementById('tokens').value = 24; document.getElementById('steps').value = 12")
        page.value("document.getElementById('run').click()")
        page.wait("!document.getElementById('receipt').hidden || document.getElementById('status').className")
        page.wait("!document.getElementById('run').disabled")
        assert page.value("document.getElementById('status').className") == ""
        assert page.value("document.getElementById('steered').textContent")
        assert page.value("document.querySelectorAll('#applied tr').length") > 1
        page.value("document.querySelector('details').open = true")
        for width in (420, 320, 1280):
            page.screen(width)
            page.wait(f"{WIDE} === {width}")
            assert page.value("document.getElementById('grid').getBoundingClientRect().right") <= width
            if folder := os.environ.get("SCREENSHOTS"):
                shot = page.do("Page.captureScreenshot", captureBeyondViewport=True)["data"]
                (Path(folder) / f"playground-{width}.png").write_bytes(base64.b64decode(shot))
