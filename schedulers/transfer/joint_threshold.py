"""As many as the model is sure of, and other tokens for those that it has changed its mind about."""

from dataclasses import dataclass

from torch import Tensor

from schedulers.choice import integer, number
from schedulers.transfer.threshold import Threshold


@dataclass(frozen=True)
class JointThreshold(Threshold):
    """Masks commit as under `threshold`; a committed token of the block is replaced where the model's token is another
    one of a probability above `editing_threshold`.

    Both are read from one forward of the canvas before the step. A full block makes steps that only replace, until one
    replaces nothing, and `max_post_steps` of them at most. Source: the token editing of LLaDA2.1 (arXiv 2602.08676) and
    `generate` of its published checkpoints.
    """

    value: float = 0.7
    """Above 0, up to 1; the quality mode of the authors. 0.5 is their speed mode."""
    editing_threshold: float = 0.5
    """0 to 1; 0 replaces wherever the likeliest token is another one, as in their speed mode."""
    max_post_steps: int = 16
    """Steps of a block that is full, 0 or more; 0: what the last masks were filled by is not looked at again."""

    def __post_init__(self) -> None:
        super().__post_init__()
        number("editing_threshold", self.editing_threshold, 0, 1)
        integer("max_post_steps", self.max_post_steps, low=0)

    @property
    def edits(self) -> bool:
        """True: that is what it is for."""
        return True

    @property
    def full_steps(self) -> int:
        """`max_post_steps`."""
        return self.max_post_steps

    def replaces(self, probability: Tensor) -> Tensor:
        """Which other tokens [N] bool are sure enough to replace those that stand, by their probability [N]."""
        return probability > self.editing_threshold
