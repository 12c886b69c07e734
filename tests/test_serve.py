"""The server as a process: it says where it listens, answers, and ends every answer properly when told to stop."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest


@contextmanager
def serving(model: Path, *flags: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A `steerserve serve` process on a free port, and its address."""
    command = [sys.executable, "-m", "steerserve.cli", "serve", "--model", str(model), "--port", "0", *flags]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    try:
        for line in process.stderr:
            if found := re.search(r"ready at (http://\S+)", line):
                break
        else:
            raise AssertionError("the server ended before it was ready")
        yield process, found[1]
    finally:
        process.kill()
        process.wait()
        process.stderr.close()


def post(address: str, body: dict[str, object]) -> tuple[int, str]:
    """Status and body of a completion, whatever the status."""
    request = urllib.request.Request(
        f"{address}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read().decode()


def test_it_answers_and_stops_cleanly(tiny_model: Path) -> None:
    with serving(tiny_model) as (process, address):
        status, text = post(address, {"model": tiny_model.name, "prompt": "the team", "max_tokens": 8})
        assert status == 200, text
        assert json.loads(text)["choices"][0]["text"] is not None
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=30) in (0, -signal.SIGTERM)


def test_rows_that_outlast_the_drain_end_in_an_answer(tiny_model: Path) -> None:
    with serving(tiny_model, "--drain-seconds", "0.2", "--max-rows", "1") as (process, address):
        body = {"model": tiny_model.name, "max_tokens": 60, "n": 64, "diffusion": {"ignore_eos": True}}
        answers: list[tuple[int, str]] = []
        client = threading.Thread(target=lambda: answers.append(post(address, body)))
        client.start()
        while json.loads(urllib.request.urlopen(f"{address}/ready").read())["running_rows"] == 0:
            pass
        process.send_signal(signal.SIGTERM)
        client.join(timeout=60)
        [(status, text)] = answers
        assert status in (500, 503)
        assert json.loads(text)["error"]["message"]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_behind_both_outputs_keeps_nobody_from_being_served(tiny_model: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    address = f"http://127.0.0.1:{port}"
    command = [sys.executable, "-m", "steerserve.cli", "serve", "--model", str(tiny_model), "--port", str(port)]
    # Where Python buffers its output, what it could not write is still in the buffer when it ends.
    buffered = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    with open("/dev/full", "w") as full, subprocess.Popen(command, stdout=full, stderr=full, env=buffered) as process:
        try:
            while True:
                assert process.poll() is None, "the server ended before it was ready"
                with suppress(urllib.error.URLError), urllib.request.urlopen(f"{address}/ready", timeout=5):
                    break
                time.sleep(0.1)
            assert post(address, {"model": tiny_model.name, "max_tokens": 4})[0] == 200
            process.send_signal(signal.SIGTERM)
            assert process.wait(timeout=30) == 0
        finally:
            process.kill()
