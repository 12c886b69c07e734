"""What the engine needs of the processes that make its forward passes."""

from collections.abc import Sequence
from typing import Any, Protocol

from torch import Tensor


class Workers(Protocol):
    """Makes forward passes over some rows at a time."""

    def run(self, rows: Sequence[tuple[list[int], dict[str, Any]]]) -> list[Tensor]:
        """The packed reply of each row, in order, given as its canvas and the parameters it travels with."""
        ...

    def close(self) -> None:
        """End them; nothing runs any more."""
        ...
