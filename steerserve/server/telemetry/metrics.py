"""Metrics for Prometheus, in a registry of their own."""

from collections.abc import Callable, Iterable
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest

from steerserve.engine.api.events import Result

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0)
STEP_SECONDS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5)
ROWS = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0, 512.0)
SHARES = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
CONFIGURATIONS = (0.0, *ROWS)
NATS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
RATIOS = (0.01, 0.025, 0.05, 0.1, 0.2, 0.3, 0.5, 0.75, 1.0, 2.0, 5.0)


class Metrics:
    """Counters, gauges and histograms of one server."""

    def __init__(self, attributes: Iterable[str] = ()) -> None:
        """attributes: those that are loaded, the only ones that get a series."""
        self.registry = CollectorRegistry()
        self.requests = self._counter(
            "requests", "Requests by route and status (499: the client left)", "route", "code"
        )
        self.rejected = self._counter("rejected", "Requests turned away before any work, by the error's code", "reason")
        self.request_seconds = self._histogram(
            "request_seconds", "Time from a request to its last byte", SECONDS, "route"
        )
        self.queue_wait_seconds = self._histogram(
            "queue_wait_seconds", "Time from a request's acceptance to the first step of its first row", SECONDS
        )
        self.time_to_first_token_seconds = self._histogram(
            "time_to_first_token_seconds", "Time from a request to its first committed token", SECONDS
        )

        self.prompt_tokens = self._counter("prompt_tokens", "Prompt tokens of finished rows")
        self.tokens = self._counter("tokens", "Response tokens of finished rows")
        self.denoising_steps = self._counter("denoising_steps", "Denoising steps of finished rows")
        self.forward_passes = self._counter("forward_passes", "Forward passes that finished rows took part in")

        self.step_seconds = self._histogram("step_seconds", "Time of one engine step", STEP_SECONDS)
        self.batch_rows = self._histogram("batch_rows", "Rows in one engine step", ROWS)
        self.batch_fill = self._histogram("batch_fill", "Rows in one engine step, as a share of what fits", SHARES)

        self.steered_requests = self._counter("steered_requests", "Requests with at least one intervention")
        self.steering_configurations = self._histogram(
            "steering_configurations", "Different steering of the requests in one engine step", CONFIGURATIONS
        )
        self.steering_delta_ratio = self._histogram(
            "steering_delta_ratio", "Mean |delta| / |h| of an intervention at a site, over a finished row", RATIOS
        )
        self.steering_predicted_kl = self._histogram(
            "steering_predicted_kl", "Predicted KL of a finished row's interventions, nats a response token", NATS
        )
        self.steering_measured_kl = self._histogram(
            "steering_measured_kl", "KL of a finished row from its unsteered predictions, where it was measured", NATS
        )
        self.steering_clipped = self._counter("steering_clipped", "Pushes that a limit made smaller")
        self.steering_unapplied = self._counter(
            "steering_unapplied", "Interventions of finished rows that changed nothing"
        )
        self.steering_failures = self._counter(
            "steering_failures", "Rows that failed since a push did not change the states it is for"
        )
        self.attribute_requests = self._counter(
            "attribute_requests", "Requests that push an attribute, its key's own included", "attribute"
        )
        self.attributes: frozenset[str] = frozenset()
        self.add_attributes(attributes)

        self.key_reloads = self._counter("key_reloads", "Times the file of keys was read again, by outcome", "outcome")
        for outcome in ("ok", "failed"):
            self.key_reloads.labels(outcome)
        self.forwards = self._counter(
            "forwards", "Requests forwarded to the replica that runs their generation, by outcome", "outcome"
        )
        for outcome in ("answered", "unreachable"):
            self.forwards.labels(outcome)
        self.limits_store_failures = self._counter("limits_store_failures", "Calls to the store of limits that failed")
        self.steering_reloads = self._counter(
            "steering_reloads", "Times attributes and vectors were read again, by outcome", "outcome"
        )
        for outcome in ("ok", "failed"):
            self.steering_reloads.labels(outcome)
        self._revision = Gauge(
            "steerserve_revision_info",
            "1 for the revision of attributes and vectors that requests are admitted with",
            ("revision",),
            registry=self.registry,
        )
        self.log_lines_dropped = self._counter("log_lines_dropped", "Log lines that could not be written")
        ProcessCollector(registry=self.registry)

    def add_attributes(self, names: Iterable[str]) -> None:
        """Have a series for each of these from now on; attributes that are gone keep theirs."""
        new = frozenset(names) - self.attributes
        for name in sorted(new):
            self.attribute_requests.labels(name)
        self.attributes |= new

    def tell_revision(self, revision: str) -> None:
        """Tell the revision of attributes and vectors, and no other."""
        self._revision.clear()
        self._revision.labels(revision).set(1)

    def gauge(self, name: str, help_text: str, read: Callable[[], float]) -> None:
        """Add a gauge that is read when it is scraped."""
        Gauge(f"steerserve_{name}", help_text, registry=self.registry).set_function(read)

    def observe_step(self, seconds: float, rows: int, most: int, configurations: int) -> None:
        """Count one engine step of `rows` rows, of which `most` fit."""
        self.step_seconds.observe(seconds)
        self.batch_rows.observe(rows)
        self.batch_fill.observe(rows / most)
        self.steering_configurations.observe(configurations)

    def count_attributes(self, names: Iterable[str]) -> None:
        """Count one request that pushes these; unknown ones are left out, since names are the caller's to choose."""
        for name in self.attributes.intersection(names):
            self.attribute_requests.labels(name).inc()

    def count_result(self, result: Result) -> None:
        """Count a finished row."""
        self.prompt_tokens.inc(result.prompt_tokens)
        self.tokens.inc(len(result.tokens))
        self.denoising_steps.inc(result.steps)
        self.forward_passes.inc(result.forward_passes)
        receipt = result.receipt or {}
        # A row that is rewritten alone has a receipt too.
        if receipt.get("interventions") != [] and receipt.get("predicted_kl") is not None:
            self.steering_predicted_kl.observe(receipt["predicted_kl"])
        if receipt.get("measured_kl") is not None:
            self.steering_measured_kl.observe(receipt["measured_kl"])
        for one in receipt.get("interventions", ()):
            self._count_intervention(one)

    def exposition(self) -> bytes:
        """The text format that Prometheus scrapes."""
        return generate_latest(self.registry)

    def _count_intervention(self, one: dict[str, Any]) -> None:
        """Count what a receipt says of one intervention."""
        if one.get("applied") is False:
            self.steering_unapplied.inc()
        sites = one.get("sites", ())
        self.steering_clipped.inc(one["clipped"] if "clipped" in one else sum(site.get("clipped", 0) for site in sites))
        for site in sites:
            if site.get("positions_touched"):
                self.steering_delta_ratio.observe(site["delta_ratio_mean"])

    def _counter(self, name: str, help_text: str, *labels: str) -> Counter:
        return Counter(f"steerserve_{name}", help_text, labels, registry=self.registry)

    def _histogram(self, name: str, help_text: str, buckets: tuple[float, ...], *labels: str) -> Histogram:
        return Histogram(f"steerserve_{name}", help_text, labels, registry=self.registry, buckets=buckets)
