"""Refinement of a finished text: stretches of it are written anew, and kept where its probes like the text better."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from steerserve.engine.api.params import GenerationParams
from steerserve.errors import RequestError


@dataclass(frozen=True)
class RefinedText:
    """A whole response, and how good its probes find it."""

    tokens: tuple[int, ...]
    logprobs: Mapping[int, float]
    top_logprobs: Mapping[int, tuple[tuple[int, float], ...]]
    verdicts: Mapping[str, float]
    score: float


@dataclass(eq=False)
class Refinement:
    """Refinement of one row: after its first draft, `rounds` times, one stretch of `span` positions is masked and
    written anew; the draft with it is kept where it scores higher, else the tokens that were there come back. A round
    is written as a response between what stands before and behind it is: progress, schedules and readings begin anew,
    of the stretch.

    Source: the noise-and-denoise rounds of reward-guided iterative refinement (Uehara et al., arXiv 2502.14944), with
    the probes' likelihood as the reward, a stretch instead of random positions as what is noised, and one proposal a
    round, taken or left, instead of resampling among many.
    """

    rounds: int
    span: int
    round_steps: int
    """The most steps that one round takes."""
    absent: frozenset[str]
    best: RefinedText | None = None
    first: float | None = None
    """Score of the first draft."""
    made: list[dict[str, Any]] = field(default_factory=list)
    """Each round that has been judged."""
    stretch: tuple[int, int] | None = None
    """Response positions [first, last + 1) that are being written anew; None before the first round."""
    passes: int = 0
    """Forward passes that judging took."""

    @property
    def going(self) -> bool:
        """Tell if the text may still change."""
        return self.best is None or len(self.made) < self.rounds

    @property
    def outcome(self) -> Mapping[str, float] | None:
        """The verdicts on the text that it ended with; None while it goes on."""
        return None if self.going or self.best is None else self.best.verdicts

    @property
    def steps_left(self) -> int:
        """At most so many steps more, those of the draft being written left out."""
        return self.rounds_left * self.round_steps

    @property
    def rounds_left(self) -> int:
        """Rounds that have yet to be judged."""
        return self.rounds - len(self.made)

    def betters(self, draft: RefinedText) -> bool:
        """Tell if a draft is the first, or better than the best one."""
        return self.best is None or draft.score > self.best.score

    def weigh(self, draft: RefinedText) -> None:
        """Keep the draft where it betters the best one."""
        kept = self.betters(draft)
        if self.best is None:
            self.first = draft.score
        else:
            assert self.stretch is not None
            self.made.append({"span": list(self.stretch), "score": _rounded(draft.score), "kept": kept})
        if kept:
            self.best = draft

    def receipt(self) -> dict[str, Any]:
        """What it adds to the row's receipt: scores are log-probabilities in nats, null for a text without words."""
        return {
            "refined": {
                "first_score": _rounded(self.first),
                "score": _rounded(None if self.best is None else self.best.score),
                "kept": sum(one["kept"] for one in self.made),
                "judging_passes": self.passes,
                "rounds": self.made,
            }
        }


def refinement(params: GenerationParams, round_steps: int, before: int, max_steps: int) -> Refinement | None:
    """The refinement that a row of checked params asks for, whose rounds take up to `round_steps` steps each and come
    after `before` others; raises RequestError where these are more than `max_steps` together."""
    asked = params.refine
    if asked is None:
        return None
    most = before + asked.rounds * round_steps
    if most > max_steps:
        raise RequestError(
            f"refine: {asked.rounds} rounds of up to {round_steps} steps and what is made besides are {most} steps; at "
            f"most {max_steps} are made",
            "refine.rounds",
        )
    return Refinement(asked.rounds, stretch_of(params), round_steps, frozenset(asked.absent))


def stretch_of(params: GenerationParams) -> int:
    """Positions of one stretch: a third of the response unless another number is asked for."""
    assert params.refine is not None
    return -(-params.max_tokens // 3) if params.refine.span is None else params.refine.span


def _rounded(score: float | None) -> float | None:
    # Not so many decimals: scores of texts that are nearly sure are close to 0, and one above another is to look so.
    return None if score is None or math.isinf(score) else float(f"{score:.6g}")
