"""One admitted row: what it asked for, resolved, and all the state of its denoising."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor

from schedulers import Order, Transfer
from steerserve.engine.budget import KlBudget
from steerserve.engine.cache import RowCache
from steerserve.engine.conditions import Reading
from steerserve.engine.events import Trace
from steerserve.engine.forward import Forward
from steerserve.engine.gauges import Gauge
from steerserve.engine.governor import Governor, Reactions, usual_step
from steerserve.engine.params import GenerationParams
from steerserve.engine.refinement import Refinement
from steerserve.engine.resolved import Readout, Resolved
from steerserve.saes import SparseAutoencoder
from steerserve.steering.push import Push


@dataclass(eq=False)
class Request:
    """A row of the engine; only the engine changes it after admission."""

    id: str
    params: GenerationParams
    prompt_ids: tuple[int, ...]
    suffix_ids: tuple[int, ...]
    mask_id: int
    steps: int
    block_length: int
    order: Order
    transfer: Transfer
    interventions: tuple[Resolved, ...]
    readouts: tuple[Readout, ...]
    stability: SparseAutoencoder | None
    """The SAE that an order compares between steps."""
    uptake: Readout | None
    """The attribute that an order reads at each position."""
    plan: dict[str, Any]
    reactions: Reactions | None = None
    """What ends the row or rewrites it; None where nothing does."""
    refinement: Refinement | None = None
    """What betters the finished text; None where nothing does."""
    budget: KlBudget | None = None
    """What is left to spend; None without a limit on it."""
    cache: RowCache | None = None
    canvas: list[int] = field(init=False)
    length: int = field(init=False)
    """Response positions that are left: less than were asked for after an early exit."""
    step: int = 0
    """Denoising steps done."""
    forwards: int = 0
    """Forward passes made: as many as steps, less those at which nothing was to commit."""
    made: list[Forward] = field(default_factory=list)
    """Each of them."""
    block: int = 0
    block_step: int = 0
    block_total: int = field(init=False)
    """Masked positions of the current block when it began."""
    prefix: int = 0
    """Response tokens committed without a gap from the left that nothing takes back any more."""
    logprobs: dict[int, float] = field(default_factory=dict)
    top_logprobs: dict[int, tuple[tuple[int, float], ...]] = field(default_factory=dict)
    since: int = 0
    """Step from which its interventions hold."""
    earlier: list[tuple[Resolved, int, int]] = field(default_factory=list)
    """Interventions that others have replaced, with the steps [first, last + 1) at which they held."""
    trace: list[Trace] = field(default_factory=list)
    features: Tensor | None = None
    """Top feature ids of each position at the last step [canvas, k], for orders that compare steps."""
    rewound: int | None = None
    """The block to go back to, where tokens have been masked again since the last step."""
    due: tuple[int, int] = (0, 0)
    """When it is its turn in the queue: step of the engine, priority counted in, and number of arrival."""
    passed_over: int = 0
    """Steps at which rows behind it in the queue went past it."""
    finished: bool = False

    def __post_init__(self) -> None:
        self.canvas = [*self.prompt_ids, *([self.mask_id] * self.params.max_tokens), *self.suffix_ids]
        self.block_total = self.block_length
        self.length = self.params.max_tokens

    @property
    def start(self) -> int:
        """Canvas position of the first response token."""
        return len(self.prompt_ids)

    @property
    def stop(self) -> int:
        """Canvas position after the last response token."""
        return self.start + self.length

    @property
    def response(self) -> list[int]:
        return self.canvas[self.start : self.stop]

    @property
    def masked(self) -> int:
        """Response positions that are still masked."""
        return self.response.count(self.mask_id)

    @property
    def reach(self) -> tuple[int, int]:
        """Canvas positions [first, last + 1) that are being written: the response, or the stretch of a round."""
        if self.refinement is None or self.refinement.stretch is None:
            return self.start, self.stop
        first, last = self.refinement.stretch
        return self.start + first, self.start + last

    @property
    def progress(self) -> float:
        """Share of what is being written that is committed."""
        masked, length = self.left
        # Not 1 - masked / length, which rounds twice and may fall short of the border of a slice.
        return (length - masked) / length

    @property
    def left(self) -> tuple[int, int]:
        """Positions of what is being written that are still masked, and all of them."""
        tokens = self.canvas[slice(*self.reach)]
        return tokens.count(self.mask_id), len(tokens)

    @property
    def block_span(self) -> tuple[int, int]:
        """Canvas positions [first, last + 1) of the current block."""
        first = self.start + self.block * self.block_length
        return first, min(first + self.block_length, self.stop)

    @property
    def block_steps(self) -> int:
        """Steps of one block."""
        return self.steps * self.block_length // self.params.max_tokens

    @property
    def chooses_blindly(self) -> bool:
        """Whether which positions commit is known without their candidates, so that only those need be drawn."""
        return self.order.needs | self.transfer.needs <= {"uniform"}

    @property
    def draws(self) -> bool:
        """Whether anything of it is drawn; where nothing is, rows that differ in their noise alone are all alike."""
        sampled = self.params.temperature != 0 and self.params.top_k != 1
        return sampled or "uniform" in self.order.needs | self.transfer.needs

    @property
    def may_skip(self) -> bool:
        """Whether a step at which nothing commits may go without a forward: nothing is remembered or read there."""
        read = self.params.trace is not None and self.step % self.params.trace.every == 0
        idles = self.transfer.idles or self.block_steps > self.block_total
        return idles and not read and not self.watches and self.transfer.needs <= {"uniform"} and self.stability is None

    @property
    def guided(self) -> bool:
        return self.params.cfg_scale > 0

    @property
    def rows(self) -> int:
        """Rows of the forward it takes."""
        return 1 + self.guided + self.measured

    @property
    def measured(self) -> bool:
        """Whether the KL of its own pushes is measured, by a row without them."""
        return self.params.measure_kl and any(one.pushes and not one.mandatory for one in self.interventions)

    @property
    def measured_kl(self) -> float:
        """Nats that the tokens committed so far are, by the full distributions, from the unsteered row's; summed."""
        return sum(one.kl for one in self.made)

    @property
    def ending(self) -> bool:
        """Whether this is the step after a block's last, which some transfers have for what is still masked."""
        return self.block_step == self.block_steps

    @property
    def takes_likeliest(self) -> bool:
        """Whether this step takes the likeliest token whatever the temperature."""
        return self.ending and self.transfer.ending == "likeliest"

    @property
    def governors(self) -> list[Governor]:
        """What decides about its interventions while it runs."""
        return [one.governor for one in self.interventions if one.governor is not None]

    @property
    def gauges(self) -> dict[Reading, Gauge]:
        """What it reads after each forward."""
        found = {} if self.reactions is None else dict(self.reactions.gauges)
        for governor in self.governors:
            found.update(governor.gauges)
        return found

    @property
    def watches(self) -> bool:
        """Whether anything is decided after each of its forwards."""
        return self.reactions is not None or any(one.governor is not None for one in self.interventions)

    @property
    def aborted(self) -> bool:
        """Whether a condition of its own has ended it."""
        return self.reactions is not None and self.reactions.aborted is not None

    @property
    def drafted(self) -> bool:
        """Whether a draft is written that has yet to be judged."""
        ended = self.finished or self.aborted
        return self.refinement is not None and self.refinement.going and self.over and not ended

    @property
    def stands(self) -> int:
        """Response positions from the left of which none is taken back any more, once it is committed."""
        before = self.block * self.block_length if self.transfer.remasks else self.length
        if self.aborted:
            return self.length
        if self.refinement is not None and self.refinement.going:
            return 0
        if self.over or self.reactions is None or not self.reactions.rewrites:
            return before
        return min(before, self.reactions.span(self.block_span, (self.start, self.stop))[0] - self.start)

    @property
    def blocks(self) -> int:
        return self.params.max_tokens // self.block_length

    @property
    def over(self) -> bool:
        """Whether every step has been made."""
        return self.block * self.block_length >= self.length

    @property
    def steps_left(self) -> int:
        """At most so many steps more."""
        rounds = 0 if self.refinement is None else self.refinement.rounds_left * self.refinement.round_steps
        return max(0 if self.over else 1, (self.blocks - self.block) * self.block_steps - self.block_step) + rounds

    @property
    def pushes(self) -> list[Push]:
        """Every push and readout of the row."""
        return [
            *(push for one in self.interventions for push in one.pushes),
            *(readout.push for readout in self.readouts),
        ]

    @property
    def imposed(self) -> list[Push]:
        """The pushes that are not the caller's own."""
        return [push for one in self.interventions if one.mandatory for push in one.pushes]

    def steer(self, other: "Request") -> None:
        """Take over the interventions of an equal row that was admitted with other ones, from the next step on."""
        if self.step > self.since:
            self.earlier += [(one, self.since, self.step) for one in self.interventions]
        self.since = self.step
        asked = other.params
        self.params = replace(self.params, interventions=asked.interventions, limits=asked.limits)
        # What the order reads is never another, whatever is pushed.
        other.plan["order"] = self.plan["order"]
        self.interventions, self.plan = other.interventions, other.plan
        spent = self.budget
        self.budget = other.budget if spent is None or other.budget is None else other.budget.after(spent)

    def begin(self) -> None:
        """Note the forward that it is about to make."""
        self.made.append(Forward(self.step, self.length - self.masked, self.interventions))

    def forget_attempt(self) -> None:
        """Forget a forward that did not fit into memory, and the gains that it was to have; plans must have been
        flushed."""
        del self.made[self.forwards :]
        for one in self.interventions:
            held = sum(any(one is other for other in forward.under) for forward in self.made)
            for push in one.pushes:
                del push.applied.gains[held:]

    def rewind(self, position: int) -> None:
        """Go back to the block of a canvas position, which has been masked again, with the next step."""
        self.rewound = (position - self.start) // self.block_length

    def write_again(self, place: tuple[int, int]) -> None:
        """Begin a round of its refinement, positions of its response having been masked: see `beginning`."""
        self.block, self.block_step = place

    def beginning(self, positions: Sequence[int]) -> tuple[int, int]:
        """The block and its step at which to write positions of the response anew, ascending."""
        block = positions[0] // self.block_length
        masked = sum(position < (block + 1) * self.block_length for position in positions)
        return block, usual_step(self.transfer, self.block_length, self.block_steps, masked)

    @property
    def _rewritten(self) -> bool:
        """Whether blocks behind the one being written may be full."""
        again = self.reactions is not None and bool(self.reactions.remasked)
        return again or self.refinement is not None and self.refinement.best is not None

    def _go_on(self) -> None:
        """To where a block lacks tokens, past those that were written before an earlier one was written again."""
        while not self.over and not self._lacking():
            self.block += 1
        if not self.over:
            self.block_step = usual_step(self.transfer, self.block_length, self.block_steps, self._lacking())

    def _lacking(self) -> int:
        """Masked positions of the current block, less those that its refinement began with: a model that drew its own
        mask token there has left them."""
        first, last = self.block_span
        masked = [i - self.start for i in range(first, last) if self.canvas[i] == self.mask_id]
        best = None if self.refinement is None else self.refinement.best
        return sum(best is None or best.tokens[i] != self.mask_id for i in masked)

    def advance(self) -> None:
        """Count the step just made, and go to the next block when this one is out of steps or full for good; back to
        an earlier one, or an earlier step, where tokens have been masked again."""
        self.step += 1
        self.block_step += 1
        if self.rewound is not None:
            # What is masked again may lie behind a stretch that is being written anew.
            self.block, self.rewound = min(self.block, self.rewound), None
            self._go_on()
        else:
            first, last = self.block_span
            full = self.mask_id not in self.canvas[first:last]
            steps = self.block_steps + (self.transfer.ending != "none" and not full)
            if self.block_step >= steps or full and not self.transfer.remasks:
                self.block += 1
                self.block_step = 0
                self.block_total = self.block_length
                if self._rewritten:
                    self._go_on()
        while self.prefix < self.stands and self.canvas[self.start + self.prefix] != self.mask_id:
            self.prefix += 1
