"""Chromium without a screen, driven over its debugging pipe."""

import json
import os
import select
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.server.sockets import PATIENCE

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")


WITH_PIPE = """
import os, sys
commands, answers = (os.dup(int(one)) for one in sys.argv[1:3])
os.dup2(commands, 3)
os.dup2(answers, 4)
os.set_inheritable(3, True)
os.set_inheritable(4, True)
os.execv(sys.argv[3], sys.argv[3:])
"""
"""Starts a browser with the pipe as its file descriptors 3 and 4."""


class Page:
    """One page of a browser; commands and answers are JSON texts that end in a NUL."""

    def __init__(self, commands: int, answers: int) -> None:
        self._commands, self._answers = commands, answers
        self._rest = b""
        self._count = 0
        self._session: str | None = None
        target = self.do("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.do("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]

    def do(self, method: str, **params: Any) -> dict[str, Any]:
        """Give a command of the DevTools protocol, and wait for its answer."""
        self._count += 1
        asked: dict[str, Any] = {"id": self._count, "method": method, "params": params}
        asked |= {} if self._session is None else {"sessionId": self._session}
        os.write(self._commands, json.dumps(asked).encode() + b"\0")
        while True:
            while b"\0" not in self._rest:
                assert select.select([self._answers], [], [], PATIENCE)[0], f"no answer to {method}"
                read = os.read(self._answers, 1 << 16)
                assert read, "the browser has ended"
                self._rest += read
            line, _, self._rest = self._rest.partition(b"\0")
            told = json.loads(line)
            if told.get("id") == self._count:
                assert "result" in told, told
                found: dict[str, Any] = told["result"]
                return found

    def screen(self, width: int) -> None:
        """Show the page on a phone's screen of so many CSS pixels."""
        self.do("Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=True)

    def value(self, expression: str) -> Any:
        """What an expression of JavaScript, or its promise, comes to."""
        told = self.do("Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in told, told["exceptionDetails"]
        return told["result"].get("value")

    def wait(self, condition: str) -> None:
        """Wait until an expression is true."""
        self.value(f"new Promise(done => {{ const ask = () => ({condition}) ? done() : setTimeout(ask, 20); ask() }})")


@contextmanager
def opened(url: str, profile: Path, width: int) -> Iterator[Page]:
    """A page on a screen of so many CSS pixels; skips the test where there is no Chromium."""
    found = next((path for name in NAMES if (path := shutil.which(name))), None)
    if found is None:
        pytest.skip("needs chromium")
    their_commands, commands = os.pipe()
    answers, their_answers = os.pipe()
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--remote-debugging-pipe"]
    command = [sys.executable, "-c", WITH_PIPE, str(their_commands), str(their_answers), found, *flags]
    process = subprocess.Popen(
        [*command, f"--user-data-dir={profile}"],
        pass_fds=(their_commands, their_answers),
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    os.close(their_commands)
    os.close(their_answers)
    try:
        page = Page(commands, answers)
        page.screen(width)
        page.do("Page.navigate", url=url)
        page.wait("document.readyState === 'complete'")
        yield page
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        os.close(commands)
        os.close(answers)
