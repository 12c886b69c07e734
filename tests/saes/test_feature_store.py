"""The file of features, and the search over several."""

import gc
import sqlite3
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path

import pytest

from steerserve.errors import ArtifactError
from steerserve.saes.feature_record import turning_points
from steerserve.saes.feature_search import FeatureSearch
from steerserve.saes.feature_store import FEATURES, FeatureEntry, FeatureStore, write_store

NAMES = {
    "one": {0: "football, team, match", 3: '"match": lit, fire', 17: "stocks, shares, profit"},
    "two": {1: "team, hockey, league", 2: "beautiful music, song"},
}


@pytest.fixture
def stores(tmp_path: Path) -> Iterator[dict[str, list[FeatureStore]]]:
    found = {}
    for name, names in NAMES.items():
        path = tmp_path / name / FEATURES
        path.parent.mkdir()
        entries = [
            FeatureEntry(
                index, text, 0.9 if index else 0.6, {"words": [name, index]}, (text, "", "striker", "of the game")
            )
            for index, text in names.items()
        ]
        write_store(path, {"sae_sha256": "aa"}, entries)
        found[name] = [FeatureStore.open(path, 20, "aa")]
    yield found
    for several in found.values():
        several[0].close()


def test_records_and_names_are_read_back(stores: dict[str, list[FeatureStore]]) -> None:
    [store] = stores["one"]
    assert store.names == NAMES["one"] and store.scores[17] == 0.9
    assert store.record(17) == {"words": ["one", 17]}
    assert store.record(4) is None and store.record(1000) is None


@pytest.mark.parametrize(
    ("query", "first"),
    [
        ("match football", ("one", 0)),
        ("football match", ("one", 0)),
        ("LIT", ("one", 3)),
        ("hock", ("two", 1)),
        ("footbal", ("one", 0)),
        ("foobtall", ("one", 0)),
        ("beatiful", ("two", 2)),
        ("songs", ("two", 2)),
        ("profits and shares", ("one", 17)),
    ],
)
def test_words_are_found_in_any_order_by_beginning_and_misspelt(
    stores: dict[str, list[FeatureStore]], query: str, first: tuple[str, int]
) -> None:
    assert FeatureSearch(stores).ranked(query, ["one", "two"])[0] == first


def test_what_holds_more_of_the_words_comes_first_and_nothing_is_found_for_nonsense(
    stores: dict[str, list[FeatureStore]],
) -> None:
    search = FeatureSearch(stores)
    assert search.ranked("team league", ["one", "two"])[:2] == [("two", 1), ("one", 0)]
    assert search.ranked("team league", ["one"]) == [("one", 0)]
    assert len(search.ranked("striker", ["one", "two"])) == 5
    for query in ("qqqqzzzz", "...", '"; DROP TABLE search', "NEAR( AND"):
        assert all(isinstance(key, tuple) for key in search.ranked(query, ["one", "two"]))
    assert search.ranked("qqqqzzzz", ["one", "two"]) == []


def test_a_name_that_holds_the_word_comes_before_all_that_only_stands_near_it(tmp_path: Path) -> None:
    near = FeatureEntry(0, "paris, on", 1.0, {}, ("paris, on", "football football", "football", "football"))
    named = FeatureEntry(1, "cup, football", 0.5, {}, ("cup, football", "a b c d e f g h", "", ""))
    write_store(tmp_path / FEATURES, {"sae_sha256": "aa"}, [near, named])
    store = FeatureStore.open(tmp_path / FEATURES, 2, "aa")
    for query in ("football", "footb", "footbal"):
        assert FeatureSearch({"a": [store]}).ranked(query, ["a"]) == [("a", 1), ("a", 0)], query
    store.close()


def test_labels_alone_are_searched_too() -> None:
    store = FeatureStore.of_labels({8: "sports scores", 5: "kings"})
    assert FeatureSearch({"a": [store]}).ranked("score", ["a"]) == [("a", 8)]
    store.close()


def test_a_store_that_nobody_holds_releases_its_file(tmp_path: Path) -> None:
    write_store(tmp_path / FEATURES, {"sae_sha256": "aa"}, [])
    for format_, whole in ((1, True), (2, False)):
        database = sqlite3.connect(tmp_path / FEATURES)
        database.execute("UPDATE meta SET value = ? WHERE key = 'format'", (format_,))
        with nullcontext() if whole else pytest.raises(ArtifactError, match="format"):
            FeatureStore(database, "features")
        gc.collect()
        with pytest.raises(sqlite3.ProgrammingError, match="closed"):
            database.execute("SELECT 1")


def test_a_file_of_another_sae_or_none_is_refused(stores: dict[str, list[FeatureStore]], tmp_path: Path) -> None:
    assert stores
    path = tmp_path / "one" / FEATURES
    with pytest.raises(ArtifactError, match="is of the SAE aa, not of bb"):
        FeatureStore.open(path, 20, "bb")
    with pytest.raises(ArtifactError, match="beyond 0 to 9"):
        FeatureStore.open(path, 10, "aa")
    broken = tmp_path / FEATURES
    broken.write_bytes(b"no database" * 100)
    with pytest.raises(ArtifactError, match="is no file of features"):
        FeatureStore.open(broken, 20, "aa")


def test_turning_points_of_a_curve() -> None:
    assert turning_points([0, 0, 1, 2, 2]) == (0.5, 0.75)
    assert turning_points([3, 3, 3]) == (None, None)
    assert turning_points([0, 0, 0, 0, 1]) == (1.0, 1.0)
