"""Making keys for the server's file."""

import argparse
import hashlib
import io
import json
from pathlib import Path

import pytest

from steerserve.commands.keys import add_flags, run
from steerserve.server.keys import Keyring


def made(*arguments: str) -> int:
    parser = argparse.ArgumentParser()
    add_flags(parser)
    return run(parser.parse_args(arguments))


def test_a_made_key_opens_the_server_its_entry_is_given_to(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert made("team") == made("other") == 0
    said = capsys.readouterr()
    first, second = said.err.splitlines()
    assert first != second
    path = tmp_path / "keys.json"
    path.write_text(f"[{','.join(said.out.splitlines())}]")
    keyring = Keyring(path, lambda _: None)
    assert [key and key.name for key in map(keyring.find, (first, second, "x"))] == ["team", "other", None]
    assert first not in said.out


def test_a_key_that_is_there_is_hashed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("mine\n"))
    made("team", "--hash")
    said = capsys.readouterr()
    assert json.loads(said.out) == {"name": "team", "sha256": hashlib.sha256(b"mine").hexdigest()}
    assert said.err == ""
