"""The log-probability that a text has the attributes that are wanted, from its probes' verdicts."""

import math
from collections.abc import Mapping
from typing import Final

MAX_ROUNDS: Final = 256
"""Rounds that one row may ask for."""


def log_probability(log_odds: float) -> float:
    """Log of the probability in nats, of log-odds in nats."""
    return min(log_odds, 0.0) - math.log1p(math.exp(-abs(log_odds)))


def likelihood(verdicts: Mapping[str, float], absent: frozenset[str] = frozenset()) -> float:
    """Log-probability in nats, at most 0, that a text has the attributes of its verdicts and lacks those named absent,
    all taken as independent."""
    return sum(log_probability(-odds if name in absent else odds) for name, odds in verdicts.items())
