"""Git LFS pointers: the small text files that stand where a large file was not fetched."""

from pathlib import Path

from steerserve.errors import ArtifactError

FIRST_BYTES = b"version https://git-lfs"


def refuse_pointer(path: Path) -> None:
    """Raise ArtifactError where `path` holds a Git LFS pointer in place of its content.

    Every reader of a downloaded file calls it first, because a pointer is text and each format would otherwise complain
    of it in words of its own. A file that cannot be opened is left for the reader to report.
    """
    try:
        with open(path, "rb") as stream:
            first = stream.read(len(FIRST_BYTES))
    except OSError:
        return
    if first == FIRST_BYTES:
        raise ArtifactError(f"{path} is a Git LFS pointer, not the file itself: fetch it with git lfs pull")
