from pathlib import Path

import pytest

from steerserve.errors import ArtifactError
from steerserve.server.fleet.secret import VARIABLE, derived, read_secrets

OLD, NEW = "o" * 32, "n" * 40


def test_secrets_come_from_a_file_or_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "secret"
    path.write_text(f"{NEW}\n\n  {OLD}\n")
    assert read_secrets(path) == (NEW.encode(), OLD.encode())
    monkeypatch.setenv(VARIABLE, OLD)
    assert read_secrets(None) == (OLD.encode(),)
    assert read_secrets(path)[0] == NEW.encode()


def test_what_is_no_secret_is_refused_and_never_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    with pytest.raises(ArtifactError, match=f"{VARIABLE}: holds no secret"):
        read_secrets(None)
    with pytest.raises(ArtifactError, match="not a readable file"):
        read_secrets(tmp_path / "missing")
    path = tmp_path / "secret"
    path.write_text(f"{NEW}\nshort")
    with pytest.raises(ArtifactError, match="32 characters or more") as refused:
        read_secrets(path)
    assert "short" not in str(refused.value).replace(str(path), "")


def test_each_use_has_a_key_of_its_own() -> None:
    keys = {derived(secret.encode(), use) for secret in (OLD, NEW) for use in ("ids", "requests")}
    assert len(keys) == 4
    assert {len(key) for key in keys} == {32}
