"""Making keys for the server's file."""

import argparse
import hashlib
import io
import json
from pathlib import Path

import pytest

from steerserve.cli import main
from steerserve.commands.keys import add_flags, run
from steerserve.server.auth.keys import KeyEntry, Keyring


def made(*arguments: str) -> int:
    parser = argparse.ArgumentParser()
    add_flags(parser)
    return run(parser.parse_args(arguments))


def test_a_made_key_opens_the_server_its_entry_is_given_to(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert made("team") == made("other") == 0
    said = capsys.readouterr()
    first, second = said.err.splitlines()
    assert first != second
    assert first not in said.out
    path = tmp_path / "keys.json"
    # As `keys team > FILE`, `keys other >> FILE` and a person with an editor would leave it.
    for text in (said.out, f"[{','.join(said.out.splitlines())}]"):
        path.write_text(text)
        keyring = Keyring(path, lambda _: None)
        assert [key and key.name for key in map(keyring.find, (first, second, "x"))] == ["team", "other", None]
    path.write_text(said.out.splitlines()[0])
    keyring = Keyring(path, lambda _: None)
    assert [key and key.name for key in map(keyring.find, (first, second))] == ["team", None]


def test_a_name_that_the_server_would_refuse_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["keys", "team a"]) == 2
    said = capsys.readouterr()
    assert said.out == "" and "name" in said.err and "sk-steer" not in said.err


def test_every_field_of_an_entry_is_in_the_help(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["keys", "--help"])
    said = capsys.readouterr().out
    assert [name for name in KeyEntry.model_fields if name not in said] == []


@pytest.mark.parametrize(
    ("flag", "content", "said"),
    [
        ("--keys", None, "not a readable file of keys"),
        ("--keys", "{", "not a readable file of keys"),
        ("--keys", '{"name": "team"}', "sha256"),
        ("--keys", '{"name": "a b", "sha256": "' + "0" * 64 + '"}', "name"),
        ("--vectors", None, "--vectors"),
        ("--tokenizer", None, "--tokenizer"),
    ],
)
def test_files_are_checked_before_the_model_is(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], flag: str, content: str | None, said: str
) -> None:
    """The model's folder is empty, which is found as soon as anything of it is read."""
    empty, file = tmp_path / "model", tmp_path / "named.json"
    empty.mkdir()
    if content is not None:
        file.write_text(content)
    assert main(["serve", "--model", str(empty), flag, str(file)]) == 2
    error = capsys.readouterr().err
    assert said in error and str(file) in error and "config.json" not in error


def test_a_key_that_is_there_is_hashed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("mine\n"))
    made("team", "--hash")
    said = capsys.readouterr()
    assert json.loads(said.out) == {"name": "team", "sha256": hashlib.sha256(b"mine").hexdigest()}
    assert said.err == ""


def test_what_a_key_imposes_is_checked_before_the_weights_are_loaded(
    tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What the weights take is said before they are loaded, and here not even that."""
    file = tmp_path / "keys.json"
    mandatory = [{"attribute": "no/such", "strength": 1.0}]
    file.write_text(json.dumps({"name": "team", "sha256": "0" * 64, "mandatory": mandatory}))
    assert main(["serve", "--model", str(tiny_model), "--keys", str(file)]) == 2
    error = capsys.readouterr().err
    assert "keys[0].mandatory" in error and "no/such" in error and " parameters, " not in error
