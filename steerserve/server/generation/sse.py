"""Server-sent events: a view of a generation as bytes, and the response that ends with its client."""

import logging
from collections.abc import AsyncGenerator
from functools import partial

from starlette.datastructures import State
from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from steerserve.engine.api.events import Done, Event
from steerserve.errors import SteerserveError
from steerserve.server.answers.views import View
from steerserve.server.errors import answer_to, unexpected
from steerserve.server.generation.generation import Generation
from steerserve.server.http.disconnect import ClientGoneError, unless_gone
from steerserve.server.protocol.encoding import DEPTH, data

logger = logging.getLogger(__name__)

KEEP_ALIVE = b": keep-alive\n\n"
DONE = b"data: [DONE]\n\n"


async def lines(
    generation: Generation, view: View, include_usage: bool, keep_alive: float, state: State
) -> AsyncGenerator[bytes, None]:
    """The stream up to `[DONE]`, or up to an error frame, since the status is sent; `state.ended` notes the status it
    would have been, `state.outcome` a failure that nobody foresaw."""
    try:
        async for event in generation.events(keep_alive):
            if event is None:
                yield KEEP_ALIVE
                continue
            # Only the end of a row tells of all its tokens at once.
            done = isinstance(event, Done)
            work = partial(_all_data, view, event, DEPTH if done else 0)
            for line in await generation.rendered(work) if done else work():
                yield line
        if include_usage:
            yield data(view.usage())
        yield DONE
    except SteerserveError as error:
        answer = answer_to(error)
        state.ended = answer.status
        yield data(answer.body)
    except Exception:
        logger.exception("request %s failed while it streamed", state.request_id)
        state.outcome = "failed"
        yield data(unexpected(state.request_id).body)


def _all_data(view: View, event: Event, depth: int) -> list[bytes]:
    return [data(frame, depth) for frame in view.frames(event)]


class EventStream(StreamingResponse):
    """Sends `source` as it comes, and ends the generation when the source or the client does."""

    def __init__(self, source: AsyncGenerator[bytes, None], generation: Generation, state: State) -> None:
        # No proxy may hold lines back. The id is known from the start, long before the first chunk may have text.
        headers = {"cache-control": "no-cache", "x-accel-buffering": "no", "x-generation-id": generation.answer.id}
        super().__init__(source, headers=headers, media_type="text/event-stream")
        self._source = source
        self._generation = generation
        self._state = state

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:  # noqa: ARG002
        # The base class notices a vanished client only when it sends; a row must not run on through a silence.
        try:
            await unless_gone(receive, self.stream_response(send))
        except (ClientGoneError, OSError):
            self._state.outcome = "disconnected"
        finally:
            self._generation.end()
            await self._source.aclose()
