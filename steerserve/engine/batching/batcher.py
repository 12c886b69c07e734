"""The batcher chooses the rows of the next step: those that run already, those that wait, and how many fit beside each
other."""

import logging
from collections.abc import Sequence
from dataclasses import replace

from steerserve.engine.api.events import Event, Failed, Steered
from steerserve.engine.batching.memory import MemoryLimits
from steerserve.engine.batching.queue import Queue
from steerserve.engine.request.request import Request
from steerserve.models import ModelFacts

logger = logging.getLogger(__name__)
STEPS_A_ROW = 64
"""Steps that fit into memory for each row more after some that did not."""


class Batcher:
    """The rows of an engine, running and waiting; it knows no tensors."""

    def __init__(self, facts: ModelFacts, limits: MemoryLimits, max_rows: int) -> None:
        """limits: what a forward may take; max_rows: the most rows of one."""
        self.waiting = Queue(facts)
        self.limits, self.max_rows = limits, max_rows
        self.rows: list[Request] = []
        """The rows that run."""
        self.room: float = max_rows
        """Rows of one forward: half after one that did not fit into memory, then one more every few steps that do."""
        self.steps = 0
        """Steps made so far, the clock of the queue."""
        self.aborted: set[str] = set()
        """Rows to end before the next step."""
        self.steered: list[Steered] = []
        """Changes of steering since the last step, which have yet to be told."""
        self.changed: set[str] = set()
        """Rows whose steering has changed and which may take up more than they did."""
        self.shortened = False
        """True if a canvas lost positions in the last step, so that its tensors have to be made anew."""

    @property
    def running(self) -> list[Request]:
        """The rows of the next forward, as far as they are chosen."""
        return [request for request in self.rows if not request.finished]

    @property
    def unfinished(self) -> list[Request]:
        """The rows that run and those that wait."""
        return [*self.running, *iter(self.waiting)]

    def add(self, requests: Sequence[Request]) -> None:
        """Queue rows."""
        self.waiting.add(requests, self.steps)

    def steer(self, request: Request, other: Request) -> None:
        """Give a row the interventions of another one from its next step on."""
        request.steer(other)
        self.steered.append(Steered(request.id, request.step, tuple(request.plan["interventions"])))

    def drain_notices(self) -> tuple[list[Event], set[str]]:
        """End the rows that were aborted; what there is to tell of them and of changes of steering, and the ids that
        were to be aborted, running or not."""
        aborted, self.aborted = self.aborted, set()
        steered, self.steered = self.steered, []
        self.changed |= {event.request_id for event in steered}
        gone = [request for request in self.unfinished if request.id in aborted]
        events: list[Event] = [*steered, *(Failed(request.id, "aborted", aborted=True) for request in gone)]
        for request in gone:
            request.finished = True
        if gone:
            self.waiting.drop(aborted)
        return events, aborted

    def schedule(self) -> bool:
        """Let waiting rows join while there is room; whether the rows of the next forward are others than before, or
        their canvases or steering are."""
        changed, self.changed = self.changed, set()
        shortened, self.shortened = self.shortened, False
        staying, limits = self.running, replace(self.limits, rows=self.room)
        if changed:
            staying = self.waiting.give_way(staying, limits, changed)
        joining = self.waiting.take(staying, limits)
        others = bool(joining or changed or shortened or len(staying) < len(self.rows))
        self.rows = staying + joining
        return others

    def made_step(self) -> None:
        """Note that a step of the rows fit into memory."""
        self.room = min(self.room + 1 / STEPS_A_ROW, self.max_rows)

    def preempt(self, ran: int, judging: bool) -> list[Event]:
        """After a step of `ran` rows that did not fit into memory: half of its rows wait for the others. A row that
        does not fit alone ends, unless it was the judging of its draft that did not fit."""
        rows, events = self.running, list[Event]()
        if ran == 1 and rows and not judging:
            logger.error("row %s does not fit into memory by itself", rows[0].id)
            events.append(Failed(rows[0].id, "out of memory"))
        elif rows:
            self.room = max(1, ran // 2)
            logger.warning("%d rows did not fit into memory: %d at a time now", ran, self.room)
            self.waiting.put_back(rows)
        # Last: rows that could not be put back are still there to end with the step.
        self.rows = []
        return events

    def leave(self) -> None:
        """Note that no row runs any more."""
        self.rows = []
        self.room = self.room if self.waiting else self.max_rows

    def clear(self) -> None:
        """Forget all rows."""
        self.waiting.clear()
        self.rows = []
