"""The files of a folder as Kubernetes mounts one: a ConfigMap or Secret, whose content changes by a symbolic link.

Such a volume holds the files in a folder `..TIME`, a link `..data` to it, and links through `..data` that have the
names of the files. An update writes another folder and renames a new `..data` over the old one. What begins with two
dots is therefore never read by its own name: each file would be found twice, and the old one of an update as well.
"""

import os
from collections.abc import Iterator
from pathlib import Path

HIDDEN = ".."


def files_below(root: Path) -> list[Path]:
    """Every file below a folder, by links too, in the order of their paths; each folder is looked into once."""
    return sorted(_walk(root, set()))


def _walk(folder: Path, seen: set[str]) -> Iterator[Path]:
    real = os.path.realpath(folder)
    if real in seen:
        return
    seen.add(real)
    try:
        entries = sorted(folder.iterdir())
    except PermissionError:
        # Such as lost+found at the root of a volume: not ours to read.
        return
    for entry in entries:
        if entry.name.startswith(HIDDEN):
            continue
        if entry.is_dir():
            yield from _walk(entry, seen)
        elif entry.is_file():
            yield entry
