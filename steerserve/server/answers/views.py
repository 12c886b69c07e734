"""Views of one event log: what a stream says at each event."""

from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Callable
from typing import Any, Protocol

from steerserve.engine.api.events import Committed, Done, Event, Revised, Steered, Trace
from steerserve.server.answers.answer import Answer, Tally, trace
from steerserve.server.answers.canvas import StreamCanvas
from steerserve.server.protocol.encoding import finite
from steerserve.server.protocol.generation import StreamMode, StreamOptions


class View(Protocol):
    """Turns events into JSON frames. `answer` has taken an event's result before the view sees the event."""

    def frames(self, event: Event) -> list[dict[str, Any]]:
        """What to say at this event."""
        ...

    def usage(self) -> dict[str, Any]:
        """The frame that tells the usage, for a caller who asked for it."""
        ...


class Chunks(ABC):
    """OpenAI's chunks; what text a chunk carries is the subclass's."""

    def __init__(self, answer: Answer, canvases: dict[str, StreamCanvas], options: StreamOptions) -> None:
        self._answer = answer
        self._canvases = canvases
        self._options = options
        self._opened: set[int] = set()
        self._running: defaultdict[str, Tally] = defaultdict(Tally)

    def frames(self, event: Event) -> list[dict[str, Any]]:
        """Text of the steered rows; at the end of a choice a chunk with its finish_reason and all that goes with it."""
        request_id = event.request_id
        row = self._answer.rows[request_id]
        self._running[request_id].take(event)
        frames = []
        if not row.baseline:
            canvas = self._canvases[request_id]
            frames += self._open(row.choice, self._answer.opening(request_id))
            if isinstance(event, Committed | Revised):
                if isinstance(event, Committed):
                    canvas.commit(event)
                else:
                    canvas.revise(event)
                text = self._at_change(canvas)
                if self._options.continuous_usage_stats:
                    self._running[request_id].tokens = self._sent_tokens(canvas)
                frames += self._text_chunks(row.choice, text, request_id)
            if isinstance(event, Done):
                frames += self._text_chunks(row.choice, self._at_end(canvas, event.result.text), request_id)
        if isinstance(event, Done) and self._answer.finished(row.choice):
            closing = self._closing(self._answer.text(row.choice))
            about = self._answer.about(row.choice)
            frames.append(self._chunk({"index": row.choice} | self._answer.wording.piece(closing) | about))
        return frames

    def usage(self) -> dict[str, Any]:
        """The chunk without choices that OpenAI ends such a stream with."""
        return self._head | {"choices": [], "usage": self._answer.usage()}

    def _open(self, index: int, text: str) -> list[dict[str, Any]]:
        if index in self._opened:
            return []
        self._opened.add(index)
        words = self._answer.wording.opening(text)
        return [] if words is None else [self._choice_frame(index, words)]

    def _text_chunks(self, index: int, text: str, request_id: str) -> list[dict[str, Any]]:
        if not text:
            return []
        return [self._choice_frame(index, self._answer.wording.piece(self._before(request_id) + text))]

    def _choice_frame(self, index: int, words: dict[str, Any]) -> dict[str, Any]:
        return self._chunk({"index": index} | words | {"logprobs": None, "finish_reason": None})

    def _chunk(self, choice: dict[str, Any]) -> dict[str, Any]:
        chunk = self._head | {"choices": [choice]}
        if self._options.continuous_usage_stats:
            return chunk | {"usage": self._answer.usage(self._running)}
        return chunk | {"usage": None} if self._options.include_usage else chunk

    @property
    def _head(self) -> dict[str, Any]:
        return self._answer.head(self._answer.wording.chunk)

    @abstractmethod
    def _sent_tokens(self, canvas: StreamCanvas) -> int:
        """Tokens of a row that its chunks have said and that none takes back."""

    @abstractmethod
    def _before(self, request_id: str) -> str:
        """What a chunk repeats of the text before the response."""

    @abstractmethod
    def _at_change(self, canvas: StreamCanvas) -> str:
        """Text of the chunk after tokens were committed or taken back; empty for none."""

    @abstractmethod
    def _at_end(self, canvas: StreamCanvas, text: str) -> str:
        """Text of the chunk when the row has its final `text`; empty for none."""

    @abstractmethod
    def _closing(self, text: str) -> str:
        """Text of the chunk with the finish_reason."""


