"""Whether two engines made the same of a request: tokens and counts to the last one, sums within rounding."""

from typing import Any

import pytest

from steerserve.engine.api.events import Result


def assert_alike(one: Result, other: Result) -> None:
    """Compare two results of equal requests."""
    assert one.tokens == other.tokens
    assert one.text == other.text
    assert one.finish_reason == other.finish_reason
    assert (one.steps, one.forward_passes) == (other.steps, other.forward_passes)
    assert close(one.receipt, other.receipt)
    for told, expected_trace in zip(one.trace, other.trace, strict=True):
        assert close([told.values, told.positions], [expected_trace.values, expected_trace.positions])
    assert close(one.logprobs, other.logprobs)
    found, expected = one.top_logprobs or (), other.top_logprobs or ()
    assert [[token for token, _ in row] for row in found] == [[token for token, _ in row] for row in expected]


def close(found: Any, expected: Any) -> bool:
    """Equal but for numbers, which may differ in the fourth digit."""
    if isinstance(expected, dict):
        return found.keys() == expected.keys() and all(close(found[name], expected[name]) for name in expected)
    if isinstance(expected, list | tuple):
        return len(found) == len(expected) and all(close(a, b) for a, b in zip(found, expected, strict=True))
    if isinstance(expected, float):
        return bool(found == pytest.approx(expected, rel=1e-3, abs=1e-4))
    return bool(found == expected)
