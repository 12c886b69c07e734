"""SHA-256 of large files, remembered between starts: hashing 16 GB takes longer than loading it."""

import hashlib
import json
import os
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

SETTLED_SECONDS = 2.0
"""A file younger than this is not remembered: a second write may leave its time stamp as it is."""
MAX_ENTRIES = 256


def files_sha256(files: Sequence[Path], anew: bool = False) -> str:
    """SHA-256 over the bytes of `files` one after the other, as 64 hexadecimal digits.

    A digest is remembered by path, size, time stamps and inode of every file, under `$XDG_CACHE_HOME/steerserve`;
    `anew` reads the files whatever is remembered. A cache that is broken or cannot be written costs time only.
    """
    key = _key(files)
    found = None if anew else _read_cache().get(key)
    if found is not None:
        return found
    digest = hashlib.sha256()
    for file in files:
        with open(file, "rb") as stream:
            hashlib.file_digest(stream, lambda: digest)
    youngest = max((file.stat().st_mtime for file in files), default=0.0)
    if _key(files) == key and time.time() - youngest > SETTLED_SECONDS:
        _remember(key, digest.hexdigest())
    return digest.hexdigest()


def cache_path() -> Path:
    """Where digests are remembered."""
    home = os.environ.get("XDG_CACHE_HOME", "")
    # The XDG base directory specification: a relative path is to be ignored.
    root = Path(home) if os.path.isabs(home) else Path("~/.cache").expanduser()
    return root / "steerserve" / "digests.json"


def _key(files: Sequence[Path]) -> str:
    stats = [(str(file.resolve()), file.stat()) for file in files]
    return json.dumps([[path, s.st_size, s.st_mtime_ns, s.st_ctime_ns, s.st_ino] for path, s in stats])


def _read_cache() -> dict[str, str]:
    try:
        raw = json.loads(cache_path().read_text(encoding="utf-8"))
    except (OSError, ValueError, RuntimeError):  # RuntimeError: there is no home folder
        return {}
    if not isinstance(raw, dict):
        return {}
    return {key: value for key, value in raw.items() if isinstance(value, str) and _is_digest(value)}


def _is_digest(text: str) -> bool:
    return len(text) == 64 and set(text) <= set("0123456789abcdef")


def _remember(key: str, digest: str) -> None:
    entries = _read_cache()
    entries.pop(key, None)
    kept = dict([*entries.items(), (key, digest)][-MAX_ENTRIES:])
    try:
        path = cache_path()
        path.parent.mkdir(parents=True, exist_ok=True)
        # Two servers may start at once: each replaces the file whole.
        with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False, encoding="utf-8") as stream:
            json.dump(kept, stream)
        os.replace(stream.name, path)
    except (OSError, RuntimeError):  # a read-only home is no fault of the model's
        return
