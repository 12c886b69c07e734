"""The metrics that routers made for vLLM read."""

from typing import Any

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from steerserve.config import ServerConfig
from steerserve.server.telemetry.vllm_names import NAMES, add_vllm_names
from tests.server.text_engine import TextEngine, serving


def samples(text: str) -> dict[str, tuple[dict[str, str], float, str]]:
    """Labels, value and type of each metric of vLLM's name, read as production-stack's router does."""
    found = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            if sample.name.startswith("vllm:"):
                found[sample.name] = (sample.labels, sample.value, family.type)
    return found


def test_they_are_there_where_they_are_asked_for_alone() -> None:
    with serving(TextEngine(), ServerConfig(vllm_metrics=True, drain_seconds=5)) as client:
        told = samples(client.get("/metrics").text)
    assert told == {name: ({"model_name": "text"}, 0.0, "gauge") for name in NAMES}
    with serving(TextEngine()) as client:
        assert not samples(client.get("/metrics").text)


def test_they_tell_rows_that_run_and_wait_and_how_full_a_batch_is() -> None:
    now: dict[str, Any] = {"queue_length": 7, "running_rows": 4, "max_queue": 256, "max_rows": 16}
    registry = CollectorRegistry()
    add_vllm_names(registry, "m", lambda: now)

    def values() -> list[float]:
        found = samples(generate_latest(registry).decode())
        return [found[name][1] for name in NAMES]

    assert values() == [4.0, 7.0, 0.25]
    now |= {"running_rows": 17, "queue_length": 0}
    assert values() == [17.0, 0.0, 1.0]
