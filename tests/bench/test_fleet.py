"""How the callers of `bench.fleet` tell the ends of streams, and its page."""

import json

import pytest

from bench.fleets.clients import Call, Reply, _end
from bench.fleets.report import page

DONE, PIECE = b"data: [DONE]", b'data: {"choices": [{"text": "a"}]}'
LAST = b'data: {"choices": [{"text": "", "steering": {"interventions": [{"name": "topic/sports"}]}}]}'
DELETED = b'data: {"error": {"code": "deleted"}}'


@pytest.mark.parametrize(
    ("frames", "outcome"),
    [
        ([PIECE, LAST, DONE], "done"),
        ([PIECE, DELETED], "deleted"),
        ([PIECE], "broken"),
        ([], "broken"),
        ([PIECE, DONE, DONE], "twice"),
        ([DELETED, DONE], "twice"),
    ],
)
def test_a_stream_ends_once_or_is_told_apart(frames: list[bytes], outcome: str) -> None:
    call = Call("id", 0.0)
    assert _end(frames, call) == outcome
    assert (call.receipt is not None) == (LAST in frames)


def test_the_code_of_an_error_is_read_from_its_body() -> None:
    assert Reply(404, body=json.dumps({"error": {"code": "not_found"}}).encode()).code == "not_found"
    assert Reply(502, body=b"<html>").code == ""
    assert Reply(200, body=b"{}").code == ""


def test_the_page_has_what_was_run_alone() -> None:
    machine = {"date": "today", "cpus": 2, "platform": "Linux", "beside": "tests", "load_average": [1.0, 2.0, 3.0]}
    rates = [{"good_per_second": 2.5, "median_seconds": 0.5}]
    goodput = {"callers": 3, "seconds": 10.0, "in_time_seconds": 10.0, "one": rates, "three": rates}
    text = page({"machine": machine, "goodput": goodput})
    assert "| 1 | 2.5/s, 0.5 s | 2.5/s, 0.5 s |" in text
    assert "kill -9" not in text
    assert "tests (load average at the start 1.0, 2.0, 3.0)" in text
