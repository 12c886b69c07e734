"""What a measurement keeps on disk."""

from pathlib import Path

import pytest

from steerserve.calibrate.profile.result_cache import ResultCache
from steerserve.errors import ArtifactError

SETTINGS = {"runs": 3, "edges": (0, 1)}


def test_what_was_found_is_not_found_again(tmp_path: Path) -> None:
    kept = ResultCache(tmp_path / "k", SETTINGS)
    assert kept.get("a/b", lambda: [1.5]) == [1.5] and kept.has("a/b") and not kept.has("a/c")
    again = ResultCache(tmp_path / "k", SETTINGS)
    assert again.get("a/b", lambda: [2.0]) == [1.5]
    again.drop()
    assert not (tmp_path / "k").exists()


def test_what_failed_on_the_way_is_not_kept(tmp_path: Path) -> None:
    kept = ResultCache(tmp_path, SETTINGS)
    with pytest.raises(ZeroDivisionError):
        kept.get("a", lambda: 1 / 0)
    assert not kept.has("a")
    # Nothing was found under these settings: others may begin.
    assert ResultCache(tmp_path, SETTINGS | {"runs": 4}).get("a", lambda: 2) == 2


def test_other_settings_are_refused(tmp_path: Path) -> None:
    ResultCache(tmp_path, SETTINGS).get("a", lambda: 1)
    with pytest.raises(ArtifactError, match=r"was begun with another runs: remove it to begin anew"):
        ResultCache(tmp_path, SETTINGS | {"runs": 4})


def test_a_broken_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "settings.json").write_text("[")
    with pytest.raises(ArtifactError, match="cannot be read as JSON"):
        ResultCache(tmp_path, SETTINGS)
