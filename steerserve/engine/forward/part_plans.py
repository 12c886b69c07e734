"""The steering of rows that are split into several forwards."""

from collections.abc import Mapping

from torch import Tensor
from torch.nn import functional as F

from steerserve.steering.plan import SteeringPlan
from steerserve.steering.push import Push


class PartPlans:
    """The plans of the parts of F rows; rows are told by their numbers among all of them."""

    def __init__(self, plans: Mapping[tuple[int, ...], SteeringPlan], width: int) -> None:
        """plans: each by its rows; width: W, of the widest part."""
        self.plans, self._width = plans, width
        self._plan_of = {push: plan for plan in plans.values() for push in plan.places}

    def gain(self, push: Push) -> float:
        """Return the gain of a push at the step that was set."""
        return self._plan_of[id(push)].gain(push)

    def scale(self, push: Push, factor: float) -> None:
        """Multiply that gain, for this step."""
        self._plan_of[id(push)].scale(push, factor)

    def refused(self) -> dict[int, tuple[int, float, float]]:
        """Rows of the last passes whose pushes went over a bound that refuses, as `SteeringPlan.refused` tells them."""
        return {rows[row]: told for rows, plan in self.plans.items() for row, told in plan.refused().items()}

    def lost(self) -> dict[int, int]:
        """Rows with a push that their pass did not come by, with the first such layer."""
        return {rows[row]: layer for rows, plan in self.plans.items() for row, layer in plan.lost().items()}

    def readings(self) -> dict[int, float]:
        """Return the mean that every `read` push read in the last passes, by its `id()`."""
        return {push: value for plan in self.plans.values() for push, value in plan.readings().items()}

    def projections(self, push: Push) -> Tensor:
        """Return what a `read` push read at each state [W], 0 behind the end of the row's pass."""
        found = self._plan_of[id(push)].projections(push)
        return F.pad(found, (0, self._width - len(found)))

    def clear(self) -> None:
        """Forget what the last passes did: the step that was set is made again."""
        for plan in self.plans.values():
            plan.clear()

    def count(self) -> None:
        """Let the step that was set count as made, with what its last passes did."""
        for plan in self.plans.values():
            plan.count()

    def flush(self) -> None:
        """Bring every push's `applied` up to date with what counts."""
        for plan in self.plans.values():
            plan.flush()
