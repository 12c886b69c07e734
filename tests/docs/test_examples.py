"""The examples of the documents, run as they stand against the bundled model, its server and the command line."""

import contextlib
import io
import json
import os
import re
import socket
import stat
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.docs.pages import PAGES, ROOT, Block, blocks

ADDRESS = "http://127.0.0.1:8000"
"""The address of the server in the documents."""
RUN_WHOLE = ("README.md", "docs/tutorial.md")
"""Pages whose every command, request and program is run, in order; of the others, the JSON objects are checked."""
BASE = {"model": "bundled", "prompt": "the", "max_tokens": 48}
"""What a request has where a document shows only its `steering` or `diffusion`."""


@dataclass(frozen=True)
class Place:
    """Where the examples run: a server, and an empty folder with the commands of an installation on its path."""

    address: str
    folder: Path

    def shell(self, text: str) -> str:
        """Run the lines of a shell block; returns what they write, and fails with it where one of them fails."""
        environment = os.environ | {
            "PATH": f"{self.folder / '.venv/bin'}:{os.environ['PATH']}",
            "PYTHONPATH": str(ROOT),
            "OMP_NUM_THREADS": "1",
        }
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", self.here(text)],
            cwd=self.folder,
            env=environment,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=300,
        )
        assert done.returncode == 0, f"{text}\n{done.stdout}"
        return done.stdout

    def here(self, text: str) -> str:
        """The text with the address of this server."""
        return text.replace(ADDRESS, self.address)

    def post(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        """The answer to a request; fails with the server's words where it is refused."""
        request = urllib.request.Request(
            f"{self.address}{path}", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        try:
            with urllib.request.urlopen(request, timeout=120) as answer:
                told = json.loads(answer.read())
        except urllib.error.HTTPError as error:
            with error:
                raise AssertionError(f"{body}\n{error.read().decode()}") from None
        assert isinstance(told, dict)
        return told


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    folder = tmp_path_factory.mktemp("examples")
    shims = folder / ".venv" / "bin"
    shims.mkdir(parents=True)
    for name, arguments in (("steerserve", "-m steerserve.cli"), ("python", "")):
        shim = shims / name
        shim.write_text(f'#!/bin/sh\nexec "{sys.executable}" {arguments} "$@"\n')
        shim.chmod(shim.stat().st_mode | stat.S_IXUSR)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "steerserve.cli", "serve", "--port", str(port), "--threads", "1"]
    command += ["--no-log-requests"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, cwd=ROOT)
    assert process.stderr is not None
    try:
        lines = []
        for line in process.stderr:
            lines.append(line)
            if "ready at" in line:
                break
        else:
            raise AssertionError("the server ended before it was ready:\n" + "".join(lines))
        yield Place(f"http://127.0.0.1:{port}", folder)
    finally:
        process.kill()
        process.wait()
        process.stderr.close()


@pytest.mark.parametrize("page", RUN_WHOLE)
def test_every_example_of_a_page_runs_as_it_stands(place: Place, page: str) -> None:
    """In the order of the page, in one folder: what one block writes, the next ones read."""
    ran = 0
    for block in blocks(ROOT / page):
        if block.not_run is not None:
            continue
        if block.language == "sh":
            said = place.shell(block.text)
            for answer in _json_objects(said):
                assert "error" not in answer, f"{page}:{block.line}\n{said}"
        elif block.language == "python":
            _run_python(place, block)
        elif block.language == "json":
            _check_request(place, block, generate=True)
        else:
            continue
        ran += 1
    assert ran >= 3


@pytest.mark.parametrize(
    "page",
    [page for page in PAGES if page.parent == ROOT / "docs" and f"docs/{page.name}" not in RUN_WHOLE],
    ids=lambda page: page.name,
)
def test_every_request_of_a_page_is_one_that_the_server_takes(place: Place, page: Path) -> None:
    """Its plan is made, so that a name, a field or a value that is not served is found; nothing is generated."""
    for block in blocks(page):
        if block.language == "json" and block.not_run is None:
            _check_request(place, block, generate=False)


def test_shell_blocks_that_are_not_run_say_why() -> None:
    for page in RUN_WHOLE:
        assert all(len(block.not_run) > 5 for block in blocks(ROOT / page) if block.not_run is not None)


def test_the_pages_read_the_same_blocks_as_a_person() -> None:
    """No fence is overlooked by the reader of blocks."""
    for page in PAGES:
        fences = re.findall(r"^ *```", page.read_text(encoding="utf-8"), re.M)
        assert len(fences) == 2 * len(blocks(page)), page


def _run_python(place: Place, block: Block) -> None:
    said = io.StringIO()
    before = Path.cwd()
    os.chdir(place.folder)
    try:
        with contextlib.redirect_stdout(said):
            exec(compile(place.here(block.text), f"line {block.line}", "exec"), {"__name__": "__main__"})
    finally:
        os.chdir(before)


def _check_request(place: Place, block: Block, generate: bool) -> None:
    """A whole request, or its `steering` or `diffusion`, or the value of one of these."""
    shown = json.loads(block.text)
    if "model" not in shown:
        shown = BASE | shown
    chat = "messages" in shown
    if generate:
        shown.pop("prompt", None) if chat else None
        place.post("/v1/chat/completions" if chat else "/v1/completions", shown)
    else:
        place.post("/v1/steering/preview", shown)


def _json_objects(text: str) -> Iterator[dict[str, Any]]:
    """The JSON objects that a command wrote, one after another."""
    decoder, at = json.JSONDecoder(), 0
    while (at := text.find("{", at)) >= 0:
        try:
            value, at = decoder.raw_decode(text, at)
        except ValueError:
            at += 1
            continue
        if isinstance(value, dict):
            yield value
