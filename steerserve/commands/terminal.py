"""A generation in the terminal: the canvas redrawn at every denoising step."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.text import Text

from steerserve.engine.api.base import Engine
from steerserve.engine.api.events import Committed, Done, Event, Failed, Result, Revised
from steerserve.engine.api.params import GenerationParams
from steerserve.engine.api.text import INCOMPLETE
from steerserve.errors import SteerserveError

MASK = "▯"
BAR_WIDTH = 24


class Pieces:
    """The text of single tokens as they look inside a text, decoded once each."""

    def __init__(self, decode: Callable[[Sequence[int]], str]) -> None:
        self._decode = decode
        self._texts: dict[int, str] = {}

    def __call__(self, token: int) -> str:
        """What a token adds after another; a decoder drops the space or keeps the `##` of a first token."""
        if token not in self._texts:
            once, twice = self._decode([token]), self._decode([token, token])
            self._texts[token] = twice[len(once) :] if twice.startswith(once) else once
        return self._texts[token]

    def runs(self, tokens: Sequence[int | None]) -> Iterator[tuple[range, str]]:
        """The text of tokens from left to right: one by one, but for those that are parts of a character, which are put
        together; without what is no character yet beside a position that has no token."""
        first = 0
        while first < len(tokens):
            last, part = first + 1, self._is_part(tokens[first])
            while part and last < len(tokens) and self._is_part(tokens[last]):
                last += 1
            run = [token for token in tokens[first:last] if token is not None]
            text = self._decode(run) if part else "".join(map(self, run))
            text = text.lstrip(INCOMPLETE) if part and first and tokens[first - 1] is None else text
            text = text.rstrip(INCOMPLETE) if part and tokens[last : last + 1] == [None] else text
            yield range(first, last), text
            first = last

    def _is_part(self, token: int | None) -> bool:
        return token is not None and INCOMPLETE in self(token)


class Canvas:
    """One generation as its events describe it."""

    def __init__(self, params: GenerationParams, plan: Mapping[str, Any], pieces: Pieces) -> None:
        self.tokens: list[int | None] = [None] * params.max_tokens
        self.fresh: set[int] = set()
        self.revised: set[int] = set()
        self.step = 0
        self.steps = plan.get("max_steps", params.steps or params.max_tokens)
        self.result: Result | None = None
        self._plan, self._pieces = plan, pieces
        self._prompt, self._suffix = (
            given if isinstance(given, str) else "".join(text for _, text in pieces.runs(given))
            for given in (params.prompt, params.suffix)
        )

    def apply(self, events: Sequence[Event]) -> None:
        """Take in the events of one engine step; what they committed is fresh, and what they took back marked, until
        the next."""
        self.fresh, self.revised = set(), set()
        for event in events:
            if isinstance(event, Committed):
                self.step = event.step + 1
                self.fresh |= set(event.positions)
                for position, token in zip(event.positions, event.tokens, strict=True):
                    self.tokens[position] = token
            elif isinstance(event, Revised):
                self.step = event.step + 1
                self.revised |= set(event.positions)
                for position in event.positions:
                    self.tokens[position] = None
            elif isinstance(event, Done):
                self.result = event.result

    @property
    def progress(self) -> float:
        """Share of the response already committed."""
        return sum(token is not None for token in self.tokens) / len(self.tokens)

    def text(self) -> Text:
        """Prompt dim, masks as ▯, tokens of the last step highlighted, as are masks for tokens that it took back; the
        clean text once it is done."""
        if self.result is not None:
            return Text.assemble((self._prompt, "dim"), self.result.text, (self._suffix, "dim"))
        line = Text.assemble((self._prompt, "dim"))
        for positions, text in self._pieces.runs(self.tokens):
            if self.tokens[positions[0]] is None:
                line.append(MASK, "bold red" if positions[0] in self.revised else "dim cyan")
            else:
                line.append(text, "bold black on green" if self.fresh.intersection(positions) else "")
        return line.append(self._suffix, "dim")

    def status(self) -> Text:
        """Progress bar, step and the strength of each push at this step."""
        filled = round(self.progress * BAR_WIDTH)
        line = Text.assemble(
            ("━" * filled, "green"),
            ("━" * (BAR_WIDTH - filled), "dim"),
            f" {self.progress:4.0%}  step {self.step}/{self.steps}",
        )
        for label, strength in strengths_at(self._plan, max(0, self.step - 1)):
            line.append(f"  {label} {strength:+.3g}", "magenta")
        return line


def strengths_at(plan: Mapping[str, Any], step: int) -> list[tuple[str, float]]:
    """What each intervention of an admitted plan pushes at a step, by its name; the last step's beyond the end."""
    found = []
    for intervention in plan.get("interventions", ()):
        strengths = intervention["strength_per_step"]
        if strengths:
            found.append((str(intervention["name"]), float(strengths[min(step, len(strengths) - 1)])))
    return found


def draw(canvases: Mapping[str, Canvas]) -> RenderableType:
    """One panel a run, under each other."""
    return Group(
        *(
            Panel(Group(canvas.text(), Text(), canvas.status()), title=name, title_align="left", border_style="dim")
            for name, canvas in canvases.items()
        )
    )


def run_requests(
    engine: Engine,
    decode: Callable[[Sequence[int]], str],
    runs: Mapping[str, GenerationParams],
    console: Console | None,
) -> dict[str, Result]:
    """Run all of `runs` together and return their results by name; drawn live where `console` is a terminal.

    Raises RequestError for a run that cannot be honoured, SteerserveError for one that failed on the way.
    """
    admitted = {name: engine.admit(params) for name, params in runs.items()}
    pieces = Pieces(decode)
    names = {request.id: name for name, request in admitted.items()}
    canvases = {name: Canvas(runs[name], request.plan, pieces) for name, request in admitted.items()}
    engine.add(list(admitted.values()))
    live = console is not None and console.is_terminal
    view = Live(draw(canvases), console=console, auto_refresh=False) if live else None
    with view or nullcontext():
        while any(canvas.result is None for canvas in canvases.values()):
            events = engine.step()
            for event in events:
                if isinstance(event, Failed):
                    raise SteerserveError(f"{names[event.request_id]}: {event.message}")
            for name, canvas in canvases.items():
                if canvas.result is None:
                    canvas.apply([event for event in events if names[event.request_id] == name])
            if view is not None:
                view.update(draw(canvases), refresh=True)
    return {name: canvas.result for name, canvas in canvases.items() if canvas.result is not None}
