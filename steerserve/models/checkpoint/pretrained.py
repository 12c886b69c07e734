"""What `transformers` reads from a folder: the files that lie there, and no code that comes with them."""

import logging
from pathlib import Path
from typing import Any


def from_folder(kind: str, folder: Path, **options: Any) -> Any:
    """A class of `transformers`, read from a folder's files; raises whatever the library does where they are broken.

    The library is imported here, where a model is loaded, and nowhere else: it takes a second. It asks no hub, and
    what it would warn of is not printed, since it speaks of classes that a user of this server never named.
    """
    import transformers
    from transformers.utils.logging import get_verbosity, set_verbosity

    level = get_verbosity()
    set_verbosity(logging.ERROR)
    try:
        return getattr(transformers, kind).from_pretrained(str(folder), local_files_only=True, **options)
    finally:
        set_verbosity(level)
