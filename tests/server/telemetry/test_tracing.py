import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import StatusCode
from starlette.testclient import TestClient

from steerserve.config import ServerConfig
from steerserve.server.app import create_app
from steerserve.server.telemetry.record import RequestRecord
from steerserve.server.telemetry.trace_context import continued
from steerserve.server.telemetry.tracing import Tracing, exporter_to
from tests.server.planned_engine import PlannedEngine
from tests.server.text_engine import service_of

TRACE, PARENT = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"


class Traced:
    def __init__(self) -> None:
        self.exporter = InMemorySpanExporter()
        self.tracing = Tracing(self.exporter)
        self.client = TestClient(create_app(service_of(PlannedEngine({})), ServerConfig(), [self.tracing]))

    def spans(self) -> list[ReadableSpan]:
        """Of one kind, since the batch of spans is sent when tracing is closed."""
        self.tracing.close()
        return list(self.exporter.get_finished_spans())


@pytest.fixture
def traced() -> Iterator[Traced]:
    made = Traced()
    with made.client:
        yield made
    made.tracing.close()


def post(client: TestClient, headers: dict[str, str] | None = None, **fields: Any) -> Any:
    return client.post("/v1/completions", json={"model": "text", "max_tokens": 8, "seed": 5} | fields, headers=headers)


def test_a_generation_is_a_span_with_its_two_parts(traced: Traced) -> None:
    steering = {"interventions": [{"attribute": "topic/sports", "strength": 0.5}]}
    answer = post(traced.client, prompt="pqr", steering=steering, temperature=0.5, stop=["x"]).json()
    queue, denoise, span = traced.spans()
    assert span.name == "text_completion text"
    found = dict(span.attributes or {})
    assert found["gen_ai.operation.name"] == "text_completion"
    assert found["gen_ai.request.model"] == found["gen_ai.response.model"] == "text"
    assert found["gen_ai.request.max_tokens"] == 8
    assert found["gen_ai.request.temperature"] == 0.5
    assert found["gen_ai.request.seed"] == 5
    assert found["gen_ai.request.stop_sequences"] == ("x",)
    assert found["gen_ai.response.id"] == answer["id"]
    assert found["gen_ai.response.finish_reasons"] == (answer["choices"][0]["finish_reason"],)
    assert found["gen_ai.usage.input_tokens"] == 3
    assert found["gen_ai.usage.output_tokens"] == answer["usage"]["completion_tokens"]
    assert found["steerserve.denoising_steps"] == 8
    assert found["steerserve.attributes"] == ("topic/sports",)
    assert found["http.response.status_code"] == 200
    # No digits of a hash, so that none of the ids may hold it by chance.
    assert "pqr" not in str(found.values())
    assert (queue.name, denoise.name) == ("queue", "denoise")
    assert span.context is not None
    for child in (queue, denoise):
        assert child.parent is not None
        assert child.parent.span_id == span.context.span_id
        assert (span.start_time or 0) <= (child.start_time or 0) <= (child.end_time or 0) <= (span.end_time or 0)


def test_a_callers_trace_is_gone_on_with_and_a_broken_one_ignored(traced: Traced) -> None:
    good, broken = {"traceparent": f"00-{TRACE}-{PARENT}-01"}, {"traceparent": "00-" + "x" * 200}
    post(traced.client, headers=good)
    post(traced.client, headers=broken)
    first, second = [span for span in traced.spans() if span.name.startswith("text_completion")]
    assert first.context is not None
    assert first.parent is not None
    assert format(first.context.trace_id, "032x") == TRACE
    assert format(first.parent.span_id, "016x") == PARENT
    assert second.parent is None


def test_a_span_has_the_id_that_was_passed_on() -> None:
    """What a request called was told its span before there was one."""
    exporter = InMemorySpanExporter()
    tracing = Tracing(exporter)
    parent = continued(f"00-{TRACE}-{PARENT}-01", "vendor=1")
    records = [RequestRecord("a", "GET", trace=parent), RequestRecord("b", "GET"), RequestRecord("c", "GET")]
    for one in records:
        one.submitted = one.started = one.began
        tracing(one)
    tracing.close()
    spans = [span for span in exporter.get_finished_spans() if span.name.startswith("GET")]
    for span, one in zip(spans, records, strict=True):
        assert span.context is not None
        assert format(span.context.trace_id, "032x") == one.trace.trace_id
        assert format(span.context.span_id, "016x") == one.trace.span_id
        assert one.trace.traceparent == f"00-{one.trace.trace_id}-{one.trace.span_id}-01"
    assert spans[0].context is not None
    assert spans[0].context.trace_state.get("vendor") == "1"
    assert len({span.context.span_id for span in exporter.get_finished_spans() if span.context is not None}) == 9


@pytest.mark.parametrize(
    "given",
    [
        None,
        "",
        "x",
        f"00-{TRACE}-{PARENT}",
        f"00-{'0' * 32}-{PARENT}-01",
        f"00-{TRACE}-{'0' * 16}-01",
        f"ff-{TRACE}-{PARENT}-01",
        f"00-{TRACE.upper()}-{PARENT}-01",
        f"00-{TRACE}-{PARENT}-01-more",
    ],
)
def test_a_trace_that_nobody_can_go_on_with_is_begun_anew(given: str | None) -> None:
    found = continued(given, "vendor=1")
    assert (found.parent_id, found.state) == (None, None)
    assert found.trace_id != TRACE
    assert len(found.trace_id) == 32


def test_a_later_version_is_read_as_far_as_it_is_known() -> None:
    found = continued(f"cc-{TRACE}-{PARENT}-00-more", "vendor=1")
    assert (found.trace_id, found.parent_id, found.flags, found.state) == (TRACE, PARENT, "00", "vendor=1")


def test_a_state_that_could_not_be_passed_on_is_dropped() -> None:
    for state in ("caf\xe9=1", "a=1\x01"):
        assert continued(f"00-{TRACE}-{PARENT}-01", state).state is None


def test_other_routes_and_errors_have_spans_too(traced: Traced) -> None:
    traced.client.get("/v1/models")
    post(traced.client, n=0)
    traced.client.get("/nope/" + "x" * 50)
    names = [(span.name, (span.attributes or {})["http.response.status_code"]) for span in traced.spans()]
    assert names == [("GET /v1/models", 200), ("POST /v1/completions", 400), ("GET other", 404)]
    assert all(span.status.status_code is StatusCode.UNSET for span in traced.exporter.get_finished_spans())


def test_the_exporter_sends_to_the_path_of_the_protocol() -> None:
    for endpoint in ("http://127.0.0.1:4318", "http://127.0.0.1:4318/", "http://127.0.0.1:4318/v1/traces"):
        exporter = exporter_to(endpoint)
        assert getattr(exporter, "_endpoint") == "http://127.0.0.1:4318/v1/traces"  # noqa: B009
        exporter.shutdown()


def test_neither_sdk_nor_exporter_is_imported_unless_used() -> None:
    probe = (
        "import sys; import steerserve.server.app, steerserve.server.process, steerserve.server.telemetry.tracing;"
        "assert not [name for name in sys.modules if name.startswith(('opentelemetry.sdk', 'opentelemetry.exporter'))]"
    )
    subprocess.run([sys.executable, "-c", probe], check=True)
