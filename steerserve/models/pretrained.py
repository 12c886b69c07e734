"""What `transformers` reads from a folder: the files that lie there, and no code that comes with them."""

from pathlib import Path
from typing import Any


def from_folder(kind: str, folder: Path, **options: Any) -> Any:
    """A class of `transformers`, read from a folder's files; raises whatever the library does where they are broken.

    The library is imported here, where a model is loaded, and nowhere else: it takes a second. It asks no hub, and
    what it would warn of is not printed, since it speaks of classes that a user of this server never named.
    """
    import transformers
    from transformers.utils import logging

    level = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        return getattr(transformers, kind).from_pretrained(str(folder), local_files_only=True, **options)
    finally:
        logging.set_verbosity(level)
