"""What a run decides while it goes: an intervention's gain and whether it holds, and the end or rewriting of a row."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from schedulers import Transfer
from steerserve.engine.api.conditions import (
    Condition,
    Reading,
    Remask,
    holds,
    parse_condition,
    parse_remask,
    readings,
)
from steerserve.engine.api.params import Choice, GenerationParams
from steerserve.engine.catalogue import Catalogue
from steerserve.engine.feedback import Loop
from steerserve.engine.gauges import Gauge, gauge
from steerserve.errors import RequestError
from steerserve.steering.push import Dial


@dataclass(eq=False)
class Governor:
    """Of one intervention of one row."""

    gauges: Mapping[Reading, Gauge]
    loop: Loop | None = None
    when: Condition | None = None
    dial: Dial = field(default_factory=Dial)
    """Of all its pushes."""
    begun: bool = False
    """Whether the gain of the first push has been worked out."""
    passes: int = 0
    """Forwards at which its condition held."""

    def notes(self, strength: float) -> list[str]:
        """What a plan says beside the number it cannot know."""
        found = []
        if self.loop is not None:
            found.append(
                f"the strength at each step depends on the run: 0 to {strength * self.loop.config.peak:g}, by what the "
                f"forward before it read"
            )
        if self.when is not None:
            found.append("pushes only while its condition holds, which is judged after each forward for the next")
        return found

    def settle(self, values: Mapping[Reading, float], progress: float) -> None:
        """Set the dial for the next forward; the loop has been turned."""
        self.begun = True
        if self.loop is not None:
            self.dial.gain = self.loop.gain
        if self.when is not None:
            self.dial.held = holds(self.when, values, progress)

    def count(self, values: Mapping[Reading, float], gain: float) -> None:
        """Keep what a forward read, whether the push held at it, and the gain that it then had."""
        self.passes += self.dial.held
        if self.loop is not None:
            self.loop.readings.append(values[self.loop.reading])
            self.loop.gains.append(gain)

    def receipt(self) -> dict[str, Any]:
        """What it adds to the receipt of its intervention."""
        told: dict[str, Any] = {} if self.loop is None else {"feedback": self.loop.receipt()}
        return told if self.when is None else told | {"held_passes": self.passes}


@dataclass(eq=False)
class Reactions:
    """Of one row: what ends it, what has tokens of it written anew, and what came of that."""

    gauges: Mapping[Reading, Gauge]
    abort: Condition | None
    remask: Remask | None
    aborted: dict[str, Any] | None = None
    """Step and progress at which it was ended, and what it answers: what was committed, or its best draft."""
    remasked: list[dict[str, Any]] = field(default_factory=list)

    @property
    def rewrites(self) -> bool:
        """Whether tokens may yet be masked again."""
        return self.remask is not None and len(self.remasked) < self.remask.times

    def span(self, block: tuple[int, int], response: tuple[int, int]) -> tuple[int, int]:
        """Canvas positions [first, last + 1) of which the committed ones are masked; block and response are those of
        the canvas, as it is."""
        assert self.remask is not None
        if isinstance(self.remask.span, tuple):
            return response[0] + self.remask.span[0], response[0] + self.remask.span[1]
        return block if self.remask.span == "block" else response

    def due(self, values: Mapping[Reading, float], progress: float) -> tuple[bool, bool]:
        """Whether to end the row, and whether to mask tokens again."""
        abort = self.abort is not None and holds(self.abort, values, progress)
        again = self.rewrites and self.remask is not None and holds(self.remask.condition, values, progress)
        return abort, again and not abort

    def receipt(self) -> dict[str, Any]:
        """What it adds to the row's receipt."""
        told: dict[str, Any] = {} if self.abort is None else {"aborted": self.aborted}
        return told if self.remask is None else told | {"remasked": self.remasked}


def govern(catalogue: Catalogue, loop: Loop | None, when: Choice | None, param: str) -> Governor | None:
    """What governs an intervention (param) with this loop and condition; None where nothing does."""
    if loop is None and when is None:
        return None
    condition = None if when is None else condition_of(when, f"{param}.when")
    found = _gauges(catalogue, [] if condition is None else readings(condition), f"{param}.when")
    if loop is not None and loop.reading not in found:
        found[loop.reading] = gauge(catalogue, loop.reading, f"{param}.schedule")
    return Governor(found, loop, condition)


def react(params: GenerationParams, catalogue: Catalogue, steps: int, max_steps: int) -> Reactions | None:
    """What a row reacts to, of `steps` steps; None where it asks for nothing. Raises RequestError."""
    if params.abort_when is None and params.remask_when is None:
        return None
    abort = None if params.abort_when is None else condition_of(params.abort_when, "abort_when")
    remask = None
    if params.remask_when is not None:
        try:
            remask = parse_remask(params.remask_when)
        except ValueError as error:
            raise RequestError(f"remask_when: {error}", "remask_when") from error
        if isinstance(remask.span, tuple) and remask.span[1] > params.max_tokens:
            raise RequestError(
                f"remask_when: a span is [first, last + 1) of the response, 0 to {params.max_tokens}, got "
                f"{list(remask.span)}",
                "remask_when",
            )
        if most_steps(steps, remask) > max_steps:
            raise RequestError(
                f"remask_when: {steps} steps, as many again up to {remask.times} times, are "
                f"{most_steps(steps, remask)}; at most {max_steps} are made",
                "remask_when",
            )
    found = _gauges(catalogue, readings(abort) if abort is not None else (), "abort_when")
    found |= _gauges(catalogue, readings(remask.condition) if remask is not None else (), "remask_when")
    return Reactions(found, abort, remask)


def most_steps(steps: int, remask: Remask | None) -> int:
    """The most steps that a row of `steps` makes: what is masked again is written in as many at most."""
    return steps * (1 + (0 if remask is None else remask.times))


def round_steps(transfer: Transfer, blocks: int, block_length: int, block_steps: int, span: int) -> int:
    """The most steps that a stretch of `span` positions is written in, wherever in the blocks it lies."""
    touched = min(blocks, (span + block_length - 2) // block_length + 1)
    left = block_steps - usual_step(transfer, block_length, block_steps, min(span, block_length))
    return touched * (left + (transfer.ending != "none"))


def usual_step(transfer: Transfer, length: int, steps: int, masked: int) -> int:
    """The latest of a block's steps before which as many of its positions are masked as are now; by the masked share
    where the transfer does not say beforehand."""
    planned = transfer.masked(length, steps)
    if planned is not None:
        return max(step for step, left in enumerate(planned) if left >= masked)
    return min(steps - 1, steps * (length - masked) // length)


def condition_of(value: Any, param: str) -> Condition:
    """A condition's JSON; raises RequestError."""
    try:
        return parse_condition(value)
    except ValueError as error:
        raise RequestError(f"{param.rpartition('.')[2]}: {error}", param) from error


def _gauges(catalogue: Catalogue, wanted: Iterable[Reading], param: str) -> dict[Reading, Gauge]:
    return {one: gauge(catalogue, one, param) for one in dict.fromkeys(wanted)}
