"""The block cursor: how a row goes through its blocks, and back to earlier ones where tokens are masked again."""

from collections.abc import Sequence
from dataclasses import dataclass

from schedulers import Transfer
from steerserve.engine.request.canvas import Canvas
from steerserve.engine.request.controllers import Triggers


def usual_step(transfer: Transfer, length: int, steps: int, masked: int) -> int:
    """The latest of a block's steps before which as many of its positions are masked as are now; by the masked share
    where the transfer does not say beforehand."""
    planned = transfer.masked(length, steps)
    if planned is not None:
        return max(step for step, left in enumerate(planned) if left >= masked)
    return min(steps - 1, steps * (length - masked) // length)


@dataclass(eq=False, kw_only=True)
class BlockCursor(Canvas):
    """The blocks and steps in which a row's response is written."""

    steps: int
    """Steps of all blocks together; the most there may be, where they do not bind the transfer."""
    block_length: int
    transfer: Transfer
    lead: int = 0
    """Positions of the first block that the prompt fills, where a model's own blocks count from the canvas's start."""
    triggers: Triggers | None = None
    """What ends the row or rewrites it; None where nothing does."""
    step: int = 0
    """Denoising steps done."""
    block: int = 0
    block_step: int = 0
    prefix: int = 0
    """Response tokens committed without a gap from the left that nothing takes back any more."""
    full_since: int | None = None
    """The step of the current block before which it was full first, where its transfer replaces tokens."""
    rewound: int | None = None
    """The block to go back to, where tokens have been masked again since the last step."""

    @property
    def block_total(self) -> int:
        """Response positions of the current block; of the last one, where every step has been made."""
        return self._size(min(self.block, self.blocks - 1))

    @property
    def blocks(self) -> int:
        """Blocks of the response."""
        return -(-(self.lead + self.params.max_tokens) // self.block_length)

    @property
    def block_steps(self) -> int:
        """Steps of one block, or the most that it may make: see `Transfer.binds`."""
        return self.steps // self.blocks

    @property
    def block_span(self) -> tuple[int, int]:
        """Canvas positions [first, last + 1) of the current block."""
        start, (first, last) = self.start, self._span(self.block)
        return start + first, min(start + last, start + self.length)

    @property
    def is_done(self) -> bool:
        """Tell if every step has been made."""
        return max(0, self.block * self.block_length - self.lead) >= self.length

    @property
    def ending(self) -> bool:
        """Tell if this is the step after a block's last, which some transfers have for what is still masked."""
        return self.block_step == self.block_steps

    @property
    def bounded(self) -> bool:
        """Tell if this step is one that ends a block for want of steps alone: its transfer would go on, but may not."""
        return not self.transfer.binds and self.block_step == self.block_steps - 1

    @property
    def steps_left(self) -> int:
        """At most so many steps more."""
        rounds = 0 if self.refinement is None else self.refinement.steps_left
        return max(0 if self.is_done else 1, (self.blocks - self.block) * self.block_steps - self.block_step) + rounds

    @property
    def aborted(self) -> bool:
        """Tell if a condition of its own has ended it."""
        return self.triggers is not None and self.triggers.aborted is not None

    @property
    def num_final(self) -> int:
        """Response positions from the left of which none is taken back any more, once it is committed."""
        before = self._span(self.block)[0] if self.transfer.revises else self.length
        if self.aborted:
            return self.length
        if self.refinement is not None and self.refinement.going:
            return 0
        if self.is_done or self.triggers is None or not self.triggers.rewrites:
            return before
        return min(before, self.triggers.span(self.block_span, (self.start, self.stop))[0] - self.start)

    def rewind(self, position: int) -> None:
        """Go back to the block of a canvas position, which has been masked again, with the next step."""
        self.rewound = self._block_of(position - self.start)

    def write_again(self, place: tuple[int, int]) -> None:
        """Begin a round of its refinement, positions of its response having been masked: see `beginning`."""
        self.block, self.block_step = place

    def beginning(self, positions: Sequence[int]) -> tuple[int, int]:
        """The block and its step at which to write positions of the response anew, ascending."""
        block = self._block_of(positions[0])
        masked = sum(self._block_of(position) == block for position in positions)
        return block, usual_step(self.transfer, self._size(block), self.block_steps, masked)

    def advance(self, changed: bool = True) -> None:
        """Count the step just made, and go to the next block when this one is out of steps or full for good; back to
        an earlier one, or an earlier step, where tokens have been masked again.

        changed: whether anything committed at it, which decides where tokens are replaced.
        """
        self.step += 1
        self.block_step += 1
        if self.rewound is not None:
            # What is masked again may lie behind a stretch that is being written anew.
            self.block, self.rewound = min(self.block, self.rewound), None
            self.full_since = None
            self._go_on()
        else:
            first, last = self.block_span
            full = self.mask_id not in self.canvas[first:last]
            steps = self.block_steps + (self.transfer.ending != "none" and not full)
            if self.block_step >= steps or full and self._settled(changed):
                self.block += 1
                self.block_step, self.full_since = 0, None
                if self._rewritten:
                    self._go_on()
        while self.prefix < self.num_final and self.canvas[self.start + self.prefix] != self.mask_id:
            self.prefix += 1

    def _settled(self, changed: bool) -> bool:
        """Tell if a full block stays as it is: for good, or because its last step replaced nothing, or because it may
        make no more."""
        if not self.transfer.edits:
            return not self.transfer.remasks
        looked_at = self.full_since is not None
        if self.full_since is None:
            self.full_since = self.block_step
        return looked_at and not changed or self.block_step - self.full_since >= self.transfer.full_steps

    def _span(self, block: int) -> tuple[int, int]:
        """Response positions [first, last + 1) of a block; behind the last one, the end of the response twice."""
        first, most = block * self.block_length - self.lead, self.params.max_tokens
        return min(max(0, first), most), min(max(0, first + self.block_length), most)

    def _size(self, block: int) -> int:
        """Response positions of a block."""
        first, last = self._span(block)
        return last - first

    def _block_of(self, position: int) -> int:
        """The block of a response position."""
        return (self.lead + position) // self.block_length

    @property
    def _rewritten(self) -> bool:
        """Tell if blocks behind the one being written may be full."""
        again = self.triggers is not None and bool(self.triggers.remasked)
        return again or self.refinement is not None and self.refinement.best is not None

    def _go_on(self) -> None:
        """To where a block lacks tokens, past those that were written before an earlier one was written again."""
        while not self.is_done and not self._lacking():
            self.block += 1
        if not self.is_done:
            self.block_step = usual_step(self.transfer, self._size(self.block), self.block_steps, self._lacking())

    def _lacking(self) -> int:
        """Masked positions of the current block, less those that its refinement began with: a model that drew its own
        mask token there has left them."""
        first, last = self.block_span
        masked = [i - self.start for i in range(first, last) if self.canvas[i] == self.mask_id]
        best = None if self.refinement is None else self.refinement.best
        return sum(best is None or best.tokens[i] != self.mask_id for i in masked)
