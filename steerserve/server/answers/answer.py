"""OpenAI objects from the results of a request's rows."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from steerserve.engine.api.events import Event, Result, Scored, Stepped, Trace
from steerserve.server.answers.pieces import Decoder, PromptText, ending, pieces, shown
from steerserve.server.answers.wording import ResponseFormat
from steerserve.server.protocol.generation import CompletionRequest
from steerserve.server.protocol.receipts import Form, in_form
from steerserve.server.protocol.sweep import Sweep
from steerserve.server.rows.ranking import Ranking, probability, ranked, score
from steerserve.server.rows.rows import Row
from steerserve.server.rows.sweep import grid_told, quality_told


@dataclass
class Tally:
    """Counts of a row that still runs."""

    tokens: int = 0
    """Tokens that have been sent and are taken back by nothing."""
    steps: int = 0
    forward_passes: int = 0

    def take(self, event: Event) -> None:
        """Count the steps and passes that an event of the row tells."""
        if isinstance(event, Stepped):
            self.steps, self.forward_passes = event.steps, event.forward_passes


@dataclass(frozen=True)
class Answer:
    """State of one request: its rows, by the engine's id, and the results of those that have finished."""

    id: str
    created: int
    model: str
    fingerprint: str | None
    seed: int
    wording: ResponseFormat
    rows: Mapping[str, Row]
    openings: Mapping[int, PromptText]
    """What stands before the responses, by the index of the prompt."""
    decode: Decoder
    suffix_tokens: int = 0
    """Tokens behind each of the responses."""
    echo: bool = False
    """Put the prompt into the text."""
    logprobs: bool = True
    """Give log-probabilities where the engine has recorded them."""
    ranking: Ranking = Ranking()
    sweep: CompletionRequest | None = None
    """The request, if it is one for a sweep: its rows are those of the cells, and last its baseline."""
    receipts: Form = "short"
    """How much is told of what was applied."""
    revised_by: Mapping[str, int] = field(default_factory=dict)
    """For the rows that may take tokens back: length of the blocks within which they do."""
    results: dict[str, Result] = field(default_factory=dict)

    def head(self, of: str) -> dict[str, Any]:
        """The fields that an `object` of this request begins with."""
        return {
            "id": self.id,
            "object": of,
            "created": self.created,
            "model": self.model,
            "system_fingerprint": self.fingerprint,
            "seed": self.seed,
        }

    @property
    def long(self) -> bool:
        """Tell if rendering it may take longer than other requests should wait: much is said of every token."""
        return any(result.logprobs is not None or result.trace for result in self.results.values())

    def behind(self, request_id: str) -> Decoder:
        """The text of a row's response tokens, behind its own prompt."""
        return self.openings[self.rows[request_id].prompt].behind

    def opening(self, request_id: str) -> str:
        """Text that comes before a row's response."""
        return self.openings[self.rows[request_id].prompt].text if self.echo else ""

    def finished(self, choice: int) -> bool:
        """Tell if every row of the choice has its result."""
        return all(request_id in self.results for request_id, row in self.rows.items() if row.choice == choice)

    def text(self, choice: int) -> str:
        """The text of a finished choice."""
        [request_id] = (key for key, row in self.rows.items() if row.choice == choice and not row.baseline)
        return self._text(request_id)

    def choice(self, index: int) -> dict[str, Any]:
        """A finished choice: OpenAI's fields, and `steering`, `notes`, `trace` and `baseline` where there are such."""
        keys = {row.baseline: key for key, row in self.rows.items() if row.choice == index}
        return {"index": index} | self._text_fields(keys[False]) | self.about(index)

    def about(self, index: int) -> dict[str, Any]:
        """Fields of a finished choice beside its text."""
        keys = {row.baseline: key for key, row in self.rows.items() if row.choice == index}
        result = self.results[keys[False]]
        found: dict[str, Any] = {"logprobs": self._logprobs(keys[False]), "finish_reason": result.finish_reason}
        steering = self.steering(keys[False])
        if steering is not None:
            found["steering"] = steering
        if self.rows[keys[False]].notes:
            found["notes"] = self.rows[keys[False]].notes
        if result.trace:
            found["trace"] = [trace(one) for one in result.trace]
        if True in keys:
            twin = self.results[keys[True]]
            found["baseline"] = self._text_fields(keys[True]) | {"finish_reason": twin.finish_reason} | _verdicts(twin)
            if twin.quality is not None:
                found["baseline"]["quality"] = quality_told(twin)
        return found

    def steering(self, request_id: str) -> dict[str, Any] | None:
        """Fields about the steering of a finished row: its receipt, `verdicts`, the probability that it has
        each attribute it was judged by, its `quality`, and its number as a `candidate`; None for a row without any of
        these."""
        result = self.results[request_id]
        told = _verdicts(result) | ({"quality": quality_told(result)} if result.quality is not None else {})
        if self.ranking.chooses:
            told["candidate"] = self.rows[request_id].choice
        if result.receipt is None and not told:
            return None
        return in_form(result.receipt or {"interventions": []}, self.receipts) | told

    def usage(self, running: Mapping[str, Tally] | None = None) -> dict[str, int]:
        """Tokens of each prompt once and of every choice; steps and passes of all rows, baselines included.

        running: what the rows have come to that still run, for a usage so far.
        """
        prompt = sum(len(one.ids) + self.suffix_tokens for one in self.openings.values())
        tallies = dict(running or {}) | {
            key: Tally(len(one.tokens), one.steps, one.forward_passes) for key, one in self.results.items()
        }
        completion = sum(one.tokens for key, one in tallies.items() if not self.rows[key].baseline)
        return {
            "prompt_tokens": prompt,
            "completion_tokens": completion,
            "total_tokens": prompt + completion,
            "denoising_steps": sum(one.steps for one in tallies.values()),
            "forward_passes": sum(one.forward_passes for one in tallies.values()),
        }

    def body(self) -> dict[str, Any]:
        """The whole answer. Each choice has its own receipt; with more candidates than choices, `steering` beside them
        says what they were ranked by and how each of them did."""
        rankings = self._rankings()
        answered = [key for keys in rankings for key in (keys[: self.ranking.n] if self.ranking.chooses else keys)]
        choices = [self.choice(self.rows[key].choice) | {"index": index} for index, key in enumerate(answered)]
        body = self.head(self.wording.answer) | {"choices": choices, "usage": self.usage()}
        if self.ranking.chooses:
            told = [self._candidate(key) for keys in rankings for key in keys]
            body["steering"] = {"rank": self.ranking.rank, "candidates": told}
        if self.sweep is not None and self.sweep.sweep is not None:
            body["sweep"] = self._grid(self.sweep, self.sweep.sweep)
        return body

    def _grid(self, request: CompletionRequest, sweep: Sweep) -> dict[str, Any]:
        """The one receipt of a sweep: what each cell came to, and the baseline."""
        *keys, last = self.rows
        results, baseline = [self.results[key] for key in keys], self.results[last]
        grid = grid_told(request, sweep, results, baseline, [_verdicts(one) for one in results])
        told = self._text_fields(last) | {"finish_reason": baseline.finish_reason}
        return grid | {"baseline": told | quality_told(baseline) | _verdicts(baseline)}

    def _rankings(self) -> list[list[str]]:
        """For each prompt the rows of its candidates, the best first; in their own order where none is chosen."""
        prompts: dict[int, list[str]] = {}
        for request_id, row in self.rows.items():
            if not row.baseline:
                prompts.setdefault(row.prompt, []).append(request_id)
        if not self.ranking.chooses:
            return list(prompts.values())
        wishes = self.ranking.wishes or ()
        return [[keys[i] for i in ranked([self._shown(key) for key in keys], wishes)] for keys in prompts.values()]

    def _shown(self, request_id: str) -> Result:
        """A row's result with the log-probabilities of no more tokens than made it into its text."""
        result = self.results[request_id]
        if result.logprobs is None or not self.rows[request_id].params.stop:
            return result
        opening = self.openings[self.rows[request_id].prompt]
        count = len(shown(result, opening, self.decode)) if result.text else 0
        return replace(result, logprobs=result.logprobs[:count])

    def _candidate(self, request_id: str) -> dict[str, Any]:
        row, result = self.rows[request_id], self._shown(request_id)
        told = {"prompt": row.prompt, "candidate": row.choice, "score": score(result, self.ranking.wishes or ())}
        return told | {"finish_reason": result.finish_reason} | _verdicts(result)

    def _text_fields(self, request_id: str) -> dict[str, Any]:
        return self.wording.text_fields(self._text(request_id))

    def _text(self, request_id: str) -> str:
        return self.opening(request_id) + self.results[request_id].text

    def _logprobs(self, request_id: str) -> dict[str, Any] | None:
        result = self.results[request_id]
        if result.logprobs is None or not self.logprobs:
            return None
        opening = self.openings[self.rows[request_id].prompt]
        start = len(self.opening(request_id))
        said = pieces(result, opening, self.decode, start)
        if self.echo:
            # The end token too: evaluation harnesses leave out the last one, taking it for the one that was generated.
            said = [*opening.pieces(self._scored(request_id)), *said, *ending(result, opening, self.decode, start)]
        return self.wording.logprobs(said)

    def _scored(self, request_id: str) -> tuple[Scored | None, ...] | None:
        """What has been found of a row's prompt, by the row itself or by another of its prompt."""
        prompt = self.rows[request_id].prompt
        keys = [request_id, *(key for key, row in self.rows.items() if row.prompt == prompt)]
        found = (self.results[key].prompt for key in keys if key in self.results)
        return next((one for one in found if one is not None), None)


def _verdicts(result: Result) -> dict[str, Any]:
    if not result.verdicts:
        return {}
    return {"verdicts": {name: probability(log_odds) for name, log_odds in result.verdicts.items()}}


def trace(one: Trace) -> dict[str, Any]:
    """A trace entry as JSON."""
    told = {"step": one.step, "progress": one.progress, "values": one.values}
    return told if one.positions is None else told | {"positions": one.positions}
