"""Digests of large files: right always, remembered where that is safe, and never in the way."""

import hashlib
import json
import os
from pathlib import Path

import pytest

from steerserve.digests import cache_path, files_sha256


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def settled(path: Path, data: bytes) -> Path:
    """A file that was last written long ago, as far as its time stamp says."""
    path.write_bytes(data)
    os.utime(path, (1_000_000_000, 1_000_000_000))
    return path


def forge(digest: str) -> None:
    """Put another digest in the place of every one that is remembered."""
    remembered = json.loads(cache_path().read_text(encoding="utf-8"))
    cache_path().write_text(json.dumps(dict.fromkeys(remembered, digest)), encoding="utf-8")


def test_the_digest_is_of_all_bytes_in_order(tmp_path: Path) -> None:
    first, second = settled(tmp_path / "a", b"one"), settled(tmp_path / "b", b"two")
    assert files_sha256([first, second]) == hashlib.sha256(b"onetwo").hexdigest()
    assert files_sha256([second, first]) == hashlib.sha256(b"twoone").hexdigest()


def test_what_is_remembered_is_used_until_asked_anew(tmp_path: Path) -> None:
    file = settled(tmp_path / "a", b"one")
    true = files_sha256([file])
    forge("0" * 64)
    assert files_sha256([file]) == "0" * 64
    assert files_sha256([file], anew=True) == true
    assert files_sha256([file]) == true


@pytest.mark.parametrize("change", ["longer", "same size, later", "same size, same time", "another file"])
def test_a_changed_file_is_read_again(tmp_path: Path, change: str) -> None:
    file = settled(tmp_path / "a", b"one")
    files_sha256([file])
    if change == "another file":
        settled(tmp_path / "b", b"two").replace(file)
    elif change == "same size, later":
        file.write_bytes(b"two")
    else:
        settled(file, b"two!" if change == "longer" else b"two")
    assert files_sha256([file]) == hashlib.sha256(file.read_bytes()).hexdigest()


def test_a_file_just_written_is_not_remembered(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"one")
    files_sha256([tmp_path / "a"])
    assert not cache_path().exists()


@pytest.mark.parametrize("text", ["", "{", "[]", '{"a": 3}', '"x"', "\udcff"])
def test_a_broken_cache_costs_time_only(tmp_path: Path, text: str) -> None:
    cache_path().parent.mkdir(parents=True)
    cache_path().write_bytes(text.encode("utf-8", "surrogateescape"))
    file = settled(tmp_path / "a", b"one")
    assert files_sha256([file]) == hashlib.sha256(b"one").hexdigest()
    forge("0" * 64)
    assert files_sha256([file]) == "0" * 64


def test_a_remembered_value_that_is_no_digest_is_not_used(tmp_path: Path) -> None:
    file = settled(tmp_path / "a", b"one")
    true = files_sha256([file])
    forge("not hexadecimal")
    assert files_sha256([file]) == true


def test_a_cache_that_cannot_be_written_is_done_without(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "in the way").write_bytes(b"")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "in the way"))
    file = settled(tmp_path / "a", b"one")
    assert files_sha256([file]) == files_sha256([file]) == hashlib.sha256(b"one").hexdigest()


def test_the_cache_stands_where_the_specification_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/someone")
    for given in ("", "relative/path"):
        monkeypatch.setenv("XDG_CACHE_HOME", given)
        assert cache_path() == Path("/home/someone/.cache/steerserve/digests.json")
    monkeypatch.setenv("XDG_CACHE_HOME", "/elsewhere")
    assert cache_path() == Path("/elsewhere/steerserve/digests.json")


def test_the_cache_does_not_grow_without_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("steerserve.digests.MAX_ENTRIES", 6)
    for i in range(11):
        files_sha256([settled(tmp_path / f"file-{i}", str(i).encode())])
    remembered = json.loads(cache_path().read_text(encoding="utf-8"))
    assert list(remembered.values()) == [hashlib.sha256(str(i).encode()).hexdigest() for i in range(5, 11)]
