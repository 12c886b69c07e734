import re

import pytest
from starlette.testclient import TestClient

from steerserve.engine.api.events import Result
from steerserve.server.telemetry.metrics import Metrics
from tests.server.text_engine import TextEngine, serving

NAMES = """
requests_total tokens_total prompt_tokens_total denoising_steps_total forward_passes_total queue_requests queue_steps
batch_rows batch_fill step_seconds time_to_first_token_seconds request_seconds queue_wait_seconds
steering_configurations steering_delta_ratio steering_predicted_kl steering_measured_kl steering_clipped_total
steering_unapplied_total steering_failures_total
attribute_requests_total running_rows ready rejected_total steered_requests_total key_reloads_total revision_info
steering_reloads_total
log_lines_dropped_total limits_store_failures_total forwards_total
"""


def result(**receipt: object) -> Result:
    return Result((1, 2), "ab", "length", 3, 4, 5, receipt or None)


def test_every_metric_is_there_with_its_help(client: TestClient) -> None:
    text = client.get("/metrics").text
    families = dict(re.findall(r"^# HELP steerserve_(\S+) (.+)$", text, re.MULTILINE))
    assert set(families) - {name for name in families if name.endswith("_created")} == set(NAMES.split())
    assert all(len(help_text) > 10 for help_text in families.values())


def test_only_loaded_attributes_have_a_series() -> None:
    metrics = Metrics(["topic/sports"])
    for name in ("topic/sports", "topic/sports", *(f"made/up-{i}" for i in range(1000))):
        metrics.count_attributes([name])
    lines = [line for line in metrics.exposition().decode().splitlines() if "attribute_requests_total{" in line]
    assert lines == ['steerserve_attribute_requests_total{attribute="topic/sports"} 2.0']


def test_paths_and_error_messages_make_no_series() -> None:
    with serving(TextEngine()) as client:
        for i in range(50):
            client.get(f"/made/up/{i}")
            client.get(f"/v1/attributes/made-up-{i}")
            client.post("/v1/completions", json={"model": f"made-up-{i}"})
        text = client.get("/metrics").text
    assert "made-up" not in text
    assert "made/up" not in text
    assert len(re.findall(r"^steerserve_requests_total{", text, re.MULTILINE)) == 3


def test_a_receipt_is_counted_by_site() -> None:
    metrics = Metrics()
    touched = {"positions_touched": 3, "delta_ratio_mean": 0.3}
    metrics.count_result(
        result(
            interventions=[
                {"applied": True, "sites": [touched, touched | {"clipped": 2}]},
                {"applied": False, "sites": [{"positions_touched": 0, "delta_ratio_mean": 0.0}]},
                {"applied": True, "clipped": 5, "sites": [touched | {"clipped": 5}]},
            ]
        )
    )
    metrics.count_result(result())
    value = metrics.registry.get_sample_value
    assert value("steerserve_steering_delta_ratio_count") == 3
    assert value("steerserve_steering_delta_ratio_sum") == pytest.approx(0.9)
    assert value("steerserve_steering_clipped_total") == 7
    assert value("steerserve_steering_unapplied_total") == 1
    assert value("steerserve_tokens_total") == 4
    assert value("steerserve_forward_passes_total") == 8


def test_what_was_predicted_and_what_was_measured_are_counted_where_a_receipt_has_them() -> None:
    metrics = Metrics()
    for receipt in ({"predicted_kl": 0.25, "measured_kl": 0.5}, {"predicted_kl": 0.75, "measured_kl": None}, {}):
        metrics.count_result(result(**receipt))
    value = metrics.registry.get_sample_value
    found = {
        kind: (value(f"steerserve_steering_{kind}_kl_count"), value(f"steerserve_steering_{kind}_kl_sum"))
        for kind in ("predicted", "measured")
    }
    assert found == {"predicted": (2.0, 1.0), "measured": (1.0, 0.5)}


def test_rejections_are_counted_by_their_code() -> None:
    with serving(TextEngine(max_queue=0)) as client:
        client.post("/v1/completions", json={"model": "text", "max_tokens": 4})
        client.post("/v1/completions", content=b"x" * 2_000_000)
        client.post("/v1/completions", content=b"{}", headers={"content-encoding": "gzip"})
        assert client.post("/v1/steering/preview", json={"model": "nope"}).status_code == 404
        text = client.get("/metrics").text
    found = dict(re.findall(r'^steerserve_rejected_total{reason="(\w+)"} (\S+)$', text, re.MULTILINE))
    assert found == {"overloaded": "1.0", "body_too_large": "1.0", "unsupported_encoding": "1.0"}
