"""OpenAI objects from the results of a request's rows."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from steerserve.engine.events import Result, Trace
from steerserve.server.rows import Row

Decoder = Callable[[Sequence[int]], str]

LOWEST_LOGPROB = -9999.0
"""Stands for minus infinity, which JSON cannot say."""


@dataclass(frozen=True)
class Answer:
    """What is known of one request: its rows, by the engine's id, and the results of those that have finished."""

    id: str
    created: int
    model: str
    fingerprint: str | None
    seed: int
    rows: Mapping[str, Row]
    decoders: Mapping[str, Decoder]
    """For each row the text of its response tokens, behind its own prompt."""
    results: dict[str, Result] = field(default_factory=dict)

    @property
    def head(self) -> dict[str, Any]:
        """The fields that the answer and each chunk of a stream begin with."""
        return {
            "id": self.id,
            "object": "text_completion",
            "created": self.created,
            "model": self.model,
            "system_fingerprint": self.fingerprint,
            "seed": self.seed,
        }

    def finished(self, choice: int) -> bool:
        """Whether every row of the choice has its result."""
        return all(request_id in self.results for request_id, row in self.rows.items() if row.choice == choice)

    def choice(self, index: int) -> dict[str, Any]:
        """A finished choice: OpenAI's fields, and `steering`, `trace` and `baseline` where there are such."""
        keys = {row.baseline: key for key, row in self.rows.items() if row.choice == index}
        result = self.results[keys[False]]
        choice: dict[str, Any] = {
            "index": index,
            "text": result.text,
            "logprobs": logprobs(result, self.decoders[keys[False]]),
            "finish_reason": result.finish_reason,
        }
        if result.receipt is not None:
            choice["steering"] = result.receipt
        if result.trace:
            choice["trace"] = [trace(one) for one in result.trace]
        if True in keys:
            baseline = self.results[keys[True]]
            choice["baseline"] = {"text": baseline.text, "finish_reason": baseline.finish_reason}
        return choice

    def usage(self) -> dict[str, int]:
        """Tokens of each prompt once and of every choice; steps and passes of all rows, baselines included."""
        pairs = [(self.rows[request_id], result) for request_id, result in self.results.items()]
        prompts = {row.prompt: result.prompt_tokens for row, result in pairs}
        completion = sum(len(result.tokens) for row, result in pairs if not row.baseline)
        return {
            "prompt_tokens": sum(prompts.values()),
            "completion_tokens": completion,
            "total_tokens": sum(prompts.values()) + completion,
            "denoising_steps": sum(result.steps for _, result in pairs),
            "forward_passes": sum(result.forward_passes for _, result in pairs),
        }

    def body(self) -> dict[str, Any]:
        """The whole answer; `steering` beside the choices is the receipt of the first: most requests have but one."""
        choices = [self.choice(index) for index in sorted({row.choice for row in self.rows.values()})]
        body = self.head | {"choices": choices, "usage": self.usage()}
        if "steering" in choices[0]:
            body["steering"] = choices[0]["steering"]
        return body


def trace(one: Trace) -> dict[str, Any]:
    """A trace entry as JSON."""
    return {"step": one.step, "progress": one.progress, "values": one.values}


def logprobs(result: Result, decode: Decoder) -> dict[str, Any] | None:
    """OpenAI's completion logprobs of the tokens that made it into the text; None where none were recorded."""
    if result.logprobs is None:
        return None
    tokens: list[str] = []
    offsets: list[int] = []
    before = ""
    for count in range(1, len(result.tokens) + 1):
        if len(before) >= len(result.text) and before:
            break
        now = decode(result.tokens[:count])
        offsets.append(len(before))
        tokens.append(now[len(before) :] if now.startswith(before) else decode(result.tokens[count - 1 : count]))
        before = now
    values = [max(value, LOWEST_LOGPROB) for value in result.logprobs[: len(tokens)]]
    return {"tokens": tokens, "token_logprobs": values, "top_logprobs": None, "text_offset": offsets}
