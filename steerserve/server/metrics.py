"""What the server tells Prometheus, in a registry of its own."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from steerserve.engine.events import Result

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)
STEP_SECONDS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5)


class Metrics:
    """Counters, gauges and histograms of one server; the gauges ask `load` when they are read."""

    def __init__(self, load: Callable[[], Mapping[str, Any]]) -> None:
        self.registry = CollectorRegistry()
        self.requests = self._counter("requests", "Requests by route and outcome", ["route", "outcome"])
        self.steered_requests = self._counter("steered_requests", "Requests that asked for at least one intervention")
        self.prompt_tokens = self._counter("prompt_tokens", "Prompt tokens of finished rows")
        self.completion_tokens = self._counter("completion_tokens", "Response tokens of finished rows")
        self.denoising_steps = self._counter("denoising_steps", "Denoising steps of finished rows")
        self.forward_passes = self._counter("forward_passes", "Forward passes that finished rows took part in")
        self.request_seconds = self._histogram(
            "request_seconds", "Time from a request to its last byte", SECONDS, ["route"]
        )
        self.first_token_seconds = self._histogram("first_token_seconds", "Time to the first committed token", SECONDS)
        self.step_seconds = self._histogram("step_seconds", "Time of one engine step", STEP_SECONDS)
        for key, help_text in (
            ("queue_length", "Rows waiting for a place in the batch"),
            ("running_rows", "Rows being denoised"),
        ):
            gauge = Gauge(f"steerserve_{key}", help_text, registry=self.registry)
            gauge.set_function(partial(_reading, load, key))

    def count_result(self, result: Result) -> None:
        """Count a finished row."""
        self.prompt_tokens.inc(result.prompt_tokens)
        self.completion_tokens.inc(len(result.tokens))
        self.denoising_steps.inc(result.steps)
        self.forward_passes.inc(result.forward_passes)

    def exposition(self) -> bytes:
        """The text format that Prometheus scrapes."""
        return generate_latest(self.registry)

    def _counter(self, name: str, help_text: str, labels: list[str] | None = None) -> Counter:
        return Counter(f"steerserve_{name}", help_text, labels or [], registry=self.registry)

    def _histogram(
        self, name: str, help_text: str, buckets: tuple[float, ...], labels: list[str] | None = None
    ) -> Histogram:
        return Histogram(f"steerserve_{name}", help_text, labels or [], registry=self.registry, buckets=buckets)


def _reading(load: Callable[[], Mapping[str, Any]], key: str) -> float:
    return float(load()[key])
