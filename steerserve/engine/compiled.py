"""Profiles read once and schedules compiled once: what admission would otherwise do again for every row."""

import hashlib
import json
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from typing import Any, Final, TypeVar

from schedulers import CommitmentProfile, GainTable, build_strength, compile_gains
from steerserve.engine.api.params import SLICES
from steerserve.steering.attribute import Attribute
from steerserve.steering.operators import SETS_VALUE

MOST: Final = 512
"""Results that are kept, those used last."""

T = TypeVar("T")


@dataclass(frozen=True, eq=False)
class CompiledSchedule:
    """A compiled schedule with its gains as numbers, which plans and receipts tell."""

    table: GainTable
    """Shared by every push that has it; nobody may write to it."""
    gains: tuple[float, ...]
    """[SLICES]"""


class CompiledSchedules:
    """Bounded, and safe from any thread. What is kept is immutable, and is of the very attribute that was asked for:
    another one of the same name has entries of its own."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._kept: OrderedDict[Hashable, tuple[object, Any]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._kept)

    def profile(self, attribute: Attribute) -> CommitmentProfile | None:
        """The profile of an attribute; None where it has none; raises ValueError for a broken one."""
        raw = attribute.profile
        return self.kept(attribute, "profile", lambda: CommitmentProfile.from_json(raw)) if raw else None

    def schedule(self, choice: str | Mapping[str, Any], attribute: Attribute | None, op: str) -> CompiledSchedule:
        """A choice of schedule, compiled for a push with op of the attribute, None for one of none; raises ValueError.

        Where op sets a projection and no norm is named, it is `peak`: the gain is the share of the way there.
        """
        sets = op in SETS_VALUE
        try:
            said = json.dumps(choice if isinstance(choice, str) else dict(choice), sort_keys=True)
        except (TypeError, ValueError):
            return self._compile(choice, attribute, sets)
        key = ("schedule", hashlib.sha256(said.encode()).digest(), sets)
        return self.kept(attribute, key, lambda: self._compile(choice, attribute, sets))

    def kept(self, owner: object, key: Hashable, make: Callable[[], T]) -> T:
        """What `make` has made for this owner and key, now or before; what it raises is raised and not kept."""
        # The owner is held beside what was made of it, so that no other object can come to its id.
        whole = (id(owner), key)
        with self._lock:
            if whole in self._kept:
                self._kept.move_to_end(whole)
                found: T = self._kept[whole][1]
                return found
        made = make()
        with self._lock:
            self._kept[whole] = (owner, made)
            while len(self._kept) > MOST:
                self._kept.popitem(last=False)
        return made

    def _compile(self, choice: str | Mapping[str, Any], attribute: Attribute | None, sets: bool) -> CompiledSchedule:
        schedule, norm = build_strength(choice)
        profile = None if attribute is None else self.profile(attribute)
        table = compile_gains(schedule, (norm or "peak") if sets else norm, profile, SLICES)
        return CompiledSchedule(table, tuple(table.gains.tolist()))
