"""One connection of a client: HTTP/1.1, with an end to waiting for it."""

import asyncio
import re
import socket
from typing import Any, Final

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

HEAD_SECONDS: Final = 30.0
"""How long a request's line and headers may take to arrive, from the connection or the last answer on."""
TAKING_SECONDS: Final = 60.0
"""How long a client may take nothing of what has been sent to it."""
DROPPED_BYTES: Final = 64 << 20
"""How much of a request is read and dropped once it has been answered."""
DROPPING_SECONDS: Final = 30.0
"""How long that may take."""
SILENCE_SECONDS: Final = 2.0
"""How long a client may send nothing meanwhile."""

_ABSOLUTE: Final = re.compile(rb"https?://([^/?#]*)", re.IGNORECASE)


class Reader(h11.Connection):
    """Reads requests, those that name the server in their target too, as clients of a proxy send them: the rest of the
    target is what is asked for, and the name stands for the Host header (RFC 9112, section 3.2.2)."""

    def next_event(self) -> Any:
        """Return the next event, as `h11.Connection` does."""
        event = super().next_event()
        if not isinstance(event, h11.Request):
            return event
        named = _ABSOLUTE.match(event.target)
        if named is None:
            return event
        rest = event.target[named.end() :]
        return h11.Request(
            method=event.method,
            target=rest if rest.startswith(b"/") else b"/" + rest,
            headers=[(b"host", named[1]), *((name, value) for name, value in event.headers if name != b"host")],
            http_version=event.http_version,
        )


class Lingering:
    """A transport that, told to close, first lets a client finish that is still sending its request.

    A connection that is closed with bytes unread is reset, and a client that is reset loses the answer that it has not
    read yet. So the answer is sent and its end told, and what still comes is read and dropped: until the client closes,
    or for DROPPED_BYTES, DROPPING_SECONDS, or SILENCE_SECONDS without a byte. Source: nginx's `lingering_close`.
    """

    def __init__(self, transport: asyncio.Transport, reader: h11.Connection, loop: asyncio.AbstractEventLoop) -> None:
        self._transport = transport
        self._reader = reader
        self._loop = loop
        self._left: int | None = None
        self._timers: list[asyncio.TimerHandle] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)

    @property
    def lingers(self) -> bool:
        """Tell if all has been sent and what comes is dropped."""
        return self._left is not None

    def is_closing(self) -> bool:
        """Tell if it is to close."""
        return self.lingers or self._transport.is_closing()

    def close(self) -> None:
        """Close once the client has sent what it is sending."""
        if self.is_closing():
            return
        # A request that could not be read may go on as well.
        if self._reader.their_state not in (h11.SEND_BODY, h11.ERROR) or not self._transport.can_write_eof():
            self._transport.close()
            return
        try:
            self._transport.write_eof()
        except OSError:  # the client has closed already
            self._transport.close()
            return
        self._left = DROPPED_BYTES
        self._transport.resume_reading()
        self._timers = [self._loop.call_later(DROPPING_SECONDS, self._transport.close), self._silence()]

    def drop(self, count: int) -> None:
        """Take note of bytes that came and were dropped."""
        assert self._left is not None
        self._left -= count
        self._timers.pop().cancel()
        self._timers.append(self._silence())
        if self._left < 0:
            self._transport.close()

    def closed(self) -> None:
        """Wait for nothing more."""
        for timer in self._timers:
            timer.cancel()

    def _silence(self) -> asyncio.TimerHandle:
        return self._loop.call_later(SILENCE_SECONDS, self._transport.close)


class Connection(H11Protocol):
    """Closes a connection on which no whole head arrives in time, where uvicorn waits as long as bytes are missing, and
    one whose client takes nothing, where closing alone would wait for it to; and answers nothing more where a body's
    length was told in two ways, since a proxy may have taken the rest for another caller's (RFC 9112, section 6.1)."""

    _waiting: asyncio.TimerHandle | None = None
    _lingering: Lingering

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Wait for the first head."""
        most = self.config.h11_max_incomplete_event_size
        self.conn = Reader(h11.SERVER) if most is None else Reader(h11.SERVER, most)
        self._lingering = Lingering(transport, self.conn, self.loop)
        super().connection_made(self._lingering)  # type: ignore[arg-type]
        found = transport.get_extra_info("socket")
        if found is not None and hasattr(socket, "TCP_USER_TIMEOUT"):
            found.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(TAKING_SECONDS * 1000))
        self._wait()

    def connection_lost(self, exc: Exception | None) -> None:
        """Wait for nothing more."""
        self._stop_waiting()
        self._lingering.closed()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Read on, or drop what comes behind the answer."""
        if self._lingering.lingers:
            self._lingering.drop(len(data))
        else:
            super().data_received(data)

    def handle_events(self) -> None:
        """A head that is whole ends the wait."""
        before = self.cycle
        super().handle_events()
        if self.cycle is not None and self.cycle is not before:
            self._stop_waiting()
            if {b"content-length", b"transfer-encoding"} <= {name for name, _ in self.headers}:
                self.cycle.keep_alive = False

    def on_response_complete(self) -> None:
        """Wait for the next head, unless it has come already."""
        super().on_response_complete()
        if self.cycle is None or self.cycle.response_complete:
            self._wait()

    def _wait(self) -> None:
        self._stop_waiting()
        self._waiting = self.loop.call_later(HEAD_SECONDS, self.transport.abort)

    def _stop_waiting(self) -> None:
        if self._waiting is not None:
            self._waiting.cancel()
            self._waiting = None
