"""JSON of answers, a part at a time: to encode a large value is one call, for which every other thread would wait."""

import json
from typing import Any, Final

from pydantic_core import to_json

DEPTH: Final = 5
"""How deep what is told of one token, or of one step, lies in an answer: choices, choice, logprobs, tokens, token."""


def encoded(value: Any, depth: int = DEPTH) -> bytes:
    """A value as JSON in UTF-8, what lies `depth` deep in it as one part; raises ValueError for a number that JSON
    cannot say."""
    if depth and isinstance(value, dict) and all(isinstance(key, str) for key in value):
        return b"{" + b",".join([_whole(key) + b":" + encoded(one, depth - 1) for key, one in value.items()]) + b"}"
    if depth and isinstance(value, list | tuple):
        return b"[" + b",".join([encoded(one, depth - 1) for one in value]) + b"]"
    return _whole(value)


def _whole(value: Any) -> bytes:
    told = to_json(value)
    if b"NaN" in told or b"Infinity" in told:
        # In a text, or a number that JSON cannot say, which this one refuses.
        return json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode()
    return told


def data(frame: dict[str, Any], depth: int = 0) -> bytes:
    """One `data:` line of JSON; depth: see `encoded`."""
    return b"data: " + encoded(frame, depth) + b"\n\n"


LOWEST_LOGPROB = -9999.0
"""Stands for minus infinity, which JSON cannot say."""


def finite(logprob: float) -> float:
    """A log-probability as JSON can say it."""
    return max(logprob, LOWEST_LOGPROB)
