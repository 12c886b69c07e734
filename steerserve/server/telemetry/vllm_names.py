"""The load of a server under the names that vLLM gives it, which routers made for vLLM read."""

from collections.abc import Callable, Mapping
from typing import Any, Final

from prometheus_client import CollectorRegistry, Gauge

NAMES: Final = ("vllm:num_requests_running", "vllm:num_requests_waiting", "vllm:kv_cache_usage_perc")


def add_vllm_names(registry: CollectorRegistry, model: str, load: Callable[[], Mapping[str, Any]]) -> None:
    """Add vLLM's gauges, read when they are scraped; load: as `Service.load`.

    What they count is rows, of which a request may have several. There is no pool of KV cache blocks here: what fills
    up is the batch, and its fill stands in that place, 0 to 1.
    """
    running, waiting, usage = NAMES
    told: dict[str, tuple[str, Callable[[], float]]] = {
        running: ("Rows being denoised", lambda: load()["running_rows"]),
        waiting: ("Rows waiting for a place in the batch", lambda: load()["queue_length"]),
        usage: (
            "Rows being denoised, as a share of what a batch holds; there is no KV cache pool",
            lambda: min(1.0, load()["running_rows"] / load()["max_rows"]),
        ),
    }
    for name, (help_text, read) in told.items():
        Gauge(name, help_text, ("model_name",), registry=registry).labels(model).set_function(read)
