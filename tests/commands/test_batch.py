"""`steerserve batch` as a process: it is killed, run again, and what stands in its file."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from steerserve.cli import main
from tests.server.planned_engine import SECRET, entry, keys_file
from tests.server.sockets import PATIENCE
from tests.server.test_process import ROOT, Served, served


def written(path: Path, count: int, **body: Any) -> Path:
    asked = {"model": "text", "prompt": "the", "max_tokens": 8} | body
    lines = [
        {"custom_id": f"r{number}", "method": "POST", "url": "/v1/completions", "body": asked | {"seed": number}}
        for number in range(count)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def command(server: Served, source: Path, out: Path, *flags: str) -> list[str]:
    return ["batch", str(source), str(out), "--url", f"http://127.0.0.1:{server.port}", *flags]


def names(out: Path) -> list[str]:
    return [json.loads(line)["custom_id"] for line in out.read_text().splitlines()]


def killed_at(lines: int, arguments: list[str], out: Path, by: signal.Signals) -> int:
    """Run the command, end it once its file has so many lines, and return its exit code."""
    process = subprocess.Popen([sys.executable, "-m", "steerserve.cli", *arguments], cwd=ROOT, stderr=subprocess.PIPE)
    until = time.monotonic() + PATIENCE
    while not out.exists() or out.read_bytes().count(b"\n") < lines:
        assert time.monotonic() < until and process.poll() is None
        time.sleep(0.002)
    process.send_signal(by)
    process.communicate(timeout=PATIENCE)
    return process.returncode


def test_a_batch_that_is_killed_again_and_again_has_each_line_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, out = written(tmp_path / "in.jsonl", 400), tmp_path / "out.jsonl"
    with served(delay=0.001) as server:
        arguments = command(server, source, out, "--concurrency", "16")
        assert killed_at(50, arguments, out, signal.SIGKILL) == -signal.SIGKILL
        # As a kill in the middle of a line leaves it.
        out.write_bytes(out.read_bytes() + b'{"id": "batch_req_0", "custom_id": "r')
        assert killed_at(150, arguments, out, signal.SIGKILL) == -signal.SIGKILL
        # A server so slow that the batch cannot end before the signal is taken.
        with served(delay=0.2) as slow:
            asked = command(slow, source, out, "--concurrency", "16")
            assert killed_at(out.read_bytes().count(b"\n") + 1, asked, out, signal.SIGINT) == 130
        before = out.read_bytes()
        assert len(set(names(out))) == len(names(out)) < 400
        assert main(arguments) == 0
        assert "400 requests: 400 served" in capsys.readouterr().err
        assert main(arguments) == 0, "there is nothing left to ask for"
    assert sorted(names(out)) == sorted(f"r{number}" for number in range(400))
    assert out.read_bytes().startswith(before), "what was written stays"


def test_the_exit_code_tells_whether_all_were_served(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, out = written(tmp_path / "in.jsonl", 2), tmp_path / "out.jsonl"
    wrong = {"custom_id": "bad", "method": "POST", "url": "/v1/completions", "body": {"model": "other"}}
    source.write_text(source.read_text() + json.dumps(wrong) + "\n")
    with served() as server:
        assert main(command(server, source, out)) == 1
        assert "3 requests: 2 served, 1 status 404; 0 sent again" in capsys.readouterr().err
        source.write_text(source.read_text().replace('"other"', '"text", "prompt": "the"'))
        assert main(command(server, source, out)) == 1, "a line that is there is not asked for again"
        assert main(command(server, source, out, "--retry-failed")) == 0
    assert sorted(names(out)) == ["bad", "r0", "r1"]


@pytest.mark.parametrize("way", ["file", "environment"])
def test_the_key_comes_from_a_file_or_the_environment(
    way: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    source, out, key = written(tmp_path / "in.jsonl", 2), tmp_path / "out.jsonl", tmp_path / "key"
    monkeypatch.delenv("STEERSERVE_API_KEY", raising=False)
    with served(keys=str(keys_file(tmp_path, entry()))) as server:
        assert main(command(server, source, out)) == 2
        if way == "environment":
            monkeypatch.setenv("STEERSERVE_API_KEY", SECRET)
            assert main(command(server, source, out)) == 0
        else:
            key.write_text(SECRET + "\n")
            assert main(command(server, source, out, "--key-file", str(key))) == 0
            key.write_text(f"{SECRET} {SECRET}")
            assert main(command(server, source, out, "--key-file", str(key))) == 2
    assert SECRET not in capsys.readouterr().err


def test_wrong_input_is_one_line_and_exit_code_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, out = written(tmp_path / "in.jsonl", 2), tmp_path / "out.jsonl"
    for arguments in (
        [str(tmp_path / "nowhere"), str(out)],
        [str(source), str(tmp_path)],
        [str(source), str(out), "--url", "here"],
        [str(source), str(out), "--concurrency", "0"],
        [str(source), str(out), "--key-file", str(tmp_path / "nowhere")],
    ):
        assert main(["batch", *arguments]) == 2
        error = capsys.readouterr().err
        assert error.startswith("steerserve: ") and error.count("\n") == 1
    assert not out.exists()


def test_a_batch_needs_neither_torch_nor_a_web_server(tmp_path: Path) -> None:
    source, out = written(tmp_path / "in.jsonl", 2), tmp_path / "out.jsonl"
    code = """
import sys
from steerserve.cli import main
assert main(sys.argv[1:]) == 0
found = {"torch", "transformers", "numpy", "fastapi", "starlette"} & set(sys.modules)
assert not found, found
"""
    with served() as server:
        done = subprocess.run(
            [sys.executable, "-c", code, *command(server, source, out)],
            cwd=ROOT,
            env=os.environ,
            capture_output=True,
            check=False,
        )
    assert done.returncode == 0, done.stderr.decode()
