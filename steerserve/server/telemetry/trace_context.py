"""W3C trace context: the trace a request belongs to, as it came and as it is passed on.

Source: W3C Trace Context, level 1.
"""

import re
import secrets
from dataclasses import dataclass, field
from typing import Final

_PARENT: Final = re.compile(r"(?!ff)[0-9a-f]{2}-(?!0{32})([0-9a-f]{32})-(?!0{16})([0-9a-f]{16})-([0-9a-f]{2})(-.*)?")
SAMPLED: Final = "01"


@dataclass(frozen=True)
class TraceContext:
    """The trace of one request, and the id of its own span in it."""

    trace_id: str
    """32 hexadecimal digits."""
    parent_id: str | None = None
    """Id of the caller's span, 16 hexadecimal digits; None where this server began the trace."""
    flags: str = SAMPLED
    state: str | None = None
    """The caller's `tracestate`, passed on as it came."""
    span_id: str = field(default_factory=lambda: secrets.token_hex(8))

    @property
    def traceparent(self) -> str:
        """The header for what this request calls: its own span is the parent there."""
        return f"00-{self.trace_id}-{self.span_id}-{self.flags}"


def continued(traceparent: str | None = None, state: str | None = None) -> TraceContext:
    """The trace that a caller's headers name, or a new one where they name none; a state that is no text is dropped."""
    found = _PARENT.fullmatch(traceparent or "")
    if found is None or (found[4] and traceparent is not None and traceparent.startswith("00")):
        return TraceContext(secrets.token_hex(16))
    passable = state is not None and state.isascii() and state.isprintable()
    return TraceContext(found[1], found[2], found[3], state if passable else None)
