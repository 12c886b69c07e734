"""Texts from a data directory: gzipped JSON Lines, split by the hash of each text.

A data directory holds `*.jsonl` or `*.jsonl.gz` files in any depth; every row has a `text` and may have labels.
"""

import gzip
import hashlib
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from steerserve.errors import ArtifactError

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
    """The rows of one file, with texts of tokenised sets (SST-2) put back into ordinary spacing."""
    with gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else open(path, encoding="utf-8") as lines:
        for line in lines:
            row = json.loads(line)
            if "text" not in row:
                raise ArtifactError(f"{path}: every row needs a `text`, got the fields {sorted(row)}")
            if path.name.startswith("sst2"):
                row["text"] = _PUNCTUATION_GAP.sub("", row["text"]).replace("-lrb- ", "(").replace(" -rrb-", ")")
            yield row


def files(data: Path) -> dict[str, Path]:
    """Training files of a data directory by stem, official dev sets left out."""
    found = {path.name.split(".")[0]: path for path in sorted(data.rglob("*.jsonl*"))}
    found = {stem: path for stem, path in found.items() if not stem.endswith("_dev")}
    if not found:
        raise ArtifactError(f"no .jsonl or .jsonl.gz file under {data}")
    return found
