"""Log lines: JSON, one a line, written by a thread of their own so that no disk and no pipe can hold the server up."""

import json
import logging
import os
import queue
import threading
from collections.abc import Callable
from typing import Any, Final, TextIO

import structlog

from steerserve.server.telemetry.record import RequestRecord

WAITING_LINES = 10_000
"""Lines that may wait to be written; further ones are dropped and counted."""
CLOSING_SECONDS = 2.0
MAX_LOGGED_PROMPT = 4096
"""Characters or tokens of a prompt that are logged."""

_STAMPS: Final = (structlog.processors.add_log_level, structlog.processors.TimeStamper(fmt="iso", utc=True))


class Lines:
    """A file descriptor that takes lines; `dropped` is told how many could not be written.

    It is written to directly: a buffer that cannot be emptied at exit would change the process's exit code.
    """

    def __init__(self, descriptor: int, dropped: Callable[[int], None]) -> None:
        self._descriptor = descriptor
        self._dropped = dropped
        self._torn = False
        self._lines: queue.Queue[bytes | None] = queue.Queue(WAITING_LINES)
        self._thread = threading.Thread(target=self._run, name="log", daemon=True)
        self._thread.start()

    def write(self, line: str) -> None:
        """Have a line written, some time; never waits and never fails."""
        try:
            self._lines.put_nowait(line.encode("utf-8", errors="backslashreplace"))
        except queue.Full:
            self._dropped(1)

    def close(self) -> None:
        """Write what waits, as far as it can be written soon."""
        try:
            self._lines.put(None, timeout=CLOSING_SECONDS)
        except queue.Full:
            return
        self._thread.join(CLOSING_SECONDS)

    def _run(self) -> None:
        while (line := self._lines.get()) is not None:
            # A line of which the disk took only a part is ended before the next one.
            rest = b"\n" * self._torn + line + b"\n"
            try:
                while rest:
                    written = os.write(self._descriptor, rest)
                    self._torn = written < len(rest)
                    rest = rest[written:]
            except OSError:
                self._dropped(1)


def standard(stream: TextIO | None, descriptor: int) -> int:
    """The descriptor of standard output or error; of the null device where the process was started without one, since
    its number may then be that of anything opened later."""
    return descriptor if stream is not None else os.open(os.devnull, os.O_WRONLY)


class RequestLog:
    """A `Report` that writes one line for each request: what it cost and what became of it, and no prompt unless
    `prompts`. Whatever came from the client is escaped by JSON, in ASCII."""

    def __init__(self, lines: Lines, prompts: bool = False) -> None:
        self._prompts = prompts
        self._logger = structlog.wrap_logger(
            _Sink(lines),
            processors=[*_STAMPS, structlog.processors.JSONRenderer()],
            wrapper_class=structlog.BoundLogger,
            cache_logger_on_first_use=True,
        )

    def __call__(self, visit: RequestRecord) -> None:
        """Write the line of a request that has ended."""
        fields = described(visit)
        if self._prompts and visit.prompts:
            fields["prompts"] = [prompt[:MAX_LOGGED_PROMPT] for prompt in visit.prompts]
        self._logger.info("request", **fields)


def described(visit: RequestRecord) -> dict[str, Any]:
    """A request as the fields of its line; times in seconds."""

    def since(moment: float | None, start: float | None = visit.began) -> float | None:
        return None if moment is None or start is None else round(moment - start, 6)

    return {
        "request_id": visit.id,
        "trace_id": visit.trace.trace_id,
        "key": visit.key,
        "method": visit.method,
        "route": visit.route,
        "status": visit.code,
        "outcome": visit.outcome,
        "reason": visit.reason,
        "seconds": round(visit.seconds, 6),
        "queue_seconds": since(visit.started, visit.submitted),
        "first_token_seconds": since(visit.first_token),
        "forwarded_from": visit.forwarded_from,
        "forwarded_to": visit.forwarded_to,
        "answer_id": visit.answer_id,
        "rows": visit.rows,
        "prompt_tokens": visit.prompt_tokens,
        "tokens": visit.tokens,
        "denoising_steps": visit.steps,
        "forward_passes": visit.passes,
        "steering_sha256": visit.steering,
        "attributes": sorted(visit.attributes),
    }


class LineHandler(logging.Handler):
    """Handler that writes what the libraries and the server log as lines of JSON; a record that cannot be written is
    dropped."""

    def __init__(self, lines: Lines) -> None:
        super().__init__()
        self._lines = lines

    def emit(self, record: logging.LogRecord) -> None:
        """Write one record; its traceback becomes one field."""
        entry = {
            "event": record.getMessage(),
            "logger": record.name,
            "level": record.levelname.lower(),
            "timestamp": structlog.processors.TimeStamper(fmt="iso", utc=True)(None, "", {})["timestamp"],
        }
        if record.exc_info is not None:
            entry["exception"] = logging.Formatter().formatException(record.exc_info)
        self._lines.write(json.dumps(entry))


class _Sink:
    """What structlog logs to."""

    def __init__(self, lines: Lines) -> None:
        self._lines = lines

    def info(self, line: str) -> None:
        self._lines.write(line)