class AppendView(Chunks):
    """Text that only grows: the chunks of a choice, joined, are its text."""

    def _sent_tokens(self, canvas: StreamCanvas) -> int:
        return canvas.sent_tokens()

    def _before(self, request_id: str) -> str:  # noqa: ARG002
        return ""

    def _at_change(self, canvas: StreamCanvas) -> str:
        return canvas.grown()

    def _at_end(self, canvas: StreamCanvas, text: str) -> str:
        return canvas.rest(text)

    def _closing(self, text: str) -> str:  # noqa: ARG002
        return ""


class ReplaceView(Chunks):
    """The whole text so far in each chunk, masks shown: the last chunk of a choice is its text."""

    def _sent_tokens(self, canvas: StreamCanvas) -> int:
        return canvas.settled_tokens

    def _before(self, request_id: str) -> str:
        return self._answer.opening(request_id)

    def _at_change(self, canvas: StreamCanvas) -> str:
        return canvas.provisional()

    def _at_end(self, canvas: StreamCanvas, text: str) -> str:  # noqa: ARG002
        return ""

    def _closing(self, text: str) -> str:
        return text


class EventsView:
    """Typed frames: committed, revised, trace, steered, receipt, done and usage."""

    def __init__(self, answer: Answer, canvases: dict[str, StreamCanvas], options: StreamOptions) -> None:
        self._answer = answer
        self._canvases = canvases
        self._options = options
        self._running: defaultdict[str, Tally] = defaultdict(Tally)

    def frames(self, event: Event) -> list[dict[str, Any]]:
        """An event as one frame; a row's end as its receipt, where it has one, and done."""
        self._running[event.request_id].take(event)
        frames = self._frames_of(event)
        if not self._options.continuous_usage_stats:
            return frames
        self._running[event.request_id].tokens = self._canvases[event.request_id].settled_tokens
        return [frame | {"usage": self._answer.usage(self._running)} for frame in frames]

    def _frames_of(self, event: Event) -> list[dict[str, Any]]:
        if isinstance(event, Committed):
            return [self._committed(event)]
        if isinstance(event, Revised):
            return [self._revised(event)]
        if isinstance(event, Trace):
            return [self._frame("trace", event.request_id, **trace(event))]
        if isinstance(event, Steered):
            return [self._frame("steered", event.request_id, step=event.step, interventions=event.interventions)]
        if isinstance(event, Done):
            return self._ended(event)
        return []

    def usage(self) -> dict[str, Any]:
        """The usage of the whole request."""
        return {"type": "usage", "id": self._answer.id, "usage": self._answer.usage()}

    def _committed(self, event: Committed) -> dict[str, Any]:
        canvas = self._canvases[event.request_id]
        canvas.commit(event)
        frame = self._frame(
            "committed",
            event.request_id,
            step=event.step,
            positions=event.positions,
            tokens=event.tokens,
            token_texts=canvas.token_texts(event.tokens),
            text=canvas.provisional(),
        )
        if event.logprobs is not None:
            frame["logprobs"] = [finite(value) for value in event.logprobs]
        return frame

    def _revised(self, event: Revised) -> dict[str, Any]:
        canvas = self._canvases[event.request_id]
        canvas.revise(event)
        text = canvas.provisional()
        return self._frame("revised", event.request_id, step=event.step, positions=event.positions, text=text)

    def _ended(self, event: Done) -> list[dict[str, Any]]:
        result = event.result
        done = self._frame(
            "done",
            event.request_id,
            text=result.text,
            finish_reason=result.finish_reason,
            completion_tokens=len(result.tokens),
            denoising_steps=result.steps,
            forward_passes=result.forward_passes,
        )
        steering = self._answer.steering(event.request_id)
        if steering is None:
            return [done]
        return [self._frame("receipt", event.request_id, steering=steering), done]

    def _frame(self, kind: str, request_id: str, **fields: Any) -> dict[str, Any]:
        row = self._answer.rows[request_id]
        frame = {"type": kind, "id": self._answer.id, "index": row.choice, "baseline": row.baseline}
        return frame | fields


VIEWS: dict[StreamMode, Callable[[Answer, dict[str, StreamCanvas], StreamOptions], View]] = {
    "append": AppendView,
    "replace": ReplaceView,
    "events": EventsView,
}
