"""Texts from a data directory: gzipped JSON Lines, split by the hash of each text.

A data directory holds `*.jsonl` or `*.jsonl.gz` files in any depth; every row has a `text` and may have labels.
"""

import gzip
import hashlib
import json
import re
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from steerserve.errors import ArtifactError
from steerserve.pointers import refuse_pointer

Split = Literal["valid", "bench", "calibrate"]

# Shares of one epoch-like mix, by file stem, in tokens. Small sets are seen more often than their size says,
# so that every domain can be written; files that are not named here get the smallest share.
MIX = {
    "agnews_train": 0.32,
    "imdb_train": 0.20,
    "imdb_unsup": 0.08,
    "bible_train": 0.15,
    "goemotions_train": 0.09,
    "sst2_train": 0.09,
    "pavlick_train": 0.07,
}
DEFAULT_SHARE = 0.05

_PUNCTUATION_GAP = re.compile(r" (?=[.,!?;:)%]|n't\b|'(?:s|t|re|ve|ll|d|m)\b)")


def split_of(text: str) -> Split:
    """Where a text belongs, by its hash: 4 % held out for loss, 40 % for the bench's judges, the rest for calibration.

    The DLM and its SAEs train on all but `valid`; classifiers of `calibrate` and of `bench` never share a text.
    """
    bucket = int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big") % 100
    return "valid" if bucket < 4 else "bench" if bucket < 44 else "calibrate"


def rows(path: Path) -> Iterator[dict[str, Any]]:
    """The rows of one file, with texts of tokenised sets (SST-2) put back into ordinary spacing.

    Raises ArtifactError, with the line, where the file cannot be read or a row has no text.
    """
    refuse_pointer(path)
    number = 0
    opened = gzip.open if path.suffix == ".gz" else open
    try:
        with opened(path, "rt", encoding="utf-8-sig") as lines:
            for number, line in enumerate(lines, 1):
                if line.isspace():
                    continue
                row = _row(line, f"{path}, line {number}")
                if path.name.startswith("sst2"):
                    row["text"] = _PUNCTUATION_GAP.sub("", row["text"]).replace("-lrb- ", "(").replace(" -rrb-", ")")
                yield row
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise ArtifactError(f"{path} cannot be read after line {number}: {error}") from error


def _row(line: str, place: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise ArtifactError(f"{place}: not a JSON object: {error}") from error
    if not isinstance(row, dict):
        raise ArtifactError(f"{place}: every row must be a JSON object with a `text`, got {type(row).__name__}")
    if "text" not in row:
        raise ArtifactError(f"{place}: every row needs a `text`, got the fields {sorted(row)}")
    if not isinstance(row["text"], str):
        raise ArtifactError(f"{place}: `text` must be a string, got {type(row['text']).__name__}")
    return row


def files(data: Path) -> dict[str, Path]:
    """Training files of a data directory by stem, official dev sets left out; raises ArtifactError for none, and for
    two of one stem."""
    found: dict[str, Path] = {}
    for path in sorted(data.rglob("*.jsonl*")):
        stem = path.name.split(".")[0]
        if not path.name.endswith((".jsonl", ".jsonl.gz")) or stem.endswith("_dev") or not path.is_file():
            continue
        if stem in found:
            raise ArtifactError(f"{found[stem]} and {path} have one name, {stem!r}: rename one, or take it out")
        found[stem] = path
    if not found:
        raise ArtifactError(f"no .jsonl or .jsonl.gz file under {data}")
    return found
