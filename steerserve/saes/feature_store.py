"""What is known of each feature of an SAE: `features.db` beside its weights, a SQLite file.

Tables: `meta` (key, value as JSON), `features` (id, name, score), `records` (what is known of each, JSON in compressed
blocks of BLOCK features), `vocabulary` (words for spelling), and `search`, a full-text index (FTS5) over names, words,
tokens and contexts.
"""

import json
import sqlite3
import threading
import weakref
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from steerserve.errors import ArtifactError
from steerserve.pointers import refuse_pointer

FEATURES = "features.db"
FORMAT: Final = 1
BLOCK: Final = 16
"""Features whose records are compressed together."""
COLUMNS: Final = ("name", "words", "tokens", "contexts")
"""What is searched, and how much a word in each counts."""
WEIGHTS: Final = (10.0, 5.0, 3.0, 1.0)


@dataclass(frozen=True)
class FeatureEntry:
    """One feature as it is written."""

    index: int
    name: str | None
    score: float | None
    """How well the name tells its contexts from others, 0.5 for chance; None where it was not measured."""
    record: Mapping[str, Any]
    """Everything else, as JSON."""
    searched: Sequence[str]
    """Text of each of COLUMNS."""


def write_store(path: Path, meta: Mapping[str, Any], entries: Iterable[FeatureEntry]) -> None:
    """Write the file whole, or leave what was there."""
    partial = path.with_name(f"{path.name}.partial")
    partial.unlink(missing_ok=True)
    with _opened(sqlite3.connect(partial)) as database:
        _fill(database, meta, entries)
        database.execute("VACUUM")
    partial.rename(path)


