"""What `transformers` reads from a folder: the files that lie there, and no code that comes with them."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


def from_folder(kind: str, folder: Path, **options: Any) -> Any:
    """A class of `transformers`, read from a folder's files; raises whatever the library does where they are broken.

    It asks no hub.
    """
    with quiet_transformers() as transformers:
        return getattr(transformers, kind).from_pretrained(str(folder), local_files_only=True, **options)


@contextmanager
def quiet_transformers() -> Iterator[Any]:
    """The library, whose warnings are not printed: they speak of classes that a user of this server never named.

    It is imported where a model is loaded, and nowhere else: it takes a second.
    """
    import transformers
    from transformers.utils.logging import get_verbosity, set_verbosity

    level = get_verbosity()
    set_verbosity(logging.ERROR)
    try:
        yield transformers
    finally:
        set_verbosity(level)
