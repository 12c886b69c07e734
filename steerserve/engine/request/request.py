"""One admitted row: what it asked for, resolved, and what its forwards have told."""

from dataclasses import dataclass, field, replace
from typing import Any, Final

from torch import Tensor

from schedulers import Order
from steerserve.engine.api.conditions import Quantity
from steerserve.engine.api.events import Trace
from steerserve.engine.request.controllers import InterventionController
from steerserve.engine.request.cursor import BlockCursor
from steerserve.engine.request.intervention import ActiveIntervention, AttributeReadout, Forward
from steerserve.engine.request.kl_budget import PredictedBudget
from steerserve.engine.request.kv_cache import RowCache
from steerserve.engine.request.readouts import Readout
from steerserve.saes import SparseAutoencoder
from steerserve.steering.push import Push

MAX_ENDS: Final = 2**31
"""More end tokens than any model has."""


@dataclass(eq=False, kw_only=True)
class Request(BlockCursor):
    """A row of the engine; only the engine changes it after admission."""

    id: str
    order: Order
    interventions: tuple[ActiveIntervention, ...]
    readouts: tuple[AttributeReadout, ...]
    stability: SparseAutoencoder | None
    """The SAE that an order compares between steps."""
    uptake: AttributeReadout | None
    """The attribute that an order reads at each position."""
    plan: dict[str, Any]
    catalogue: Any
    """The `Catalogue` that it was admitted with, by which it is judged and billed whatever is loaded meanwhile."""
    budget: PredictedBudget | None = None
    """What is left of the predicted KL; None without a limit on it."""
    cache: RowCache | None = None
    bare_cache: RowCache | None = None
    """Cache of the row without pushes that is read in its place, where there is one (`bare`)."""
    made: list[Forward] = field(default_factory=list)
    """Each step made with a forward: all but those at which nothing was to commit."""
    at_bound: int = 0
    """Positions that it took, sure of them or not, because a block could make no more steps."""
    revised: int = 0
    """Committed tokens that its transfer has taken back so far, masked again or replaced."""
    logprobs: dict[int, float] = field(default_factory=dict)
    top_logprobs: dict[int, tuple[tuple[int, float], ...]] = field(default_factory=dict)
    since: int = 0
    """Step from which its interventions hold."""
    earlier: list[tuple[ActiveIntervention, int, int]] = field(default_factory=list)
    """Interventions that others have replaced, with the steps [first, last + 1) at which they held."""
    trace: list[Trace] = field(default_factory=list)
    features: Tensor | None = None
    """Top feature ids of each position at the last step [canvas, k], for orders that compare steps."""
    due: tuple[int, int] = (0, 0)
    """When it is its turn in the queue: step of the engine, priority counted in, and number of arrival."""
    passed_over: int = 0
    """Steps at which rows behind it in the queue went past it."""
    finished: bool = False
    writes: bool = True
    """True if it has a response; else `canvas` and `params` are those of one position, which is never written."""

    @property
    def chooses_blindly(self) -> bool:
        """Tell if the positions that commit are known without their candidates, so that only those need be drawn."""
        return self.order.needs | self.transfer.needs <= {"uniform"}

    @property
    def draws(self) -> bool:
        """Tell if anything of it is drawn; where nothing is, rows that differ in their noise alone are all alike."""
        sampled = self.params.temperature != 0 and self.params.top_k != 1
        return sampled or "uniform" in self.order.needs | self.transfer.needs

    @property
    def opens_alone(self) -> bool:
        """Tell if this step commits the first token of its block and no other, as `Cache.first_alone` asks."""
        return self.cache is not None and self.cache.settings.first_alone and self.block_step == 0

    @property
    def may_skip(self) -> bool:
        """Tell if a step at which nothing commits may go without a forward: nothing is remembered or read there."""
        read = self.params.trace is not None and self.step % self.params.trace.every == 0
        idles = self.transfer.idles or self.block_steps > self.block_total
        return idles and not read and not self.watches and self.transfer.needs <= {"uniform"} and self.stability is None

    @property
    def barred_ends(self) -> int:
        """How many of the model's end tokens it may not draw, the end of text first; more than there are: all."""
        return MAX_ENDS if self.params.ignore_eos else int(self.params.logits_eos_inf)

    @property
    def passes(self) -> int:
        """Forward passes made for it so far, those that judged its drafts among them."""
        return self.forward_passes + (0 if self.refinement is None else self.refinement.passes)

    @property
    def guided(self) -> bool:
        return self.params.cfg_scale > 0

    @property
    def rows(self) -> int:
        """Rows of the forward it takes."""
        return 1 + self.guided + self.measured + self.bare

    @property
    def measured(self) -> bool:
        """Tell if its twin, a row without its own pushes, runs beside it: the one place that says so."""
        return self.measures_kl and bool(self.own)

    @property
    def reads(self) -> frozenset[int]:
        """The layers at which it is read to decide anything; a trace decides nothing."""
        found = frozenset[int]().union(*(one.layers for one in self.gauges.values()))
        found |= frozenset() if self.stability is None else {self.stability.facts.layer}
        return found if self.uptake is None else found | {self.uptake.push.layer}

    @property
    def read_apart(self) -> bool:
        """Tell if a push of its own would show in what is read: then a row without any push is read in its place. What
        arrives at the first layer pushed, or before it, holds none."""
        first = min((push.layer for one in self.interventions for push in one.pushes), default=None)
        return first is not None and any(layer > first for layer in self.reads)

    @property
    def bare(self) -> bool:
        """Tell if a row without any push has to be made for it to be read: that by which its KL is measured is one,
        unless something is imposed."""
        return self.read_apart and (not self.measured or bool(self.imposed))

    @property
    def read_of(self) -> str | None:
        """Name of the row that it is read from, as plans and receipts state it; None where nothing is read."""
        if not self.reads:
            return None
        return "unsteered twin" if self.read_apart else "the row, before its pushes"

    @property
    def measures_kl(self) -> bool:
        """Tell if the KL of its own pushes is measured where it has any: asked for, or limited."""
        return self.params.measure_kl or self.kl_limit is not None

    @property
    def kl_limit(self) -> float | None:
        """The most that its own pushes may be from the unsteered row, in measured nats, summed over the response."""
        limits = self.params.limits
        return None if limits is None or limits.max_kl is None else limits.max_kl * self.params.max_tokens

    @property
    def refuses(self) -> bool:
        """Tell if it ends where it would go over a limit; else its pushes are made smaller."""
        return self.params.limits is not None and self.params.limits.on_exceed == "refuse"

    @property
    def measured_nats(self) -> float:
        """Nats that the tokens committed so far are, by the full distributions, from the unsteered row's; summed over
        what was measured."""
        return sum(one.kl for one in self.made if one.kl is not None)

    @property
    def measured_kl(self) -> float | None:
        """The same a response token: divided by `max_tokens`, as its limit and the predicted KL are, also of a row that
        ended before all of them were written. None where it is not measured, or was not from the first push on."""
        whole = self.measures_kl and all(one.kl is not None for one in self.made)
        return self.measured_nats / self.params.max_tokens if whole else None

    @property
    def forward_passes(self) -> int:
        """Forward passes made, those that were made again with smaller pushes included."""
        return sum(one.tries for one in self.made)

    @property
    def takes_likeliest(self) -> bool:
        """Tell if this step takes the likeliest token whatever the temperature."""
        return self.ending and self.transfer.ending == "likeliest"

    @property
    def controllers(self) -> list[InterventionController]:
        """What decides about its interventions while it runs."""
        return [one.controller for one in self.interventions if one.controller is not None]

    @property
    def gauges(self) -> dict[Quantity, Readout]:
        """What it reads after each forward."""
        found = {} if self.triggers is None else dict(self.triggers.gauges)
        for controller in self.controllers:
            found.update(controller.gauges)
        return found

    @property
    def watches(self) -> bool:
        """Tell if anything is decided after each of its forwards."""
        return self.triggers is not None or any(one.controller is not None for one in self.interventions)

    @property
    def drafted(self) -> bool:
        """Tell if a draft is written that has yet to be judged."""
        ended = self.finished or self.aborted
        return self.refinement is not None and self.refinement.going and self.is_done and not ended

    @property
    def pushes(self) -> list[Push]:
        """Every push and readout of the row."""
        return [
            *(push for one in self.interventions for push in one.pushes),
            *(readout.push for readout in self.readouts),
        ]

    @property
    def own(self) -> list[Push]:
        """The caller's own pushes."""
        return [push for one in self.interventions if not one.mandatory for push in one.pushes]

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
        # What it kept may be of another state of the canvas.
        self.bare_cache = other.bare_cache
        spent = self.budget
        self.budget = other.budget if spent is None or other.budget is None else other.budget.after(spent)

    def begin(self) -> Forward:
        """The forward that it is about to make, which counts once it is among those `made`."""
        unmeasured = bool(self.own) and not self.measures_kl
        return Forward(self.step, self.length - self.masked, self.interventions, kl=None if unmeasured else 0.0)

    def nats_with(self, nats: float) -> float:
        """What `measured_nats` is once a forward of so many is made."""
        return sum([*(one.kl for one in self.made if one.kl is not None), nats])
