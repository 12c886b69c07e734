"""The cache of keys and values of a row, and when it goes stale."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final, Literal, get_args

import torch
from torch import Tensor

from schedulers.choice import integer, number
from schedulers.transfer import Threshold, Timesteps
from steerserve.steering.push import Push

Reason = Literal["block", "steering", "gain", "interval"]
"""Why a forward was a full one: a block began, the steering was changed, a schedule's gain moved, it was time."""
REASONS: Final[tuple[Reason, ...]] = get_args(Reason)


@dataclass(frozen=True)
class Cache:
    """How keys and values are reused within a block; the first forward of each block is a full one."""

    refresh_every: int | None = None
    """A full forward at least every so many; None: only where one of the other reasons asks for it."""
    gain_tolerance: float = 0.1
    """How far the gain of a push may be from what it was at the last full forward."""
    first_alone: bool = False
    """For a family whose tokens are decided one position to the left: whether the forward that begins a block commits
    its first token alone, whatever the order, and the others compute nothing before the block (Fast-dLLM's Dream loop).
    Otherwise they compute the state before the block as well, and all of it competes from the first forward on."""

    def __post_init__(self) -> None:
        if self.refresh_every is not None:
            object.__setattr__(self, "refresh_every", integer("refresh_every", self.refresh_every, low=1))
        object.__setattr__(self, "gain_tolerance", number("gain_tolerance", self.gain_tolerance, low=0))
        if not isinstance(self.first_alone, bool):
            raise ValueError(f"first_alone must be true or false, not {self.first_alone!r}")

    @property
    def name(self) -> str:
        """As requests call it."""
        return next(name for name, kind in CACHES.items() if isinstance(self, kind))


class Prefix(Cache):
    """What lies before the block is kept; the block and all behind it are computed (Fast-dLLM, section 3.2)."""


class Dual(Cache):
    """What lies before and behind the block is kept; only the block is computed (Fast-dLLM, section 3.2)."""


CACHES: Final[Mapping[str, type[Cache]]] = {"prefix": Prefix, "dual": Dual}


@dataclass(eq=False)
class RowCache:
    """The cache of one row, and what it has been used for."""

    settings: Cache
    kept: Tensor | None = None
    """Keys and values [layers, 2, heads, canvas, head size] while the row is in no batch."""
    full: dict[Reason, int] = field(default_factory=lambda: dict.fromkeys(REASONS, 0))
    """Full forwards, by the reason for each."""
    partial: int = 0
    """Forwards of a part of the canvas."""
    _block: int | None = None
    _pushes: tuple[Push, ...] = ()
    _gains: tuple[float, ...] = ()
    _since: int = 0

    def stale(self, block: int, pushes: tuple[Push, ...], progress: float) -> Reason | None:
        """Why the next forward has to be a full one; None where it need not. Pushes and the gains of the last full
        forward are the fingerprint of the steering that the keys and values were made under."""
        if block != self._block:
            return "block"
        if pushes != self._pushes:
            return "steering"
        moved = (abs(now - then) for now, then in zip(_gains(pushes, progress), self._gains, strict=True))
        if any(far > self.settings.gain_tolerance for far in moved):
            return "gain"
        every = self.settings.refresh_every
        return "interval" if every is not None and self._since >= every else None

    def refreshed(self, reason: Reason, block: int, pushes: tuple[Push, ...], progress: float) -> None:
        """Note a full forward."""
        self._block, self._pushes, self._gains, self._since = block, pushes, _gains(pushes, progress), 1
        self.full[reason] += 1

    def reused(self) -> None:
        """Note a forward of a part of the canvas."""
        self._since += 1
        self.partial += 1

    def computed(self, block: tuple[int, int], length: int, shift: int) -> tuple[int, int]:
        """Canvas positions [first, last + 1) that a forward of a part computes, for a block of a canvas of `length`:
        with the state before the block where that decides its first token."""
        first, last = block
        return max(0, first - (0 if self.settings.first_alone else shift)), length if isinstance(
            self.settings, Prefix
        ) else min(last, length)

    def set_aside(self) -> None:
        """Keep what is kept on the host, in memory of its own: that of the batch, which was of all its rows, can then
        be freed."""
        if self.kept is not None:
            own = torch.empty(self.kept.shape, dtype=self.kept.dtype)
            # Layer by layer: what does not lie in one piece is put together on the device before it is moved.
            for layer, kept in zip(own, self.kept, strict=True):
                layer.copy_(kept)
            self.kept = own

    def to_json(self) -> dict[str, Any]:
        """What a receipt says of it."""
        return {
            "full_forwards": sum(self.full.values()),
            "partial_forwards": self.partial,
            "full_because": {reason: count for reason, count in self.full.items() if count},
        }


FIRST_ALONE: Final = (Threshold, Timesteps)
"""Transfers of Fast-dLLM's Dream loop; others count on committing at the forward that begins a block."""


def _gains(pushes: tuple[Push, ...], progress: float) -> tuple[float, ...]:
    return tuple(float(push.gain_at(progress)) for push in pushes)
