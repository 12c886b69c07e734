"""Finished cells as compressed JSON lines, so that a run that was stopped goes on, and results can be drawn again."""

import gzip
import json
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


class Store:
    """Records by the key of their cell, each written as soon as it is there."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.records: dict[str, dict[str, Any]] = {}
        if path.exists() and not self._read():
            # The run was stopped while it wrote; what comes after a broken end could not be read.
            self.keep(list(self.records))

    def put(self, key: str, record: Mapping[str, Any]) -> None:
        """Keep a record and append it to the file."""
        self.records[key] = {"key": key, **record}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with open(self.path, "ab") as file:
            file.write(_packed([self.records[key]]))

    def keep(self, keys: Sequence[str]) -> None:
        """Rewrite the file with these records only, in this order: what other settings left behind is dropped."""
        self.records = {key: self.records[key] for key in keys if key in self.records}
        partial = self.path.with_suffix(".partial")
        partial.parent.mkdir(parents=True, exist_ok=True)
        partial.write_bytes(_packed(list(self.records.values())))
        partial.rename(self.path)

    def _read(self) -> bool:
        """Read what is there; False where the end is broken."""
        try:
            with gzip.open(self.path, "rt", encoding="utf-8") as lines:
                for line in lines:
                    record = json.loads(line)
                    self.records[record["key"]] = record
        except (EOFError, gzip.BadGzipFile, zlib.error, ValueError):
            return False
        return True


def _packed(records: Sequence[Mapping[str, Any]]) -> bytes:
    """A gzip member without a time, so that the same records make the same file."""
    lines = "".join(json.dumps(record, separators=(",", ":")) + "\n" for record in records)
    return gzip.compress(lines.encode(), mtime=0)
