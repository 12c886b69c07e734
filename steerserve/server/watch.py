"""A watch on files that others change: what they are is compared every few seconds.

Names and sizes are looked at, not notices of the file system: a mounted ConfigMap changes by a symbolic link, which
takes the kubelet up to a minute anyway, and volumes over a network send no notices.
"""

import logging
import os
import threading
from collections.abc import Callable, Sequence
from pathlib import Path

logger = logging.getLogger(__name__)

Seen = frozenset[tuple[str, str, int, int]]


class Watch:
    """Calls `changed`, in a thread of its own, when files or what is below folders have become others.

    A change counts once two looks in a row have found the same, so that what is being written is left alone.
    """

    def __init__(self, paths: Sequence[Path], seconds: float, changed: Callable[[], None]) -> None:
        """seconds: between two looks."""
        self._paths = paths
        self._seconds = seconds
        self._changed = changed
        self._known = seen(paths)
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="watch", daemon=True)

    def start(self) -> None:
        """Look from now on."""
        self._thread.start()

    def stop(self) -> None:
        """Look no more; waits for a call that is being made."""
        self._ended.set()
        self._thread.join()

    def _run(self) -> None:
        last = self._known
        while not self._ended.wait(self._seconds):
            now = seen(self._paths)
            if now == last and now != self._known:
                self._known = now
                try:
                    self._changed()
                except Exception:
                    # The next change may be one that can be read.
                    logger.exception("what has changed could not be read again")
            last = now


def seen(paths: Sequence[Path]) -> Seen:
    """What files are: each one's path, where it really is, its size and when it changed. What cannot be looked at, or
    goes away meanwhile, is not there."""
    found = set()
    for path in paths:
        places = [path]
        entered: set[str] = set()
        for folder, folders, names in os.walk(path, followlinks=True):
            # A link may lead back to where it is.
            entered.add(os.path.realpath(folder))
            folders[:] = [name for name in folders if os.path.realpath(Path(folder, name)) not in entered]
            places += [Path(folder, name) for name in names]
        for place in places:
            try:
                facts = place.stat()
            except OSError:
                continue
            found.add((str(place), os.path.realpath(place), facts.st_size, facts.st_mtime_ns))
    return frozenset(found)
