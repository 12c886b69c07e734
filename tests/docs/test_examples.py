"""The examples of the documents, run as they stand against the bundled model, its server and the command line."""

import contextlib
import io
import json
import os
import re
import shlex
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from openai import OpenAI

from tests.docs.pages import PAGES, ROOT, Block, blocks

ADDRESS = "http://127.0.0.1:8000"
"""The address of the server in the documents."""
RUN_WHOLE = ("README.md", "docs/tutorial.md", "docs/features.md")
"""Pages whose every command, request and program is run; of the others programs are run and requests planned."""
BASE = {"model": "bundled", "prompt": "the", "max_tokens": 48}
"""What a request has where a document shows only its `steering` or `diffusion`."""


class Place:
    """Where the examples run: an empty folder with the commands of an installation on its path, and a server."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._server: subprocess.Popen[str] | None = None
        self._flags: list[str] | None = None
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.address = f"http://127.0.0.1:{free.getsockname()[1]}"
        commands = folder / ".venv" / "bin"
        commands.mkdir(parents=True)
        for name, arguments in (("steerserve", "-m steerserve.cli"), ("python", "")):
            (commands / name).write_text(f'#!/bin/sh\nexec "{sys.executable}" {arguments} "$@"\n')
            (commands / name).chmod(0o755)
        paths = {"PATH": f"{commands}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}
        self._environment = os.environ | paths | {"OMP_NUM_THREADS": "1"}

    def serve(self, flags: list[str]) -> None:
        """Have a server with these flags at the address, which may be there already."""
        if flags == self._flags:
            return
        self.stop()
        command = [*(sys.executable, "-m", "steerserve.cli", "serve"), *flags, "--no-log-requests"]
        command += ["--port", self.address.rpartition(":")[2]]
        self._server = subprocess.Popen(
            command, stderr=subprocess.PIPE, text=True, cwd=self.folder, env=self._environment
        )
        assert self._server.stderr is not None
        lines: list[str] = []
        for line in self._server.stderr:
            lines.append(line)
            if "ready at" in line:
                self._flags = flags
                return
        raise AssertionError("the server ended before it was ready:\n" + "".join(lines))

    def stop(self) -> None:
        """End the server, if there is one."""
        if self._server is not None:
            self._server.kill()
            self._server.communicate()
        self._server = self._flags = None

    def shell(self, block: Block) -> None:
        """Run the lines of a shell block, each of which must succeed; what it writes must hold no error."""
        command = ["bash", "-euo", "pipefail", "-c", self.here(block.text)]
        done = subprocess.run(
            command, cwd=self.folder, env=self._environment, text=True, capture_output=True, timeout=300
        )
        assert done.returncode == 0, f"{block.text}\n{done.stdout}\n{done.stderr}"
        for answer in _json_objects(done.stdout):
            assert "error" not in answer, f"{block.text}\n{answer}"

    def python(self, block: Block) -> None:
        """Run a program, and close the clients that it leaves open."""
        names: dict[str, Any] = {"__name__": "__main__"}
        try:
            with contextlib.chdir(self.folder), contextlib.redirect_stdout(io.StringIO()):
                exec(compile(self.here(block.text), f"line {block.line}", "exec"), names)
        finally:
            for value in names.values():
                if isinstance(value, OpenAI):
                    value.close()

    def here(self, text: str) -> str:
        """A text of the documents with the address of this server."""
        return text.replace(ADDRESS, self.address)

    def plan(self, block: Block) -> None:
        """Have the server plan a request, or what a document shows of one: nothing is generated."""
        shown = json.loads(block.text)
        body = shown if "model" in shown else BASE | shown
        try:
            with self.open("/v1/steering/preview", body) as answer:
                assert json.loads(answer.read())["plans"]
        except urllib.error.HTTPError as error:
            with error:
                raise AssertionError(f"line {block.line}: {body}\n{error.read().decode()}") from None

    def open(self, path: str, body: dict[str, Any]) -> Any:
        """The server's answer to a request, open to be read; raises HTTPError."""
        headers = {"Content-Type": "application/json"}
        request = urllib.request.Request(f"{self.address}{path}", json.dumps(body).encode(), headers)
        return urllib.request.urlopen(request, timeout=120)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    made = Place(tmp_path_factory.mktemp("examples"))
    yield made
    made.stop()


def test_the_readme_shows_a_receipt_as_there_are(place: Place) -> None:
    """Each field of its excerpt is one of the answer to the request above it."""
    [request] = [block.text for block in blocks(ROOT / "README.md") if "curl" in block.text]
    [shown] = [block.text for block in blocks(ROOT / "README.md") if block.language == "text"]
    place.serve([])
    with place.open("/v1/completions", json.loads(shlex.split(request)[-1])) as answer:
        told = answer.read().decode()
    fields = re.findall(r'"(\w+)": ', shown)
    assert len(fields) > 10 and [name for name in fields if f'"{name}":' not in told] == []


@pytest.mark.parametrize("page", [page for page in PAGES if page.parent in (ROOT, ROOT / "docs")], ids=lambda p: p.name)
def test_the_examples_of_a_page_run_as_they_stand(place: Place, page: Path) -> None:
    """In the order of the page, in one folder: what one block writes, the next ones read."""
    whole = str(page.relative_to(ROOT)) in RUN_WHOLE
    ran = 0
    for block in blocks(page):
        if block.not_run is not None or block.language not in ("sh", "json", "python"):
            continue
        if block.serves:
            place.serve(shlex.split(block.text, comments=True)[2:])
        elif block.language == "sh":
            if whole:
                place.shell(block)
        else:
            if not whole:
                place.serve([])
            place.python(block) if block.language == "python" else place.plan(block)
        ran += 1
    assert ran >= 3 or not whole


def test_a_block_that_is_not_run_says_why() -> None:
    for page in PAGES:
        assert all(len(block.not_run) > 5 for block in blocks(page) if block.not_run is not None), page


def test_no_block_is_overlooked() -> None:
    for page in PAGES:
        fences = re.findall(r"^ *```", page.read_text(encoding="utf-8"), re.M)
        assert len(fences) == 2 * len(blocks(page)), page


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
