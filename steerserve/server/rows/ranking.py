"""Ranking: the candidates of a prompt that are answered, and their order."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from steerserve.engine.api.events import WORDLESS, Result
from steerserve.engine.api.scoring import likelihood, log_probability
from steerserve.server.protocol.encoding import finite


@dataclass(frozen=True)
class Criterion:
    """An attribute that a text is wanted to have, or not to have."""

    attribute: str
    absent: bool = False

    def __str__(self) -> str:
        """As `steering.rank` names it."""
        return f"-{self.attribute}" if self.absent else self.attribute


@dataclass(frozen=True)
class Ranking:
    """Number of candidates of each prompt, the number that is answered, and what they are ranked by."""

    n: int = 1
    best_of: int = 1
    wishes: tuple[Criterion, ...] | None = None
    """What texts are judged by, empty for the log-probability; None where they are neither judged nor ranked."""

    @property
    def chooses(self) -> bool:
        """Tell if there are more candidates than are answered."""
        return self.best_of > self.n

    @property
    def by_logprobs(self) -> bool:
        """Tell if candidates are ranked by the log-probability of their tokens."""
        return self.chooses and not self.wishes

    @property
    def rank(self) -> list[str] | None:
        """The wishes as `steering.rank` names them."""
        return None if self.wishes is None else [str(wish) for wish in self.wishes]


def probability(log_odds: float) -> float:
    """The probability, of log-odds in nats."""
    return math.exp(log_probability(log_odds))


def score(result: Result, wishes: Sequence[Criterion]) -> float | None:
    """Score of a finished text in nats; larger is better.

    The log-probability that it is as wished, the attributes taken as independent; without wishes the mean
    log-probability of its tokens when they were committed, which is how OpenAI's `best_of` ranks, and None for a text
    without tokens. A stop string cuts no tokens: the result is to have the log-probabilities of those in its text.
    """
    if wishes:
        assert result.verdicts is not None
        absent = frozenset(wish.attribute for wish in wishes if wish.absent)
        return likelihood({wish.attribute: result.verdicts[wish.attribute] for wish in wishes}, absent)
    return finite(math.fsum(result.logprobs) / len(result.logprobs)) if result.logprobs else None


def ranked(results: Sequence[Result], wishes: Sequence[Criterion]) -> list[int]:
    """The indices of the results, the best first, the earlier of equals before the later; texts that are empty, that
    `abort_when` ended or whose probes saw nothing come last, by the same rule."""

    def place(index: int) -> tuple[bool, float]:
        result, found = results[index], score(results[index], wishes)
        failed = result.finish_reason == "content_filter" or not result.text.strip()
        # Else a text that shows nothing would be the surest to lack what is not wanted.
        failed = failed or WORDLESS in (result.verdicts or {}).values()
        return failed, math.inf if found is None else -found

    return sorted(range(len(results)), key=place)
