"""The rows of a forward: those that write, and behind them those that are there to compare with or to be read."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from steerserve.engine.request.request import Request
from steerserve.steering.push import Applied, Push

Purpose = Literal["guidance", "measuring", "reading"]
"""Classifier-free guidance is away from it; the KL of the row's own pushes is measured against it; the row is read by
it, since a push of its own would show in what is read."""


@dataclass(frozen=True, eq=False)
class ExtraRow:
    """A row that writes nothing: it shows the canvas of one that does, under other pushes."""

    source: int
    """The row of the batch whose canvas it shows."""
    serves: frozenset[Purpose]
    pushes: tuple[Push, ...] = ()
    hides_prompt: bool = False
    """True if its canvas shows the response alone, and masks elsewhere."""


def extra_rows(requests: Sequence[Request]) -> list[ExtraRow]:
    """Those that the rows of a batch need: as many as `Request.rows` counts.

    Their pushes are copies, so that no receipt counts what they did."""
    guided = [
        # Pushed as its row is: guidance is towards the prompt alone.
        ExtraRow(i, frozenset({"guidance"}), _copies(push for push in one.pushes if push.op != "read"), True)
        for i, one in enumerate(requests)
        if one.guided
    ]
    measured = [
        ExtraRow(
            i,
            # Without an imposed push nothing pushes it, and its row can be read by it as well.
            frozenset({"measuring", "reading"} if one.read_apart and not one.bare else {"measuring"}),
            _copies(one.imposed),
        )
        for i, one in enumerate(requests)
        if one.measured
    ]
    bare = [ExtraRow(i, frozenset({"reading"})) for i, one in enumerate(requests) if one.bare]
    return [*guided, *measured, *bare]


class ForwardRows:
    """The F rows of a forward: the R rows of the batch, then the extra ones."""

    def __init__(self, requests: Sequence[Request], device: torch.device) -> None:
        self.extra, self._count = extra_rows(requests), len(requests)
        sources = [*range(len(requests)), *(one.source for one in self.extra)]
        self.requests = [requests[source] for source in sources]
        """The request behind each row of the forward [F]."""
        self.pushes: list[Sequence[Push]] = [*(one.pushes for one in requests), *(one.pushes for one in self.extra)]
        self.host_source = torch.tensor(sources)
        self.source = self.host_source.to(device)
        """The row of the batch [F] whose canvas each row shows."""
        hides = [False] * len(requests) + [one.hides_prompt for one in self.extra]
        self.hides_prompt = torch.tensor(hides, device=device) if any(hides) else None
        """Rows [F] bool in which all but the response is masked; None: in none."""
        self.baseline, self.unprompted, self.reader = (
            torch.tensor(self._serving(purpose), device=device) for purpose in ("measuring", "guidance", "reading")
        )
        """Which row [R] each row of the batch is measured against, guided away from, and read by; itself where no extra
        one is there for that."""

    def spread(self, rows: Tensor) -> Tensor:
        """What the rows of the forward [F, ...] have of what those of the batch [R, ...] have, on the device or not."""
        if not self.extra:
            return rows
        return rows[self.source if rows.device == self.source.device else self.host_source]

    def _serving(self, purpose: Purpose) -> list[int]:
        found = list(range(self._count))
        for place, one in enumerate(self.extra, self._count):
            if purpose in one.serves:
                found[one.source] = place
        return found


def _copies(pushes: Iterable[Push]) -> tuple[Push, ...]:
    return tuple(replace(push, applied=Applied()) for push in pushes)
