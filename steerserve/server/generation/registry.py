"""The generations that run and those that have ended lately, by their ids."""

from collections import OrderedDict
from typing import Final

from steerserve.errors import NotFoundError
from steerserve.server.generation.generation import Generation
from steerserve.server.protocol.parsing import shown
from steerserve.server.telemetry.record import CURRENT_RECORD

REMEMBERED: Final = 1024
"""Deleted generations whose ids are kept, so that deleting one again is no error."""


class Generations:
    """Used by the server's loop alone. A caller sees the generations of its own key, and no others."""

    def __init__(self) -> None:
        self._running: dict[str, Generation] = {}
        self._deleted: OrderedDict[tuple[str, str | None], None] = OrderedDict()

    @property
    def running(self) -> tuple[str, ...]:
        """Ids of those that run."""
        return tuple(self._running)

    def add(self, generation: Generation) -> None:
        """Note one that has begun."""
        self._running[generation.answer.id] = generation

    def forget(self, name: str) -> None:
        """Drop one that has ended."""
        self._running.pop(name, None)

    def find(self, name: str) -> Generation:
        """The running generation of that id; raises NotFoundError."""
        found = self._running.get(name)
        if found is None or found.key != CURRENT_RECORD.get().key or found.deleted:
            raise NotFoundError(f"no generation {shown(name)} runs", "id")
        return found

    def delete(self, name: str) -> None:
        """End a generation; raises NotFoundError for one that neither runs nor has been deleted before."""
        mark = (name, CURRENT_RECORD.get().key)
        if mark not in self._deleted:
            self.find(name).delete()
            self._deleted[mark] = None
            while len(self._deleted) > REMEMBERED:
                self._deleted.popitem(last=False)