def _fill(database: sqlite3.Connection, meta: Mapping[str, Any], entries: Iterable[FeatureEntry]) -> None:
    database.executescript(
        f"""
        PRAGMA page_size = 4096;
        CREATE TABLE meta (key TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
        CREATE TABLE features (id INTEGER PRIMARY KEY, name TEXT, score REAL);
        CREATE TABLE records (block INTEGER PRIMARY KEY, data BLOB NOT NULL);
        CREATE TABLE vocabulary (word TEXT PRIMARY KEY) WITHOUT ROWID;
        CREATE VIRTUAL TABLE search USING fts5({", ".join(COLUMNS)}, content='',
            tokenize="porter unicode61 remove_diacritics 2");
        CREATE VIRTUAL TABLE found USING fts5vocab(search, 'row');
        """
    )
    written = {"format": FORMAT, **meta}
    database.executemany("INSERT INTO meta VALUES (?, ?)", [(key, json.dumps(value)) for key, value in written.items()])
    words: set[str] = set()
    blocks: dict[int, dict[int, Mapping[str, Any]]] = {}
    for entry in entries:
        database.execute("INSERT INTO features VALUES (?, ?, ?)", (entry.index, entry.name, entry.score))
        if entry.record:
            blocks.setdefault(entry.index // BLOCK, {})[entry.index] = entry.record
        if any(entry.searched):
            places = ", ".join("?" * len(COLUMNS))
            columns = f"rowid, {', '.join(COLUMNS)}"
            database.execute(f"INSERT INTO search ({columns}) VALUES ({places}, ?)", (entry.index, *entry.searched))
            words.update(word for text in entry.searched[:3] for word in spelled(text))
    for number, block in blocks.items():
        data = zlib.compress(json.dumps(block, ensure_ascii=False, separators=(",", ":")).encode(), 9)
        database.execute("INSERT INTO records VALUES (?, ?)", (number, data))
    database.executemany("INSERT INTO vocabulary VALUES (?)", [(word,) for word in sorted(words)])
    database.execute("INSERT INTO search (search) VALUES ('optimize')")
    database.commit()


def spelled(text: str) -> list[str]:
    """The words of a text that a query may mean, case-folded."""
    kept = "".join(char if char.isalnum() else " " for char in text.casefold())
    return [word for word in kept.split() if len(word) > 2]


class FeatureStore:
    """A `features.db`, read only; any thread may ask."""

    def __init__(self, database: sqlite3.Connection, name: str) -> None:
        self._database, self._lock = database, threading.Lock()
        # The file is released with the store: the services that share it do not know which of them is the last.
        self._release = weakref.finalize(self, database.close)
        self.meta: dict[str, Any] = {
            key: json.loads(value) for key, value in database.execute("SELECT key, value FROM meta")
        }
        if self.meta.get("format") != FORMAT:
            raise ArtifactError(f"{name}: format {self.meta.get('format')!r}, but {FORMAT} is read")
        rows = database.execute("SELECT id, name, score FROM features ORDER BY id").fetchall()
        self.names: dict[int, str] = {index: label for index, label, _ in rows if label is not None}
        self.scores: dict[int, float] = {index: score for index, _, score in rows if score is not None}

    @classmethod
    def open(cls, path: Path, features: int, sae_sha256: str) -> "FeatureStore":
        """The store of an SAE; raises ArtifactError for a broken one and for one of another SAE."""
        refuse_pointer(path)
        try:
            # Immutable: a package may lie where nothing can be written.
            uri = f"{path.resolve().as_uri()}?mode=ro&immutable=1"
            store = cls(sqlite3.connect(uri, uri=True, check_same_thread=False), str(path))
        except (sqlite3.Error, ValueError) as error:
            raise ArtifactError(f"{path} is no file of features: {error}") from error
        if store.meta.get("sae_sha256") != sae_sha256:
            raise ArtifactError(
                f"{path} is of the SAE {store.meta.get('sae_sha256')}, not of {sae_sha256}: label again"
            )
        if any(not 0 <= index < features for index in (*store.names, *store.scores)):
            raise ArtifactError(f"{path} has features beyond 0 to {features - 1}")
        return store

    @classmethod
    def of_labels(cls, labels: Mapping[int, str]) -> "FeatureStore":
        """A store in memory of names alone."""
        database = sqlite3.connect(":memory:", check_same_thread=False)
        entries = (FeatureEntry(i, label, None, {}, (label, "", "", "")) for i, label in sorted(labels.items()))
        _fill(database, {}, entries)
        return cls(database, "labels")

    def close(self) -> None:
        """Release the file; it is also released with the store."""
        self._release()

    def record(self, index: int) -> dict[str, Any] | None:
        """What is known of a feature beside its name; None where it is not in the file."""
        rows = self._rows("SELECT data FROM records WHERE block = ?", (index // BLOCK,))
        block: dict[str, dict[str, Any]] = json.loads(zlib.decompress(rows[0][0])) if rows else {}
        return block.get(str(index))

    def vocabulary(self) -> list[str]:
        """Different words of names, words and tokens, sorted."""
        return [word for (word,) in self._rows("SELECT word FROM vocabulary ORDER BY word", ())]

    def matching(self, words: Sequence[str]) -> dict[int, float]:
        """Features that hold one of the words or a word that begins with it, and how well: larger is better."""
        weights = ", ".join(map(str, WEIGHTS))
        sql = f"SELECT rowid, -bm25(search, {weights}) FROM search WHERE search MATCH ?"
        return {index: float(value) for index, value in self._rows(sql, (_any_of(words),))}

    def named(self, words: Sequence[str]) -> set[int]:
        """Features whose name holds one of the words or a word that begins with it."""
        sql = "SELECT rowid FROM search WHERE search MATCH ?"
        return {index for (index,) in self._rows(sql, (f"name : ({_any_of(words)})",))}

    def _rows(self, sql: str, values: tuple[Any, ...]) -> list[Any]:
        with self._lock:
            return self._database.execute(sql, values).fetchall()


def _any_of(words: Sequence[str]) -> str:
    """The query of FTS5 for one of the words, or a word that begins with it."""
    quoted = [f'"{word}"' for word in words]
    return " OR ".join([*quoted, *(f"{one}*" for one in quoted)])


@contextmanager
def _opened(database: sqlite3.Connection) -> Iterator[sqlite3.Connection]:
    try:
        yield database
    finally:
        database.close()
